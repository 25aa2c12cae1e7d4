"""What the shell offers after Tab: quick, and quiet about everything that goes wrong."""

from __future__ import annotations

import os
from pathlib import Path

from emotrain.config.builtin import shipped_presets
from emotrain.files import is_regular


def preset_names(incomplete: str) -> list[str]:
    """Names of the shipped presets, and the YAML files here."""
    here = sorted(path.name for path in Path().glob("*.y*ml"))
    return [name for name in (*shipped_presets(), *here) if name.startswith(incomplete)]


def run_names(incomplete: str) -> list[str]:
    """Names of the runs in ./runs."""
    try:
        found = sorted(entry.name for entry in os.scandir("runs") if is_regular(Path(entry.path) / "run.json"))
    except OSError:
        return []
    return [name for name in found if name.startswith(incomplete)]
