"""The live dashboard on a terminal: it takes note of events at once and draws in its own thread."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console

from emotrain.observers.board import Board
from emotrain.observers.layout import compose, notice_lines
from emotrain.observers.screen import Screen, StrayLines
from emotrain.observers.summary import summarise
from emotrain.train.events import Event

SHARE = 0.002  # of one core's time that drawing may take
FASTEST_S, SLOWEST_S = 0.125, 2.0
IDLE_S = 1.0  # clocks go on also when nothing happens
LOOK_S = 0.05  # how often the terminal is asked for its size


class Dashboard:
    """Shows a run on one screen.

    `handle` only writes figures down (microseconds). A thread draws up to 8 times a second, as
    often as it may within 0.2% of one core, and at once when the terminal has another size. A
    terminal that is stopped (Ctrl-S) or gone does not hold up the training. No random numbers are
    used.

    Args:
        console: the terminal (default: stderr). Whether it is one is the caller's question.
        clock: seconds of a steady clock.
        thread: draw by itself; otherwise only `refresh` draws.
        capture_stderr: lines that others write to `sys.stderr` go above the frame meanwhile.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        thread: bool = True,
        capture_stderr: bool = True,
    ) -> None:
        self._console = make_console(sys.stderr) if console is None else console
        self._board = Board(clock)
        self._screen = Screen(self._console)
        self._lock = threading.Lock()
        self._ascii = not can_show(self._console)
        self._closed = False
        self._changed = True
        self._stack = contextlib.ExitStack()
        if capture_stderr:
            stray = StrayLines(self._screen, sys.stderr)
            self._stack.callback(stray.release)
            self._stack.enter_context(contextlib.redirect_stderr(stray))
        self._thread: threading.Thread | None = None
        if thread:
            self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
            self._thread.start()

    def handle(self, event: Event) -> None:
        """Take note of one event; the next frame shows it."""
        with self._lock:
            self._board.note(event)
            self._changed = True

    def refresh(self) -> None:
        """Draw a frame now."""
        size = self._screen.size
        with self._lock:
            self._changed = False
            frame = compose(self._board, *size, ascii=self._ascii)
        self._screen.draw(frame, size)

    def close(self) -> None:
        """Stop drawing and leave the summary; without an end the last frame; before step 1 notices."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        self._stack.close()
        columns, rows = self._screen.size
        with self._lock:
            if self._board.end is not None:
                lines = summarise(self._board, columns, ascii=self._ascii)
            elif self._board.last is not None:
                lines = compose(self._board, columns, rows, ascii=self._ascii)
            else:  # it never came to a step: an error message follows
                lines = notice_lines(self._board, columns, ascii=self._ascii)
        self._screen.finish(lines)

    def _run(self) -> None:
        """Draw once the last drawing is paid for, and when the size is another one."""
        due, last, drawn = 0.0, 0.0, (0, 0)
        while not self._closed:
            now, size = time.monotonic(), self._screen.size
            news = self._changed or now >= last + IDLE_S
            if size != drawn or (news and now >= due):
                began = time.thread_time()
                self.refresh()
                cost = time.thread_time() - began
                last, drawn = now, size
                due = now + min(SLOWEST_S, max(FASTEST_S, cost / SHARE))
            time.sleep(LOOK_S)


def make_console(stream: TextIO, environ: Mapping[str, str] | None = None) -> Console:
    """A rich console for a stream that is a terminal."""
    return Console(file=stream, force_terminal=True, highlight=False, _environ=environ)


def can_show(console: Console) -> bool:
    """Whether block and braille characters can be shown: a UTF encoding."""
    return console.encoding.lower().replace("_", "-").startswith("utf")
