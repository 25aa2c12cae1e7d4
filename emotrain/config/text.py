"""A preset's bytes -> text: a regular file, of a sane size, in UTF-8."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from emotrain.errors import ConfigError

MAX_BYTES = 1_000_000
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, shown: str) -> str:
    """Read a preset's text.

    Args:
        path: the file.
        shown: the file's name in messages.

    Raises:
        ConfigError: missing, not a regular file, not readable, over 1 MB, or not UTF-8.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"{shown} is a folder, not a preset", "name the .yaml file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{shown} is not a regular file")
        if status.st_size > MAX_BYTES:
            size = f"{status.st_size / 1e6:.1f} MB"
            raise ConfigError(f"{shown} is {size} long, which no preset is", "the limit is 1 MB")
        data = path.read_bytes()
    except FileNotFoundError as error:
        hint = None if path.suffix in (".toml", ".json") else "`emotrain presets list` shows the shipped ones"
        raise ConfigError(f"{shown} does not exist", hint) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{shown} cannot be read: {reason.lower()}") from error
    return _decode(data, shown)


def _decode(data: bytes, shown: str) -> str:
    """UTF-8 with or without a byte order mark; everything else is refused by its name."""
    hint = "save it as UTF-8"
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ConfigError(f"{shown} is UTF-32, and presets are UTF-8", hint)
    zeros_even, zeros_odd = data[0:200:2].count(0), data[1:200:2].count(0)
    looks_utf16 = max(zeros_even, zeros_odd) > 0.4 * len(data[:200]) / 2
    if data.startswith(_UTF16) or looks_utf16:
        raise ConfigError(f"{shown} is UTF-16, and presets are UTF-8", hint)
    if 0 in data:
        line = data[: data.index(0)].count(b"\n") + 1
        raise ConfigError(f"{shown}:{line}: there is a NUL byte, so this is not a text file", hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{shown}:{line}: byte 0x{data[error.start]:02x} is not UTF-8", hint) from error
