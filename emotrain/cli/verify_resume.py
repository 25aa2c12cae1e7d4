"""`emotrain verify-resume`: prove that resume is exact on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emotrain.cli.options import OneJson, Overrides

if TYPE_CHECKING:
    from emotrain.runs.verify import Comparison


def verify_resume(
    preset: Annotated[str, typer.Argument(help="A preset file, or the name of a shipped one")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps before the kill, and after it")] = 10,
    as_json: OneJson = False,
) -> None:
    """Prove that resume is exact on this machine.

    Trains 2n steps straight, then n steps, `kill -9`, resume and n steps more, and compares weights, optimizer,
    emotion, random states and history bit-identical. Nothing is left behind. Exit 5 where anything differs.
    On a GPU it trains with deterministic kernels, as `train.deterministic: true` does; with
    `--set train.deterministic=false` it says how far apart the common, faster ones end.

    Examples:
      emotrain verify-resume quickstart
      emotrain verify-resume my.yaml --steps 20
    """
    from emotrain.cli import output
    from emotrain.config.load import load
    from emotrain.errors import CheckpointError
    from emotrain.runs.preflight import preflight

    loaded = load(preset, overrides or ())
    preflight(loaded.preset, loaded.where).raise_first()
    from emotrain.runs.verify import verify_resume as verify

    with tempfile.TemporaryDirectory(prefix="emotrain-verify-") as work:
        found = verify(loaded.preset, steps, Path(work), output.note)
    equal = sum(item.equal for item in found)
    if as_json:
        rows = [{"what": c.what, "equal": c.equal, "size": c.size, "apart": c.apart} for c in found]
        output.json_object({"steps": 2 * steps, "equal": equal == len(found), "compared": rows})
    else:
        output.table([(c.what, _said(c), c.size) for c in found], ("compared", "result", "size"))
    if equal != len(found):
        raise CheckpointError(
            f"{len(found) - equal} of {len(found)} things differ after kill and resume",
            "on a GPU, kernels that add up in no fixed order cause this: leave train.deterministic at auto"
            if loaded.preset.train.deterministic is False
            else "please report it with the output of `emotrain doctor`",
        )


def _said(found: Comparison) -> str:
    if found.equal:
        return "equal"
    return f"DIFFERENT, by up to {found.apart:.2g}" if found.apart else "DIFFERENT"
