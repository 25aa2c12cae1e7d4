"""`emotrain run`: train a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    preset: Annotated[str, typer.Argument(help="A preset file, or the name of a shipped one")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one key: section.key=value; repeatable"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run and its folder")
    ] = None,
    runs_dir: Annotated[
        Path, typer.Option("--runs-dir", help="Holds all runs", envvar="EMOTRAIN_RUNS")
    ] = Path("runs"),
    plain: Annotated[
        bool, typer.Option("--plain", help="Plain lines in place of the dashboard")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on stdout")] = False,
) -> None:
    """Train a LoRA.

    Reads the preset, checks data and model, trains until the stop rule says that the run is done, and prints the
    path of the LoRA. Ctrl-C saves; the command to go on with is printed.

    Examples:
      emotrain run quickstart
      emotrain run my.yaml --set network.rank=32 --name second-try
    """
    from emotrain.cli.training import show
    from emotrain.config.load import load

    loaded = load(preset, overrides or (), name)
    with show(loaded.preset, loaded.notes, plain=plain, as_json=as_json) as training:
        training.run(runs_dir, loaded.where)
