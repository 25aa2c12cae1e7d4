from __future__ import annotations

import contextlib
import io
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style

from emotrain.observers import dashboard as module
from emotrain.observers.board import Board
from emotrain.observers.dashboard import Dashboard, StrayLines, make_console
from emotrain.observers.dashboard import Terminal as Pen
from emotrain.observers.frame import EMOTION, STYLES, compose, print_summary
from emotrain.pulse.signal import Reading
from emotrain.train.events import (
    Event,
    LikenessMeasured,
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
SIZES = [(80, 24), (120, 40), (200, 50), (40, 12), (60, 17), (400, 120), (24, 6), (61, 200)]
HOSTILE = "\x1b[2J\x07[bold]x[/] \u202eأهلا\u2066 日本語の名前" + "a\u0301" * 40 + "\n\ud800" * 9
FORECAST = "1 of 2 validations without improvement; ends at step 310 to 380 if the next is no better"

COMPARISON = "worse than step 5 by 0.2% of the gain, plus or minus 0.4%; the chance of an improvement of 0.5% is 7%"


def a_run(make_start: MakeStart, make_step: MakeStep, text: str, steps: int) -> Iterator[Event]:
    path = Path("runs") / (text.replace("/", "") * 4)
    yield Phase(text)
    yield make_start(
        name=text, run_dir=path, device=text, device_memory_gib=24.0, facts=((text, text), ("trigger", text))
    )
    for done in range(4):
        yield Phase(text + "2", done, 3)
    for step in range(1, steps + 1):
        yield make_step(step, observed_loss=0.4, memory_gib=1.25, skipped=2, ready=True)
        if step % 5 == 0:
            yield ValidationEnd(step, 0.6, -0.1, 1.5, 0.01, 5, 0.6, FORECAST, comparison=COMPARISON)
    yield SamplesDrawn(steps, (path,), (text,), path / "sheet.png")
    yield LikenessMeasured(steps, 0.7, 0.41, 0.78)
    yield Saved(steps, path / "step", best=True)
    yield Notice(text)
    yield Notice("a plain note", "info")


def the_end(text: str = "it had learned enough", lora: Path | None = Path("x.safetensors")) -> RunEnd:
    return RunEnd(12, "signal", text, lora, 10, 0.61, 93.0, resume_command=None, report=Path("report.html"))


def frame_of(board: Board, columns: int, rows: int, *, encoding: str = "utf-8") -> list[str]:
    """The lines of a frame as they would stand on a terminal of that size."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = make_console(stream, {"TERM": "xterm"}, width=columns, height=rows)
    return ["".join(segment.text for segment in line).rstrip() for line in compose(board, console)]


def summary_of(board: Board, columns: int = 80) -> list[str]:
    assert board.end is not None
    stream = io.StringIO()
    console = make_console(stream, {"TERM": "xterm", "NO_COLOR": "1"}, width=columns, height=24)
    print_summary(console, board, board.end)
    return re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()


@pytest.fixture
def board(clock: Callable[[], float]) -> Board:
    return Board(clock)


@pytest.mark.parametrize(
    ("columns", "rows", "text", "encoding"),
    [
        *((*size, HOSTILE, "utf-8") for size in SIZES),
        *((*size, text, code) for size in SIZES[:4] for text, code in (("mika", "utf-8"), (HOSTILE, "ascii"))),
    ],
)
def test_no_line_wraps_and_nothing_moves_the_cursor_at_any_size(
    board: Board, make_start: MakeStart, make_step: MakeStep, columns: int, rows: int, text: str, encoding: str
) -> None:
    for event in a_run(make_start, make_step, text, 6):
        board.note(event)
        frame = frame_of(board, columns, rows, encoding=encoding)
        assert len(frame) <= rows - 1
        assert all(cell_len(line) <= columns for line in frame)
        assert all(line.isprintable() for line in frame)


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40), (200, 50), (60, 30)])
def test_what_the_user_asks_comes_first_and_the_emotion_has_a_third(
    board: Board, make_start: MakeStart, make_step: MakeStep, columns: int, rows: int
) -> None:
    for event in a_run(make_start, make_step, "mika", 12):
        board.note(event)
    frame = frame_of(board, columns, rows)
    shown = " ".join(" ".join(frame).split())
    wanted = (
        "mika", "step 12", "epoch 1.5", "0.6000 at step 10, best 0.6000 at 5 (-60%), base model 1.5000",
        FORECAST, "5.00 it/s", "left", "1.25 GiB peak of 24.0", "2 steps skipped",
        "0.7000 (base model 0.4100, pictures among themselves 0.7800)", "sheet.png", "warning mika", "◆",
    )  # fmt: skip
    for word in wanted:
        assert word in shown, word
    for (label, _), figure in zip(EMOTION, (f"{0.5 + 1 / 12:.4f}", "-0.1000", "+0.8000", "1.20e-03"), strict=True):
        (row,) = [row for row, line in enumerate(frame) if re.search(rf"(^|\s){label} +{re.escape(figure)}", line)]
        assert row > max(at for at, line in enumerate(frame) if "GiB" in line or line.startswith("warning"))
    wide = columns >= 110
    emotion = [line for line in frame if any(re.search(rf"(^|\s){label} ", line) for label, _ in EMOTION)]
    cells = len(frame) * columns
    taken = (columns / 3) * (len(frame) - 9) if wide else (2 if rows > 42 else 1) * len(emotion) * columns
    assert taken <= cells / 3 + columns
    assert any(re.match(r" {8}.*step 12\b", line) for line in frame)  # the axis


def test_a_forecast_and_a_warning_are_never_cut(board: Board, make_start: MakeStart, make_step: MakeStep) -> None:
    words = "captions that match no picture: a.png, b.png, c.png; see `emotrain images '/data/my runs/mika_v12'`"
    for event in a_run(make_start, make_step, "mika", 12):
        board.note(event)
    for notice in (words, words * 3):
        board.note(Notice(notice))
        for columns, rows in ((80, 24), (100, 30), (120, 40), (200, 50)):
            shown = "".join("".join(frame_of(board, columns, rows)).split())
            assert notice.replace(" ", "") in shown
            assert FORECAST.replace(" ", "") in shown
            assert COMPARISON.replace(" ", "") in shown
            assert "step12" in shown


@pytest.mark.parametrize("size", range(1, 12))
def test_terminals_of_no_use_do_not_break_it(
    board: Board, make_start: MakeStart, make_step: MakeStep, size: int
) -> None:
    for event in a_run(make_start, make_step, "mika", 3):
        board.note(event)
        frame = frame_of(board, size, size)
        assert len(frame) <= max(1, size - 1)
        assert all(cell_len(line) <= max(1, size) for line in frame)


def test_phases_show_before_the_first_step_with_the_rest_of_their_time(
    board: Board, make_start: MakeStart, clock: Callable[[], float]
) -> None:
    board.note(Phase("load the model"))
    clock.tick(4.0)  # type: ignore[attr-defined]
    board.note(make_start())
    board.note(Phase("cache latents", 0, 32))
    clock.tick(2.0)  # type: ignore[attr-defined]
    board.note(Phase("cache latents", 8, 32))
    shown = "\n".join(frame_of(board, 80, 24))
    assert re.search(r"✓ load the model +━+ +0:04", shown)
    assert re.search(r"  cache latents +━+.* 8/32 0:02  0:06 left", shown)
    assert "192 modules, 6.78 M parameters" in shown


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e300, -1e-300])
def test_any_number_can_be_shown(board: Board, make_start: MakeStart, make_step: MakeStep, value: float) -> None:
    board.note(make_start(max_steps=3, steps_per_epoch=value))
    reading = Reading(*[value] * 9)
    names = ("epoch", "loss", "observed_loss", "grad_norm", "lr", "step_s", "stop_meter", "memory_gib", "gain")
    for step in (1, 2, 3, 4):
        board.note(make_step(step, reading=reading, **dict.fromkeys(names, value)))
        board.note(ValidationEnd(step, value, value, value, value, step, value))
    board.note(RunEnd(4, "diverged", "x", None, 4, value, value))
    for columns, rows in SIZES:
        assert frame_of(board, columns, rows)
    assert summary_of(board)


def test_a_long_run_takes_no_more_memory_than_a_short_one(
    board: Board, make_start: MakeStart, make_step: MakeStep
) -> None:
    import tracemalloc

    board.note(make_start(max_steps=40_000))
    tracemalloc.start()
    for step in range(1, 4_001):
        board.note(make_step(step))
        if step % 10 == 0:
            board.note(ValidationEnd(step, 0.6, 0.1, 1.5, None, step, 0.6))
            board.note(Notice(f"note {step}"))
            board.note(Phase(f"draw {step}", 1, 1))
        if step == 2_000:
            early = tracemalloc.get_traced_memory()[0]
    late = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert late - early < 50_000
    assert board.traces["loss"].num_values == 4_000


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


def test_a_phase_has_a_line_once_it_takes_longer_than_a_second(
    board: Board, make_start: MakeStart, make_step: MakeStep, clock: Callable[[], float]
) -> None:
    board.note(make_start())
    board.note(make_step(1))
    board.note(Phase("validating", 0, 16))
    assert "validating" not in "\n".join(frame_of(board, 80, 24))
    clock.tick(2.0)  # type: ignore[attr-defined]
    board.note(Phase("validating", 4, 16))
    assert re.match(r"  validating +━+.* 4/16 0:02  0:06 left", frame_of(board, 80, 24)[2])
    board.note(Phase("validating", 16, 16))
    assert "validating" not in "\n".join(frame_of(board, 80, 24))


def test_the_summary_names_the_files_on_lines_of_their_own(
    board: Board, make_start: MakeStart, make_step: MakeStep
) -> None:
    for event in a_run(make_start, make_step, "mika", 12):
        board.note(event)
    lora = Path("/data") / ("y" * 150) / "lora.safetensors"
    command = "emotrain run /data/" + "x" * 80 + "/preset.yaml --name again --set validate.fraction=0"
    board.note(replace(the_end("it had learned enough, " * 9, lora), all_command=command))
    lines = summary_of(board)
    assert len(lines) <= 20
    assert not any(line.endswith("  ") for line in lines)  # they become empty lines where a terminal is narrowed
    lines = [line.rstrip() for line in lines]
    assert " ".join(lines[1:4]).strip() == ("it had learned enough, " * 9).strip()
    paths = ("LoRA ", "samples ", "run ", "diffusers ", "emotrain run ")
    assert all(len(line) <= 80 or line.startswith(paths) for line in lines)
    assert command in lines
    assert f"LoRA       {lora}" in lines
    assert "report     report.html" in lines
    assert "best       step 10, validation loss 0.6100, 1.5000 without the LoRA" in lines


@pytest.mark.parametrize("reason", ["signal", "max_steps", "interrupted", "diverged", "new one"])
def test_every_end_has_a_summary(board: Board, make_start: MakeStart, reason: str) -> None:
    board.note(make_start(name=HOSTILE))
    board.note(RunEnd(0, reason, HOSTILE, None, None, None, 1.0, resume_command="emotrain resume x"))
    shown = summary_of(board)
    assert all(line.isprintable() for line in shown)
    assert "resume     emotrain resume x" in shown


class Terminal:
    """As much of a terminal as a frame needs: cursor, clearing, wrapping, the alternate screen, and folding."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[str] = [""]
        self.top = self.y = self.x = 0
        self.wraps = True
        self.wrapped = 0
        self.modes: dict[str, bool] = {}
        self.main: tuple[list[str], int, int, int] | None = None  # while the alternate screen is shown

    def resize(self, columns: int, rows: int) -> None:
        if self.main is not None:  # its lines are cut, and nothing is pushed into the history
            self.lines = [line[:columns] for line in self.lines[:rows]]
            self.y, self.x = min(self.y, rows - 1), min(self.x, columns)
        elif columns < self.columns:
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
            at = 0 if argument == "2" else min(self.x, self.columns - 1)  # behind a full line it waits on its last sign
            self.lines[self.y] = self.lines[self.y][:at]
        elif kind in "hl" and argument.startswith("?"):
            self.modes[argument] = kind == "h"
            if argument == "?1049" and kind == "h" and self.main is None:
                self.main = self.lines, self.top, self.y, self.x
                self.lines, self.top, self.y, self.x = [""], 0, 0, 0
            elif argument == "?1049" and kind == "l" and self.main is not None:
                (self.lines, self.top, self.y, self.x), self.main = self.main, None
            if argument == "?7":
                self.wraps = kind == "h"
        else:
            assert kind == "m", (argument, kind)

    def put(self, char: str) -> None:
        if char == "\r":
            self.x = 0
        elif char == "\n":
            self.y += 1
            self.x = 0  # as the terminal's line discipline has it
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


def console_on(terminal: Terminal) -> Console:
    size = {"width": terminal.columns, "height": terminal.rows}
    return make_console(TerminalFile(terminal), {"TERM": "xterm-256color"}, **size)


def dashboard_on(terminal: Terminal, clock: Callable[[], float] = time.monotonic, **words: bool) -> Dashboard:
    settings = {"thread": False, "capture_stderr": False, **words}
    return Dashboard(console_on(terminal), clock=clock, **settings)


def frame_lines(dashboard: Dashboard) -> list[str]:
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", dashboard._picture()).splitlines()]


def test_a_frame_stands_in_place_while_the_terminal_is_resized_and_leaves_nothing_in_its_history(
    make_start: MakeStart, make_step: MakeStep, clock: Callable[[], float]
) -> None:
    terminal = Terminal(80, 24)
    terminal.feed("$ emotrain run x\r\n")
    dashboard = dashboard_on(terminal, clock)
    sizes = [(80, 24), (80, 24), (60, 20), (200, 50), (199, 50), (40, 12), (41, 13), (80, 24)]
    rng = random.Random(3)
    sizes += [(rng.randint(20, 220), rng.randint(6, 60)) for _ in range(60)]
    steps = iter(range(1, 1000))
    dashboard.handle(make_start())
    for size in sizes:
        terminal.resize(*size)
        dashboard._console.size = size  # type: ignore[assignment]
        for _ in range(2):
            step = next(steps)
            dashboard.handle(make_step(step))
            dashboard.refresh()
            shown = terminal.visible()
            assert [line.split()[1] for line in shown if line.startswith("step ")] == [str(step)]
            assert len(shown) <= size[1]
            assert terminal.top == 0  # nothing has scrolled
            lines = [line for line in frame_lines(dashboard) if line]
            assert [line for line in shown if line] == lines
    assert terminal.wrapped == 0
    dashboard._terminal.leave()
    assert terminal.lines == ["$ emotrain run x", ""]


def test_between_two_frames_only_the_alternate_screen_is_left(make_start: MakeStart, make_step: MakeStep) -> None:
    terminal = Terminal(80, 24)
    dashboard = dashboard_on(terminal)
    dashboard.handle(make_start())
    dashboard.handle(make_step(1))
    dashboard.refresh()
    assert terminal.modes == {"?2026": False, "?25": True, "?7": True, "?1049": True}
    dashboard.close()
    assert terminal.modes == {"?2026": False, "?25": True, "?7": True, "?1049": False}


def test_a_slow_connection_is_sent_a_bounded_number_of_bytes(
    make_start: MakeStart, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BYTES_PER_S", 20_000)
    stream = io.StringIO()
    console = make_console(stream, {"TERM": "xterm"}, width=200, height=50)
    dashboard = Dashboard(console, capture_stderr=False)
    dashboard.handle(make_start())
    began = time.monotonic()
    for step in range(1, 400):
        dashboard.handle(make_step(step))
        time.sleep(0.005)
    took = time.monotonic() - began
    dashboard._closed = True
    assert dashboard._thread is not None
    dashboard._thread.join()
    frame = len("".join(frame_of(dashboard._board, 200, 50)).encode()) * 2 + 5_000
    assert 10_000 < len(stream.getvalue().encode()) < 20_000 * took + frame


def test_lines_of_others_stay_on_the_main_screen_and_the_frame_comes_back(
    make_start: MakeStart, make_step: MakeStep
) -> None:
    terminal = Terminal(80, 24)
    dashboard, real = dashboard_on(terminal), io.StringIO()
    dashboard.handle(make_start())
    dashboard.refresh()
    frame = terminal.visible()
    stray = StrayLines(dashboard._console, real)
    stray.write("half")
    stray.flush()
    assert terminal.visible() == frame
    stray.write(" a line\n 10%\r 55%\r100% done\nrest \x1b[2J" + "word " * 30)
    assert terminal.visible() == frame
    assert not stray.isatty()
    stray.release()
    dashboard._terminal.leave()
    shown = terminal.visible()
    assert shown[:2] == ["half a line", "100% done"]
    assert shown[2].startswith("rest word word")
    assert " ".join(shown[2:]).count("word") == 30
    assert terminal.wrapped == 0


def test_a_dashboard_takes_stderr_and_gives_it_back(
    make_start: MakeStart, make_step: MakeStep, clock: Callable[[], float]
) -> None:
    terminal = Terminal(80, 24)
    before = sys.stderr
    dashboard = dashboard_on(terminal, clock, capture_stderr=True)
    dashboard.handle(make_start())
    dashboard.handle(make_step(1))
    dashboard.refresh()
    print("a library speaks", file=sys.stderr)
    assert terminal.main is not None
    assert terminal.main[0][0] == "a library speaks"
    assert terminal.lines[0].startswith("emotrain mika")
    dashboard.handle(the_end())
    dashboard.close()
    dashboard.close()
    assert sys.stderr is before
    shown = [line.rstrip() for line in terminal.lines]
    assert shown[:2] == ["a library speaks", "mika: stopped automatically"]
    assert "LoRA       x.safetensors" in shown
    assert terminal.modes["?25"]


def test_without_an_end_the_last_frame_stays(make_start: MakeStart, make_step: MakeStep) -> None:
    terminal = Terminal(80, 24)
    dashboard = dashboard_on(terminal)
    dashboard.handle(make_start())
    dashboard.handle(make_step(7))
    dashboard.refresh()
    dashboard.close()
    assert terminal.main is None
    assert "step 7 of at most 400" in "\n".join(terminal.visible())


def test_a_run_that_fails_before_its_first_step_leaves_only_its_notices(make_start: MakeStart) -> None:
    terminal = Terminal(80, 24)
    terminal.feed("$ emotrain run x\r\n")
    dashboard = dashboard_on(terminal)
    dashboard.handle(Phase("loading the model"))
    dashboard.handle(Notice("the folder has 2 files that are no pictures"))
    dashboard.refresh()
    dashboard.close()
    assert [line.rstrip() for line in terminal.lines if line.strip()] == [
        "$ emotrain run x",
        "warning    the folder has 2 files that are no pictures",
    ]
    assert terminal.y == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no job control")
def test_ctrl_z_sigterm_and_quitting_at_once_give_the_terminal_back(
    make_start: MakeStart, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = signal.SIGTSTP, signal.SIGTERM
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    terminal = Terminal(80, 24)
    dashboard = dashboard_on(terminal)
    dashboard.handle(make_start())
    sent: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((number, terminal.main is None)))
    monkeypatch.setattr(Pen, "fileno", lambda self: 1)
    takes = [1]
    monkeypatch.setattr(module.select, "select", lambda *_: ([], takes, []))
    for number in numbers:
        dashboard.refresh()
        assert terminal.main is not None
        signal.raise_signal(number)
    assert sent == [(signal.SIGSTOP, True), (signal.SIGTERM, True)]
    dashboard.refresh()  # after `fg`
    takes = []  # after Ctrl-S
    dashboard.quit()
    assert terminal.main is not None
    takes = [1]
    dashboard.quit()
    assert terminal.main is None
    dashboard.close()
    assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL] * 2


def test_nothing_is_drawn_while_the_process_is_in_the_background(
    make_start: MakeStart, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = False
    monkeypatch.setattr(Pen, "ours", property(lambda self: ours))
    terminal = Terminal(80, 24)
    dashboard = dashboard_on(terminal, thread=True)
    try:
        dashboard.handle(make_start())
        dashboard.handle(make_step(5))
        time.sleep(0.2)
        assert terminal.main is None
        ours = True
        wait_for(lambda: "step 5 of at most 400" in "\n".join(terminal.visible()))
    finally:
        dashboard.close()


def luminance(red: int, green: int, blue: int) -> float:
    """Relative luminance, WCAG 2.2."""
    shares = (value / 255 for value in (red, green, blue))
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if "color" in style])
def test_every_colour_is_readable_on_a_dark_and_on_a_light_terminal(name: str) -> None:
    colour = Style.parse(STYLES[name]).color
    assert colour is not None
    light = luminance(*colour.get_truecolor())
    for ground in ((0, 0, 0), (255, 255, 255)):
        high, low = sorted((light, luminance(*ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3.75, ground  # 3 is asked for of graphics and large text


def test_a_first_ctrl_c_is_answered_in_the_frame(make_start: MakeStart, make_step: MakeStep) -> None:
    terminal = Terminal(80, 24)
    dashboard = dashboard_on(terminal)
    dashboard.handle(make_start())
    dashboard.handle(make_step(7))
    dashboard.refresh()
    terminal.feed("^C")  # the terminal echoes the key
    dashboard.stopping("SIGINT")
    dashboard.refresh()
    assert "stopping after this step; press Ctrl-C again to quit at once" in terminal.visible()
    assert [line[:13] for line in terminal.lines if "emotrain" in line or "^C" in line] == ["emotrain mika"]


def test_the_thread_draws_by_itself_and_follows_the_size(make_start: MakeStart, make_step: MakeStep) -> None:
    terminal = Terminal(80, 24)
    dashboard = dashboard_on(terminal, thread=True)
    try:
        dashboard.handle(make_start())
        dashboard.handle(make_step(5))
        wait_for(lambda: "step 5 of at most 400" in "\n".join(terminal.visible()))
        terminal.resize(200, 50)
        dashboard._console.size = (200, 50)  # type: ignore[assignment]
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
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    with contextlib.suppress(BrokenPipeError), os.fdopen(write, "w", encoding="utf-8") as file:
        for name, value in (("FASTEST_S", 0.0), ("SHARE", 1e9), ("BYTES_PER_S", 1e9)):
            monkeypatch.setattr(module, name, value)
        console = make_console(file, {"TERM": "xterm"}, width=200, height=50)
        dashboard = Dashboard(console, capture_stderr=False)
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


@pytest.mark.skipif(sys.platform != "linux", reason="pipes of a size that is asked for")
def test_a_slow_terminal_gets_its_last_frame_and_the_summary(
    make_start: MakeStart, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(module, "PATIENCE_S", 0.5)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    shown = bytearray()

    def reader() -> None:
        while piece := os.read(read, 512):
            shown.extend(piece)
            time.sleep(0.03)  # 17 kB a second

    thread = threading.Thread(target=reader)
    thread.start()
    with os.fdopen(write, "w", encoding="utf-8") as file:
        console = make_console(file, {"TERM": "xterm"}, width=200, height=50)
        dashboard = Dashboard(console, capture_stderr=False)
        dashboard.handle(make_start())
        for step in range(1, 30):
            dashboard.handle(make_step(step))
        while b" of at most" not in shown:
            time.sleep(0.01)
        dashboard.handle(the_end())
        dashboard.close()
    thread.join()
    os.close(read)
    assert "x.safetensors" in shown.decode().rpartition("emoPulse")[2]


def test_watching_uses_no_random_numbers(make_start: MakeStart, make_step: MakeStep, board: Board) -> None:
    import numpy as np

    state = random.getstate()
    numpy_state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    for event in a_run(make_start, make_step, "mika", 12):
        board.note(event)
        frame_of(board, 80, 24)
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[index, union-attr]


def test_no_color_means_no_colour_but_still_bold() -> None:
    for environ, coloured in (({"NO_COLOR": "1"}, False), ({}, True)):
        file = io.StringIO()
        console = make_console(file, {"TERM": "xterm-256color", **environ})
        for style in STYLES:
            console.print("x", style=style)
        codes = set(re.findall(r"\x1b\[([\d;]+)m", file.getvalue()))
        assert (codes <= {"0", "1", "2", "1;2"}) != coloured


class Latin(io.StringIO):
    encoding = "iso-8859-1"


def test_terminals_without_utf8_get_ascii(make_start: MakeStart, make_step: MakeStep) -> None:
    file = Latin()
    dashboard = Dashboard(
        make_console(file, {"TERM": "xterm"}, width=80, height=24), thread=False, capture_stderr=False
    )
    for event in a_run(make_start, make_step, HOSTILE, 5):
        dashboard.handle(event)
        dashboard.refresh()
    dashboard.handle(the_end(HOSTILE))
    dashboard.close()
    assert file.getvalue().isascii()
    assert "emoPulse" in file.getvalue()
