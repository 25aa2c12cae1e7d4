from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from emotrain.observers.board import Board
from emotrain.observers.dashboard import Dashboard, can_show, make_console
from emotrain.observers.layout import compose
from emotrain.observers.screen import STYLES, Screen, StrayLines, to_plain, to_text
from emotrain.observers.summary import summarise
from emotrain.train.events import (
    Event,
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
SIZES = [(80, 24), (200, 50), (40, 12), (120, 32), (60, 17), (400, 120), (24, 6), (61, 200)]
HOSTILE = "\x1b[2J\x07[bold]x[/] \u202eأهلا\u2066 日本語の名前" + "a\u0301" * 40 + "\n\ud800" * 9


def a_run(make_start: MakeStart, make_step: MakeStep, text: str, steps: int) -> Iterator[Event]:
    path = Path("runs") / (text.replace("/", "") * 4)
    yield Phase(text)
    yield make_start(name=text, run_dir=path, device=text, facts=((text, text), ("trigger", text)))
    for done in range(4):
        yield Phase(text + "2", done, 3)
    for step in range(1, steps + 1):
        yield make_step(step, observed_loss=0.4, memory_gib=1.25, skipped=2, ready=True)
        if step % 5 == 0:
            yield ValidationEnd(step, 0.6, -0.1, 1.5, 0.01, 5, 0.6)
    yield SamplesDrawn(steps, (path,), (text,), path / "sheet.png")
    yield Saved(steps, path / "step", best=True)
    yield Notice(text)
    yield Notice("a plain note", "info")


def the_end(text: str = "it had learned enough", lora: Path | None = Path("x.safetensors")) -> RunEnd:
    return RunEnd(12, "signal", text, lora, 10, 0.61, 93.0, resume_command=None)


@pytest.fixture
def board(clock: Callable[[], float]) -> Board:
    return Board(clock)


@pytest.mark.parametrize("ascii", [False, True])
@pytest.mark.parametrize("text", ["mika", HOSTILE])
@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_no_line_wraps_and_the_emotion_is_visible_at_any_size(
    board: Board,
    make_start: MakeStart,
    make_step: MakeStep,
    columns: int,
    rows: int,
    text: str,
    ascii: bool,
) -> None:
    for event in a_run(make_start, make_step, text, 12):
        board.note(event)
        frame = to_plain(compose(board, columns, rows, ascii=ascii))
        assert len(frame) <= rows - 1
        assert all(cell_len(line) <= columns - 1 for line in frame)
        assert all(line.isprintable() for line in frame)
        assert not ascii or all(line.isascii() for line in frame)
    shown = "\n".join(frame)
    for word in ("loss", "scalar", "trust", "emoPulse"):
        assert word in shown
    for figure in (f"{0.5 + 1 / 12:.4f}", "-0.1000", "+0.8000", "1.20e-03"):
        assert figure in shown


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 50)])
def test_everything_a_run_is_watched_for_is_on_the_screen(
    board: Board, make_start: MakeStart, make_step: MakeStep, columns: int, rows: int
) -> None:
    for event in a_run(make_start, make_step, "mika", 12):
        board.note(event)
    shown = "\n".join(to_plain(compose(board, columns, rows)))
    wanted = (
        "mika", "step 12/400", "epoch 1.50", "5.00 it/s", "ETA ", "smoothed", "observed 0.4000",
        "validation", "best 0.6000 at step 5", "stop", "50%", "ready", "sheet.png", "warning", "◆",
        "memory 1.25 GiB", "2 skipped",
    )  # fmt: skip
    for word in wanted:
        assert word in shown, word


@pytest.mark.parametrize("size", range(1, 12))
def test_terminals_of_no_use_do_not_break_it(
    board: Board, make_start: MakeStart, make_step: MakeStep, size: int
) -> None:
    for event in a_run(make_start, make_step, "mika", 3):
        board.note(event)
        frame = to_plain(compose(board, size, size))
        assert len(frame) <= max(1, size - 1)
        assert all(cell_len(line) <= max(1, size - 1) for line in frame)


