"""`emotrain replay`: what an emo optimizer would have felt on any loss log."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from emotrain.cli import output
from emotrain.cli.options import OneJson

if TYPE_CHECKING:
    from emotrain.pulse.logs import LossLog
    from emotrain.pulse.replay import Replay

Generation = Literal["3.6", "3.7", "3.7.0", "3.7.6", "3.9"]


def replay(
    log: Annotated[Path, typer.Argument(help="A run, metrics.jsonl, JSON, CSV, or a TensorBoard folder")],
    generation: Annotated[Generation, typer.Option("--generation", help="Whose emotion; 3.7 means 3.7.6")] = "3.9",
    column: Annotated[str | None, typer.Option("--column", help="Key, column or tag of the loss")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Scales the pulse (1.0; 3.6: 1e-3)", min=1e-12)] = None,
    sensor: Annotated[Literal["faithful", "intent"], typer.Option("--sensor", help="The sensors' rule")] = "faithful",
    stopcoef: Annotated[float, typer.Option("--stopcoef", help="Loss below which 3.9 may stop", min=1e-12)] = 0.04,
    tensors: Annotated[int, typer.Option("--tensors", help="3.7.0: tensors with a gradient", min=1)] = 1,
    as_json: OneJson = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw an SVG file")] = None,
) -> None:
    """Replay a loss log through an emo optimizer.

    Shows what it would have felt at each step, and where each published stop signal would have been lit. The log may be
    any trainer's; each logged loss counts as one optimizer step.

    Examples:
      emotrain replay runs/mika_v2
      emotrain replay other_trainer/logs --column loss/current
      emotrain replay loss.csv --generation 3.7 --plot felt.svg
    """
    from emotrain.pulse.logs import read_log, usual_gap
    from emotrain.pulse.replay import replay as felt_by

    losses = read_log(log, column)
    felt = felt_by(
        losses.steps,
        losses.losses,
        generation=generation,
        lr=lr,
        sensor=sensor,
        stopcoef=stopcoef,
        num_tensors=tensors,
        start_loss=losses.start_loss,
        gains=losses.gains,
    )
    if losses.left_out:
        output.warning(f"{losses.left_out} losses are not finite and were left out")
    gap = usual_gap(losses.steps)
    if gap > 1:
        output.warning(f"this log holds every {gap}th step only: the averages are slower than they were")
    if plot is not None:
        _plot(plot, losses, felt)
    if as_json:
        head = {"schema_version": output.SCHEMA_VERSION, "log": str(losses.source), "column": losses.column}
        output.json_object({**head, "left_out": losses.left_out, **felt.to_dict()})
        return
    _show(losses, felt)


def _show(log: LossLog, felt: Replay) -> None:
    from emotrain.pulse.draw import braille

    width = max(20, min(shutil.get_terminal_size((80, 24)).columns - 12, 120))
    count, first, last = len(felt.steps), felt.steps[0], felt.steps[-1]
    output.result(
        f"{log.source}: `{log.column}`, {count} losses, steps {first} to {last}, generation {felt.generation}"
    )
    rows = (
        ("loss", list(felt.losses), False, 5),
        ("scalar", [reading.scalar for reading in felt.readings], False, 3),
        ("trust", [reading.trust for reading in felt.readings], False, 3),
        ("emoPulse" if felt.generation != "3.6" else "lr x drive", _lengths(felt), True, 4),
    )
    for name, values, log_scale, height in rows:
        output.result("")
        output.result(name)
        lines = braille(values, width, height, log=log_scale)
        for index, line in enumerate(lines):
            label = max(values) if index == 0 else min(values) if index == len(lines) - 1 else None
            output.result(f"{'' if label is None else f'{label:.3g}':>10} {line}")
    output.result("")
    signals = [
        (
            signal.name,
            "never" if signal.first is None else signal.first,
            signal.num_lit,
            "yes" if signal.at_end else "no",
        )
        for signal in felt.signals
    ]
    output.table(signals, ("stop signal", "first lit at step", "steps lit", "lit at the end"))


def _lengths(felt: Replay) -> list[float]:
    if felt.generation == "3.6":
        return [reading.pulse * reading.drive for reading in felt.readings]
    return [reading.pulse for reading in felt.readings]


def _plot(path: Path, log: LossLog, felt: Replay) -> None:
    from emotrain.errors import ConfigError
    from emotrain.pulse.draw import Panel, svg

    def curve(values: list[float]) -> list[tuple[float, float]]:
        return [(float(step), value) for step, value in zip(felt.steps, values, strict=True)]

    marks = [(float(s.first), f"{s.name} lit") for s in felt.signals if s.first is not None]
    averages = [(word, curve([getattr(r, word) for r in felt.readings])) for word in ("short", "medium", "long")]
    panels = [
        Panel("loss", [("loss", curve(list(felt.losses))), *averages], marks=marks),
        Panel("scalar", [("", curve([r.scalar for r in felt.readings]))]),
        Panel("trust", [("", curve([r.trust for r in felt.readings]))]),
        Panel("emoPulse" if felt.generation != "3.6" else "lr x emoDrive", [("", curve(_lengths(felt)))], log=True),
    ]
    text = svg(panels, title=f"{log.source.name}: what generation {felt.generation} would have felt")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--plot: {path} cannot be written: {error.strerror}", "name a file in a folder that exists"
        ) from error
    output.note(f"drew {path}")
