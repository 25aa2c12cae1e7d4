"""`emotrain resume`: the same run goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emotrain.cli.launch import Gpus, joined, launch, wants_launch
from emotrain.cli.options import RUNS, EventsAsJson, Overrides, Plain, RunsDir, run_names

if TYPE_CHECKING:
    from emotrain.ranks import Ranks


def resume(
    context: typer.Context,
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
    gpus: Gpus = None,
) -> None:
    """Resume a run, bit-identical.

    Uses the newest whole checkpoint and says which ones it had to skip. On the same machine and versions the result
    equals that of a run that was never interrupted. `save.*`, `sample.*`, `log.*` and a higher `train.max_steps`
    may change. Pictures or a model that have moved are named by `--set`: what they hold is compared.

    Examples:
      emotrain resume mika_v1
      emotrain resume runs/mika_v1 --checkpoint 500
      emotrain resume mika_v1 --set train.max_steps=4000
      emotrain resume mika_v1 --set model.base=/new/place/model.safetensors
      emotrain resume mika_v1 --gpus 2
    """
    if gpus is not None and wants_launch(gpus):
        raise typer.Exit(launch(context.obj, gpus))
    with joined(gpus) as ranks:
        go_on(
            ranks, run, runs_dir, plain=plain, as_json=as_json, overrides=overrides or (),
            checkpoint=None if ranks.restarts else checkpoint, allow_config_change=allow_config_change,
        )  # fmt: skip


def go_on(
    ranks: Ranks,
    run: str,
    runs_dir: Path,
    *,
    plain: bool,
    as_json: bool,
    overrides: Sequence[str] = (),
    checkpoint: int | None = None,
    allow_config_change: bool = False,
) -> None:
    """Go on with a run; of several processes the one that has its folder leads, and tells the others its preset.

    Raises:
        EmotrainError: as `runs.start.resume`.
    """
    from emotrain.cli.training import show
    from emotrain.config.load import load
    from emotrain.runs.folder import INFO, KeptByTheLead, open_run, refuse_finished, refuse_foreign_parts

    with ranks.together(), tempfile.TemporaryDirectory(prefix="emotrain-preset-") as sent:
        ranks.lead_where(any((path / INFO).is_file() for path in (Path(run), runs_dir / run)))
        folder = open_run(run, runs_dir) if ranks.first else KeptByTheLead(Path(run))
        path = folder.preset_path
        if ranks.first:
            refuse_foreign_parts(folder)
        if ranks.world > 1:
            text = ranks.told(path.read_text(encoding="utf-8") if ranks.first else None)
            if not ranks.first:
                path = Path(sent) / path.name
                path.write_text(text, encoding="utf-8")
        loaded = load(path, overrides)
        if ranks.first:
            refuse_finished(folder, loaded.preset.train.max_steps)
    notes = [note for note in loaded.notes if not note.startswith(f"{path}:")]  # told when the run began
    with show(loaded.preset, notes, plain=plain, as_json=as_json, ranks=ranks) as training:
        training.resume(folder, checkpoint, allow_config_change=allow_config_change)