def test_phases_show_before_the_first_step_with_the_rest_of_their_time(
    board: Board, make_start: MakeStart, clock: Callable[[], float]
) -> None:
    board.note(Phase("load the model"))
    clock.tick(4.0)  # type: ignore[attr-defined]
    board.note(make_start())
    board.note(Phase("cache latents", 0, 32))
    clock.tick(2.0)  # type: ignore[attr-defined]
    board.note(Phase("cache latents", 8, 32))
    shown = "\n".join(to_plain(compose(board, 80, 24)))
    assert "✓ load the model" in shown
    assert "0:04" in shown
    assert "cache latents 8/32" in shown
    assert "ETA 0:06" in shown
    assert "192 modules, 6.78 M parameters" in shown


def test_a_long_run_takes_no_more_memory_than_a_short_one(
    board: Board, make_start: MakeStart, make_step: MakeStep
) -> None:
    import tracemalloc

    board.note(make_start(max_steps=40_000))
    tracemalloc.start()
    for step in range(1, 20_001):
        board.note(make_step(step))
        if step % 10 == 0:
            board.note(ValidationEnd(step, 0.6, 0.1, 1.5, None, step, 0.6))
            board.note(Notice(f"note {step}"))
            board.note(Phase(f"draw {step}", 1, 1))
        if step == 3_000:
            early = tracemalloc.get_traced_memory()[0]
    late = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert late - early < 50_000
    assert board.loss.num_values == 20_000


def test_the_eta_is_a_range_that_pauses_only_lengthen_at_its_late_end(
    board: Board, make_start: MakeStart, make_step: MakeStep, clock: Callable[[], float]
) -> None:
    board.note(make_start(max_steps=1000))
    for step in range(1, 101):
        clock.tick(0.2 if step % 10 else 2.2)  # type: ignore[attr-defined]  # saves and samples
        board.note(make_step(step, step_s=0.2))
    assert board.pace.step_s == 0.2
    low, high = board.pace.remaining_s() or (0.0, 0.0)
    assert low == pytest.approx(180.0)
    assert high == pytest.approx(360.0, rel=0.02)
    board.note(make_step(101, step_s=0.2, expected_end=(301, 501)))
    low, high = board.pace.remaining_s() or (0.0, 0.0)
    assert low == pytest.approx(40.0)
    assert high == pytest.approx(160.0, rel=0.02)


def test_the_summary_says_why_and_where_and_loses_no_part_of_a_path(
    board: Board, make_start: MakeStart, make_step: MakeStep
) -> None:
    for event in a_run(make_start, make_step, "mika", 12):
        board.note(event)
    lora = Path("/data") / ("y" * 150) / "lora.safetensors"
    board.note(the_end(lora=lora))
    lines = to_plain(summarise(board, 80))
    assert len(lines) <= 23
    assert all(cell_len(line) <= 79 for line in lines)
    assert "it had learned enough" in "\n".join(lines)
    assert str(lora) in "".join(line[10:].rstrip() for line in lines)
    assert "step 10, loss 0.6100" in "\n".join(lines)


@pytest.mark.parametrize("reason", ["signal", "max_steps", "interrupted", "diverged", "new one"])
def test_every_end_has_a_summary(board: Board, make_start: MakeStart, reason: str) -> None:
    board.note(make_start(name=HOSTILE))
    board.note(RunEnd(0, reason, HOSTILE, None, None, None, 1.0, resume_command="emotrain resume x"))
    shown = to_plain(summarise(board, 60, ascii=True))
    assert all(line.isascii() and len(line) <= 59 for line in shown)
    assert "emotrain resume x" in "\n".join(shown)


