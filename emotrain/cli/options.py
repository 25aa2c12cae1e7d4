"""Options that several commands have, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emotrain.cli.complete import preset_names

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
