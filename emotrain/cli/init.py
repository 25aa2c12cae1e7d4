"""`emotrain init`: a first preset from a folder of pictures and a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from emotrain.cli import output
from emotrain.cli.written import folder_of, new_preset


def init(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures, with their captions")],
    model: Annotated[str | None, typer.Argument(help="The model to train on: a file, folder or hub id")] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The preset (default: the folder's name, here)")
    ] = None,
) -> None:
    """Look at pictures and model, and write a preset.

    Every decision is said with its reason; nothing is asked and nothing is written over. The preset is yours to change.

    Examples:
      emotrain init ./mika ./models/illustrious.safetensors
      emotrain init ./10_mika -o mika.yaml
    """
    from emotrain.runs.propose import propose

    proposal = propose(folder, model, folder_of(out))
    path = new_preset(out or Path(f"{proposal.name}.yaml"), proposal.text, "init")
    for reason in proposal.reasons:
        output.note(reason)
    shown = shlex.quote(str(path))
    output.note(f"next: emotrain check {shown}, then emotrain run {shown}")
    output.result(str(path))