class Terminal:
    """As much of a terminal as a frame needs: cursor, clearing, wrapping, and folding when it narrows."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[str] = [""]
        self.top = self.y = self.x = 0
        self.wraps = True
        self.wrapped = 0
        self.modes: dict[str, bool] = {}

    def resize(self, columns: int, rows: int) -> None:
        if columns < self.columns:
            folded: list[str] = []
            for line in self.lines:
                parts = [line[i : i + columns] for i in range(0, len(line), columns)] or [""]
                folded.extend(parts)
            below = len(self.lines) - 1 - self.y
            self.lines = folded
            self.y = len(folded) - 1 - below
        self.columns, self.rows = columns, rows
        self.top = max(0, len(self.lines) - rows)  # growing pulls lines out of the history
        self.y = max(self.top, min(self.y, len(self.lines) - 1))

    def feed(self, text: str) -> None:
        i = 0
        while i < len(text):
            if text[i] == "\x1b":
                assert text[i + 1] == "["
                end = i + 2
                while not text[end].isalpha():
                    end += 1
                self.control(text[i + 2 : end], text[end])
                i = end + 1
                continue
            self.put(text[i])
            i += 1

    def control(self, argument: str, kind: str) -> None:
        if kind == "A":
            self.y = max(self.top, self.y - int(argument))
        elif kind == "H":
            self.y, self.x = self.top, 0
        elif kind == "J":
            self.lines = self.lines[: self.y + 1]
            self.lines[self.y] = self.lines[self.y][: self.x]
        elif kind == "K":
            self.lines[self.y] = self.lines[self.y][: self.x]
        elif kind in "hl" and argument.startswith("?"):
            self.modes[argument] = kind == "h"
            if argument == "?7":
                self.wraps = kind == "h"
        else:
            assert kind == "m", (argument, kind)

    def put(self, char: str) -> None:
        if char == "\r":
            self.x = 0
        elif char == "\n":
            self.y += 1
            if self.y == len(self.lines):
                self.lines.append("")
            self.top = max(self.top, self.y - self.rows + 1)
        else:
            assert char.isprintable()
            if self.x >= self.columns:
                self.wrapped += 1
                if not self.wraps:
                    return
            line = self.lines[self.y].ljust(self.x)
            self.lines[self.y] = line[: self.x] + char + line[self.x + 1 :]
            self.x += 1

    def visible(self) -> list[str]:
        return [line.rstrip() for line in self.lines[self.top :]]


class TerminalFile(io.StringIO):
    """A console's file that feeds a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self.terminal = terminal

    def write(self, text: str) -> int:
        self.terminal.feed(text)
        return len(text)


def screen_on(terminal: Terminal) -> tuple[Screen, Console]:
    console = Console(
        file=TerminalFile(terminal),
        force_terminal=True,
        color_system="256",
        width=terminal.columns,
        height=terminal.rows,
        _environ={},
    )
    return Screen(console), console


def test_a_frame_stands_in_place_while_it_changes_and_while_the_terminal_is_resized(
    board: Board, make_start: MakeStart, make_step: MakeStep
) -> None:
    terminal = Terminal(80, 24)
    terminal.feed("$ emotrain run x\r\n")
    screen, console = screen_on(terminal)
    sizes = [(80, 24), (80, 24), (60, 20), (200, 50), (199, 50), (40, 12), (41, 13), (80, 24)]
    rng = random.Random(3)
    sizes += [(rng.randint(20, 220), rng.randint(6, 60)) for _ in range(60)]
    steps = iter(range(1, 1000))
    board.note(make_start())
    for size in sizes:
        terminal.resize(*size)
        console.size = (size[0], size[1])  # type: ignore[assignment]
        for _ in range(2):
            board.note(make_step(next(steps)))
            frame = compose(board, *size)
            screen.draw(frame, size)
            wanted = [line.rstrip() for line in to_plain(frame)]
            assert terminal.visible()[-len(wanted) - 1 :] == [*wanted, ""]
            assert not any("emoPulse" in line for line in terminal.visible()[: -len(wanted) - 1])
    assert terminal.wrapped == 0


def test_only_lines_that_changed_are_sent() -> None:
    file = io.StringIO()
    screen = Screen(Console(file=file, force_terminal=True, width=80, height=24, _environ={}))
    screen.draw([[("same", "")], [("first", "")]], (80, 24))
    file.seek(0)
    file.truncate()
    screen.draw([[("same", "")], [("second", "")]], (80, 24))
    assert "second" in file.getvalue()
    assert "same" not in file.getvalue()


