"""A `Preset` -> YAML text that `load_preset` reads back as the same preset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from emotrain.config.schema import Preset

# What the strict reader takes for a number though YAML 1.1 does not, and breaks that YAML 1.1 folds.
_AMBIGUOUS = re.compile(r"[-+]?[.\d]+[eE][-+]?\d+|(?s:.*[\r\x85\u2028\u2029].*)")


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that would be read back as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _AMBIGUOUS.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_values(values: Mapping[str, Any]) -> str:
    """Plain values as YAML text in their order."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def dump_preset(preset: Preset) -> str:
    """The resolved preset, every key written out."""
    return dump_values(preset.to_dict())
