"""`emotrain replay`: the signals of an emo optimizer on any loss log."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from emotrain.cli import output
from emotrain.cli.options import RUNS, OneJson

if TYPE_CHECKING:
    from emotrain.pulse.logs import LossLog
    from emotrain.pulse.replay import Replay

Generation = Literal["3.6", "3.7", "3.7.0", "3.7.6", "3.9"]


def replay(
    log: Annotated[
        Path, typer.Argument(help="A run's folder or name, metrics.jsonl, JSON, CSV, or a TensorBoard folder")
    ],
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

    Shows its values at each step, and where each published stop signal would have been lit. The log may be
    any trainer's; each logged loss counts as one optimizer step.

    Examples:
      emotrain replay mika_v2
      emotrain replay other_trainer/logs --column loss/current
      emotrain replay loss.csv --generation 3.7 --plot replay.svg
    """
    from emotrain.pulse.logs import read_log, usual_gap
    from emotrain.pulse.replay import replay as replay_of

    if not log.is_file() and not (log / "metrics.jsonl").exists() and (RUNS / log / "run.json").is_file():
        log = RUNS / log
    losses = read_log(log, column)
    replayed = replay_of(
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
        _plot(plot, losses, replayed)
    if as_json:
        head = {"schema_version": output.SCHEMA_VERSION, "log": str(losses.source), "column": losses.column}
        output.json_object({**head, "left_out": losses.left_out, **replayed.to_dict()})
        return
    _show(losses, replayed)


def _show(log: LossLog, replayed: Replay) -> None:
    width = max(20, min(shutil.get_terminal_size((80, 24)).columns - 1, 120))
    count, first, last = len(replayed.steps), replayed.steps[0], replayed.steps[-1]
    output.result(
        f"{log.source}: `{log.column}`, {count} losses, steps {first} to {last}, generation {replayed.generation}"
    )
    curves = (
        ("loss", replayed.losses, False, 5),
        ("scalar", [reading.scalar for reading in replayed.readings], False, 3),
        ("trust", [reading.trust for reading in replayed.readings], False, 3),
        ("emoPulse" if replayed.generation != "3.6" else "lr x drive", _lengths(replayed), True, 4),
    )
    for name, values, log_scale, height in curves:
        output.result("")
        output.result(name)
        for line in _curve(values, log_scale, width, height):
            output.result(line)
    output.result("")
    signals = [
        (
            signal.name,
            "never" if signal.first is None else signal.first,
            signal.num_lit,
            "yes" if signal.at_end else "no",
        )
        for signal in replayed.signals
    ]
    output.table(signals, ("stop signal", "first lit at step", "steps lit", "lit at the end"))


def _curve(values: Sequence[float], log_scale: bool, width: int, height: int) -> list[str]:
    from rich.console import Console

    from emotrain.observers.curve import Plot, Scale, Trace

    trace = Trace()
    for value in values:
        trace.add(value)
    plot = Plot([(trace, "")], Scale(min(values), max(values), log_scale), rows=height)
    console = Console(width=width, height=height, color_system=None)
    return ["".join(piece.text for piece in line).rstrip() for line in console.render_lines(plot)]


def _lengths(replayed: Replay) -> list[float]:
    if replayed.generation == "3.6":
        return [reading.pulse * reading.drive for reading in replayed.readings]
    return [reading.pulse for reading in replayed.readings]


def _plot(path: Path, log: LossLog, replayed: Replay) -> None:
    from emotrain.errors import ConfigError
    from emotrain.pulse.draw import Panel, svg

    def curve(values: list[float]) -> list[tuple[float, float]]:
        return [(float(step), value) for step, value in zip(replayed.steps, values, strict=True)]

    marks = [(float(s.first), f"{s.name} lit") for s in replayed.signals if s.first is not None]
    averages = [(word, curve([getattr(r, word) for r in replayed.readings])) for word in ("short", "medium", "long")]
    panels = [
        Panel("loss", [("loss", curve(list(replayed.losses))), *averages], marks=marks),
        Panel("scalar", [("", curve([r.scalar for r in replayed.readings]))]),
        Panel("trust", [("", curve([r.trust for r in replayed.readings]))]),
        Panel(
            "emoPulse" if replayed.generation != "3.6" else "lr x emoDrive", [("", curve(_lengths(replayed)))], log=True
        ),
    ]
    text = svg(panels, title=f"{log.source.name}: what generation {replayed.generation} makes of it")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--plot: {path} cannot be written: {error.strerror}", "name a file in a folder that exists"
        ) from error
    output.note(f"drew {path}")