def test_between_two_frames_the_terminal_is_as_it_was(board: Board, make_start: MakeStart, make_step: MakeStep) -> None:
    terminal = Terminal(80, 24)
    screen, _ = screen_on(terminal)
    board.note(make_start())
    board.note(make_step(1))
    screen.draw(compose(board, 80, 24), (80, 24))
    assert terminal.modes == {"?2026": False, "?25": True, "?7": True}


def test_lines_of_others_go_above_the_frame() -> None:
    terminal = Terminal(80, 24)
    screen, _ = screen_on(terminal)
    real = io.StringIO()
    screen.draw([[("frame", "title")]], (80, 24))
    stray = StrayLines(screen, real)
    stray.write("half")
    assert terminal.visible() == ["frame", ""]
    stray.write(" a line\n 10%\r 55%\r100% done\nrest \x1b[2J")
    assert terminal.visible() == ["half a line", "100% done", "frame", ""]
    assert not stray.isatty()
    stray.release()
    assert terminal.visible() == ["half a line", "100% done", "rest [2J", "frame", ""]
    stray.write("later\n")
    assert real.getvalue() == "later\n"


def test_a_long_line_of_others_is_broken_and_not_cut() -> None:
    terminal = Terminal(40, 12)
    screen, _ = screen_on(terminal)
    screen.draw([[("frame", "title")]], (40, 12))
    stray = StrayLines(screen, io.StringIO())
    stray.write("word " * 20 + "\n" + "x" * 100_000 + "\n")
    shown = [line.rstrip() for line in terminal.lines]
    assert " ".join(shown[:3]) == "word " * 19 + "word"
    assert len(shown) < 20
    assert terminal.wrapped == 0


def test_a_dashboard_takes_stderr_and_gives_it_back(
    make_start: MakeStart, make_step: MakeStep, clock: Callable[[], float]
) -> None:
    terminal = Terminal(80, 24)
    _, console = screen_on(terminal)
    before = sys.stderr
    dashboard = Dashboard(console, clock=clock, thread=False)
    dashboard.handle(make_start())
    dashboard.handle(make_step(1))
    dashboard.refresh()
    print("a library speaks", file=sys.stderr)
    assert terminal.lines[0] == "a library speaks"
    assert terminal.visible()[0].startswith("emotrain mika")
    dashboard.handle(the_end())
    dashboard.close()
    dashboard.close()
    assert sys.stderr is before
    shown = [line.rstrip() for line in terminal.lines]
    assert shown[0] == "a library speaks"
    assert shown[1] == "emotrain mika stopped automatically"
    assert "x.safetensors" in "\n".join(shown)
    assert terminal.modes["?25"]


def test_without_an_end_the_last_frame_stays(
    make_start: MakeStart, make_step: MakeStep, clock: Callable[[], float]
) -> None:
    terminal = Terminal(80, 24)
    _, console = screen_on(terminal)
    dashboard = Dashboard(console, clock=clock, thread=False, capture_stderr=False)
    dashboard.handle(make_start())
    dashboard.handle(make_step(7))
    dashboard.close()
    assert "step 7/400" in "\n".join(terminal.visible())
    dashboard.refresh()


def test_a_run_that_fails_before_its_first_step_leaves_only_its_notices(
    make_start: MakeStart, clock: Callable[[], float]
) -> None:
    terminal = Terminal(80, 24)
    terminal.feed("$ emotrain run x\r\n")
    _, console = screen_on(terminal)
    dashboard = Dashboard(console, clock=clock, thread=False, capture_stderr=False)
    dashboard.handle(Phase("loading the model"))
    dashboard.handle(Notice("the folder has 2 files that are no pictures"))
    dashboard.refresh()
    dashboard.close()
    assert [line.rstrip() for line in terminal.lines] == [
        "$ emotrain run x",
        "warning  the folder has 2 files that are no pictures",
        "",
    ]


