"""Options that several commands have, declared once; what the shell offers after Tab, quick and without errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

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


PresetName = Annotated[
    str, typer.Argument(help="A preset file, or the name of a shipped one", autocompletion=preset_names)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key of the preset: section.key=value; repeatable")
]
RunName = Annotated[str | None, typer.Option("--name", help="Name of the run and its folder")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Holds all runs", envvar="EMOTRAIN_RUNS")]
Plain = Annotated[bool, typer.Option("--plain", help="Plain lines in place of the dashboard")]
EventsAsJson = Annotated[bool, typer.Option("--json", help="Events as JSON lines on stdout")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]
OneJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout")]
RUNS = Path("runs")
