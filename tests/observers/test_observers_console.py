from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from emotrain.observers.console import ConsoleLines
from emotrain.train.events import (
    Notice,
    Phase,
    RunEnd,
    RunStart,
    SamplesDrawn,
    Saved,
    StepEnd,
    ValidationEnd,
)

MakeStep = Callable[..., StepEnd]
MakeStart = Callable[..., RunStart]


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_step_line_has_its_figures_in_a_stable_order(
    stream: io.StringIO, make_step: MakeStep, make_start: MakeStart
) -> None:
    console = ConsoleLines(10, stream=stream)
    console.handle(make_start())
    for step in range(1, 11):
        console.handle(make_step(step, observed_loss=0.25, stop_meter=0.4, ready=step == 10))
    line = lines_of(stream)[-1]
    pattern = (
        r"step 10/400  epoch 1\.25  loss 0\.6000  smoothed \d\.\d{4}  observed 0\.2500  "
        r"scalar \+0\.2000  trust \+0\.8000  emoPulse 1\.00e-03  grad_norm 0\.2500  "
        r"stop 40% ready  5\.00 it/s  ETA 1:18-\d:\d\d"
    )
    assert re.fullmatch(pattern, line), line


def test_every_nth_step_and_the_first_and_the_last_have_a_line(
    stream: io.StringIO, make_step: MakeStep, make_start: MakeStart
) -> None:
    console = ConsoleLines(10, stream=stream)
    console.handle(make_start(start_step=3, max_steps=33))
    for step in range(4, 34):
        console.handle(make_step(step))
    steps = [line.split("/")[0] for line in lines_of(stream) if line.startswith("step ")]
    assert steps == ["step 4", "step 10", "step 20", "step 30", "step 33"]
    assert "resumed after step 3" in lines_of(stream)
    with pytest.raises(ValueError, match="at least 1"):
        ConsoleLines(0)


def test_every_event_is_told_in_whole_lines_without_control_codes(
    stream: io.StringIO, make_step: MakeStep, make_start: MakeStart
) -> None:
    hostile = "\x1b[2J\r\nevil\x07\u202e"
    console = ConsoleLines(1, stream=stream)
    path = Path("runs") / "x\x1b[1m"
    for event in (
        make_start(name=hostile, facts=((hostile, hostile),)),
        Notice(hostile),
        Notice("fine", "info"),
        make_step(1, skipped=2),
        ValidationEnd(1, 0.6, -0.1, 1.5, 0.01, 1, 0.6, comparison=hostile + "better than the base model"),
        SamplesDrawn(1, (path,), (hostile,), path / "sheet.png"),
        Saved(1, path, best=True),
        RunEnd(1, "signal", hostile, path, 1, 0.6, 61.0, "emotrain resume x"),
    ):
        console.handle(event)
    console.close()
    text = stream.getvalue()
    assert text.endswith("\n")
    assert all(char.isprintable() or char == "\n" for char in text)
    lines = lines_of(stream)
    assert [line for line in lines if line.startswith("warning: ")] == ["warning: [2J  evil"]
    assert "fine" in lines
    for word in ("validation at step 1: loss 0.6000", "beside the best: [2J  evil", "than the base model",
                 "samples at step 1", "saved the best", "skipped 2",
                 "ended at step 1 (signal)", "took 1:01", "resume with: emotrain resume x"):  # fmt: skip
        assert word in text, word


def test_a_long_phase_has_a_line_at_both_ends_and_one_every_ten_seconds(
    stream: io.StringIO, clock: Callable[[], float]
) -> None:
    console = ConsoleLines(10, stream=stream, clock=clock)
    console.handle(Phase("load the model"))
    for done in range(101):
        console.handle(Phase("cache latents", done, 100))
        clock.tick(0.25)  # type: ignore[attr-defined]
    assert lines_of(stream) == [
        "load the model",
        "cache latents 0/100",
        "cache latents 40/100",
        "cache latents 80/100",
        "cache latents 100/100: done in 0:25",
    ]


def test_beside_json_only_warnings_are_told(stream: io.StringIO, make_step: MakeStep, make_start: MakeStart) -> None:
    console = ConsoleLines(1, stream=stream, warnings_only=True)
    for event in (make_start(), Phase("x"), make_step(1), Notice("note", "info"), Notice("bad")):
        console.handle(event)
    assert lines_of(stream) == ["warning: bad"]
