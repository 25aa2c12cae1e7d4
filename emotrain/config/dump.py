"""A `Preset` -> YAML text that `load_preset` reads back as the same preset."""

from __future__ import annotations

import yaml

from emotrain.config.schema import Preset


def dump_preset(preset: Preset) -> str:
    """The resolved preset, every key written out."""
    values = preset.to_dict()
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
