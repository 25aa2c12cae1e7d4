"""`emotrain run`: train a LoRA."""

from __future__ import annotations

from typing import Annotated

import typer

from emotrain.cli.options import RUNS, EventsAsJson, Overrides, Plain, RunName, RunsDir


def run(
    preset: Annotated[str, typer.Argument(help="A preset file, or the name of a shipped one")],
    overrides: Overrides = None,
    name: RunName = None,
    runs_dir: RunsDir = RUNS,
    plain: Plain = False,
    as_json: EventsAsJson = False,
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
        training.run(runs_dir, loaded.where, loaded.extends)
