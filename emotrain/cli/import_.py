"""`emotrain import`: a preset from another trainer's config."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emotrain.cli import output
from emotrain.cli.written import folder_of, new_preset

if TYPE_CHECKING:
    from emotrain.config.trainers.imported import Row

WIDTH = 32  # of a value in the table


def import_(
    config: Annotated[Path, typer.Argument(help="A config of another trainer: TOML, JSON or YAML")],
    model: Annotated[str | None, typer.Argument(help="The model to train on, in place of the config's")] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The preset (default: the run's name, here)")
    ] = None,
) -> None:
    """Make a preset of another trainer's config.

    Reads kohya's sd-scripts (TOML and JSON: training, data set, and its GUI's arguments), ai-toolkit, OneTrainer and
    diffusion-pipe. A table says what was taken as what, what was left out and why, and what has no equivalent. Nothing
    is written over.

    Examples:
      emotrain import config.toml
      emotrain import my_lora.yaml ./models/x.safetensors -o mika.yaml
    """
    from emotrain.config.load import load
    from emotrain.runs.imports import import_config

    beside = folder_of(out)
    found = import_config(config, model, beside)
    path = new_preset(out or Path(f"{found.name}.yaml"), found.text, "import")
    _tell(found.rows, found.num_off)
    for missing in found.missing:
        output.warning(f"{missing} is not on this machine")
    load(path)  # what it refuses is said with the preset's lines
    shown = shlex.quote(str(path))
    output.note(f"next: emotrain check {shown}, then emotrain run {shown}")
    output.result(str(path))


def _tell(rows: tuple[Row, ...], num_off: int) -> None:
    """The table, in three parts."""
    for kind, header in (("taken", "as"), ("left out", "because"), ("no equivalent", "")):
        lines = [(row.word, _short(row.value), row.what) for row in rows if row.kind == kind]
        if lines:
            output.table([(kind, "", header), *lines], write=output.note)
            output.note("")
    if num_off:
        output.note(f"{num_off} settings that are off, empty or say nothing of the training are not shown")


def _short(value: str) -> str:
    return value if len(value) <= WIDTH else f"{value[: WIDTH - 3]}..."
