"""A config's bytes -> plain values: TOML, JSON or YAML by the file's ending."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from emotrain.config import source
from emotrain.config.text import read_text
from emotrain.errors import ConfigError
from emotrain.files import strict_json


def parse_file(path: Path, shown: str) -> Any:
    """The values of a file.

    Raises:
        ConfigError: it cannot be read, or is not what its ending says.
    """
    return parse_text(read_text(path, shown), path.suffix.lower(), shown)


def parse_text(text: str, suffix: str, shown: str) -> Any:
    """As `parse_file`, of a text.

    Raises:
        ConfigError: it is not what `suffix` says.
    """
    if suffix == ".toml":
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            hint = "Windows paths want 'single quotes'" if "\\" in text else None
            raise ConfigError(f"{shown} is not TOML: {error or 'it is nested too deeply'}", hint) from None
    if suffix == ".json":
        try:
            return strict_json(text)
        except ValueError as error:
            raise ConfigError(f"{shown} is not JSON: {error}") from None
    return source.parse(text, shown)[0].plain()
