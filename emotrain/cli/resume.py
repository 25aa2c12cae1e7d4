"""`emotrain resume`: the same run goes on."""

from __future__ import annotations

from typing import Annotated

import typer

from emotrain.cli.complete import run_names
from emotrain.cli.options import RUNS, EventsAsJson, Overrides, Plain, RunsDir


def resume(
    run: Annotated[str, typer.Argument(help="A run's folder or name", autocompletion=run_names)],
    checkpoint: Annotated[
        int | None,
        typer.Option("--checkpoint", help="Go on from this step's checkpoint, not the newest"),
    ] = None,
    overrides: Overrides = None,
    allow_config_change: Annotated[
        bool,
        typer.Option("--allow-config-change", help="Go on although preset, data set or base have changed"),
    ] = False,
    runs_dir: RunsDir = RUNS,
    plain: Plain = False,
    as_json: EventsAsJson = False,
) -> None:
    """Resume a run, bit-identical.

    Uses the newest whole checkpoint and says which ones it had to skip. On the same machine and versions the result
    equals that of a run that was never interrupted. `save.*`, `sample.*`, `log.*` and a higher `train.max_steps`
    may change.

    Examples:
      emotrain resume mika_v1
      emotrain resume runs/mika_v1 --checkpoint 500
      emotrain resume mika_v1 --set train.max_steps=4000
    """
    from emotrain.cli.training import show
    from emotrain.config.load import load
    from emotrain.runs.folder import open_run, refuse_finished, refuse_foreign_parts

    folder = open_run(run, runs_dir)
    refuse_foreign_parts(folder)
    loaded = load(folder.preset_path, overrides or ())
    refuse_finished(folder, loaded.preset.train.max_steps)
    with show(loaded.preset, loaded.notes, plain=plain, as_json=as_json) as training:
        training.resume(folder, checkpoint, allow_config_change=allow_config_change)
