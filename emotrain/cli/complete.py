"""What the shell offers after Tab: quick, and quiet about everything that goes wrong."""

from __future__ import annotations

from emotrain.config.builtin import shipped_presets


def preset_names(incomplete: str) -> list[str]:
    """Names of the shipped presets; the shell adds files by itself."""
    return [name for name in shipped_presets() if name.startswith(incomplete)]