def test_the_thread_draws_by_itself_and_follows_the_size(make_start: MakeStart, make_step: MakeStep) -> None:
    terminal = Terminal(80, 24)
    _, console = screen_on(terminal)
    dashboard = Dashboard(console, capture_stderr=False)
    try:
        dashboard.handle(make_start())
        dashboard.handle(make_step(5))
        wait_for(lambda: "step 5/400" in "\n".join(terminal.visible()))
        terminal.resize(200, 50)
        console.size = (200, 50)  # type: ignore[assignment]
        wait_for(lambda: any(len(line) > 150 for line in terminal.visible()))
    finally:
        dashboard.close()
    assert not any(thread.name == "dashboard" for thread in threading.enumerate())


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_terminal_that_is_gone_or_stopped_does_not_hold_up_the_training(
    make_start: MakeStart, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()  # nobody reads: as after Ctrl-S the writer blocks when it is full
    monkeypatch.setattr("emotrain.observers.screen.PATIENCE_S", 0.05)
    with contextlib.suppress(BrokenPipeError), os.fdopen(write, "w", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=True, width=200, height=50, _environ={})
        dashboard = Dashboard(console, capture_stderr=False)
        monkeypatch.setattr("emotrain.observers.dashboard.FASTEST_S", 0.0)
        monkeypatch.setattr("emotrain.observers.dashboard.SHARE", 1e9)
        dashboard.handle(make_start())
        began = time.monotonic()
        slowest = 0.0
        step = 0
        while time.monotonic() - began < 0.7:
            step += 1
            before = time.monotonic()
            dashboard.handle(make_step(step))
            slowest = max(slowest, time.monotonic() - before)
            time.sleep(0.001)
        assert slowest < 0.5
        dashboard.handle(the_end())
        dashboard.close()
        os.close(read)  # the blocked writer gets a broken pipe and goes silent
        time.sleep(0.1)


def test_watching_uses_no_random_numbers(make_start: MakeStart, make_step: MakeStep, board: Board) -> None:
    import numpy as np

    state = random.getstate()
    numpy_state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    for event in a_run(make_start, make_step, "mika", 12):
        board.note(event)
        compose(board, 80, 24)
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[index, union-attr]


def test_no_color_means_no_colour_but_still_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = io.StringIO()
    console = make_console(file, {"NO_COLOR": "1", "TERM": "xterm-256color"})
    line = [("x", style) for style in STYLES]
    encoded = Screen(console).encode(line)
    codes = {part.split("m")[0] for part in encoded.split("\x1b[")[1:]}
    assert codes <= {"0", "1", "2", "4"}
    console = make_console(file, {"TERM": "xterm-256color"})
    coloured = Screen(console).encode(line)
    assert "\x1b[33m" in coloured or "\x1b[93m" in coloured or "33" in coloured


class Latin(io.StringIO):
    encoding = "iso-8859-1"


def test_terminals_without_utf8_get_ascii(make_start: MakeStart, make_step: MakeStep) -> None:
    file = Latin()
    console = make_console(file, {"TERM": "xterm"})
    assert not can_show(console)
    assert can_show(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="UTF-8")))
    dashboard = Dashboard(console, thread=False, capture_stderr=False)
    for event in a_run(make_start, make_step, HOSTILE, 5):
        dashboard.handle(event)
        dashboard.refresh()
    dashboard.handle(the_end(HOSTILE))
    dashboard.close()
    assert file.getvalue().isascii()
    assert "emoPulse" in file.getvalue()


def test_a_frame_becomes_a_picture(board: Board, make_start: MakeStart, make_step: MakeStep) -> None:
    for event in a_run(make_start, make_step, "mika [bold]", 12):
        board.note(event)
    console = Console(record=True, file=io.StringIO(), width=120, height=32, _environ={})
    console.print(to_text(compose(board, 120, 32)))
    svg = console.export_svg(title="x")
    for word in ("emoPulse", "scalar", "trust", "[bold]"):
        assert word in svg
