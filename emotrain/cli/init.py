"""`emotrain init`: a first preset from a folder of pictures and a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from emotrain.cli import output
from emotrain.errors import CheckpointError, ConfigError


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

    beside = out.parent if out is not None else Path()
    if not beside.is_dir():
        raise ConfigError(f"--output: {beside} is not a folder", "make it first, or give another file")
    proposal = propose(folder, model, beside)
    path = out or Path(f"{proposal.name}.yaml")
    if path.exists():
        number = next(n for n in range(2, 10_000) if not path.with_stem(f"{path.stem}-{n}").exists())
        raise CheckpointError(
            f"{path} exists, and `init` writes over nothing",
            f"give another name: -o {path.with_stem(f'{path.stem}-{number}')}",
        )
    for reason in proposal.reasons:
        output.note(reason)
    try:
        with path.open("x", encoding="utf-8") as file:  # never through a link, nor over what came in the meantime
            file.write(proposal.text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from error
    shown = shlex.quote(str(path))
    output.note(f"next: emotrain check {shown}, then emotrain run {shown}")
    output.result(str(path))
