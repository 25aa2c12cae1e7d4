"""The live dashboard on a terminal: it takes note of events at once and draws in its own thread.

Frames are drawn on the alternate screen, which no terminal folds into its scrollback when it is resized. Everything
that is to stay (lines of libraries, the summary) is written on the main screen.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TextIO, cast

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.segment import SegmentLines
from rich.theme import Theme

from emotrain.observers.board import Board
from emotrain.observers.frame import STYLES, compose, print_notices, print_summary
from emotrain.train.events import Event

SHARE = 0.015  # of one core's time that drawing may take
BYTES_PER_S = 24_000  # that a terminal is sent: a slow connection keeps up
FASTEST_S = 0.25
IDLE_S = 1.0  # clocks go on also when nothing happens
LOOK_S = 0.05  # how often the terminal is asked for its size
PATIENCE_S = 2.0  # a stopped terminal (Ctrl-S) may hold up a drawing for ever
PIECE = 512  # bytes
BEGIN = "\x1b[?2026h\x1b[?25l\x1b[?7l"  # one update, cursor away, no wrapping
END = "\x1b[?7h\x1b[?25h\x1b[?2026l"
HOME, REST_OF_LINE, REST = "\x1b[H", "\x1b[K", "\x1b[J"
ENTER = "\x1b[?1049h"  # the alternate screen
LEAVE = f"{HOME}{REST}\x1b[?1049l"  # empty: tmux folds what a resized one still holds into the scrollback
ASCII = str.maketrans({"✓": "+", "◆": "o", "…": "~", "–": "-", "━": "=", "╸": "=", "╺": "-"})


class Terminal:
    """The stream that rich draws on: counts bytes, and goes silent when the terminal is gone.

    `show` draws a frame on the alternate screen; `write` is for what stays. The text goes straight to the descriptor,
    so that a stopped terminal holds no lock of Python's.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.sent = 0
        self.closed = False
        self._frame = ""  # what the alternate screen shows; empty on the main one

    @property
    def unicode(self) -> bool:
        """Whether block and braille characters can be shown."""
        return self.encoding.lower().replace("_", "-").startswith("utf")

    def write(self, text: str) -> int:
        """Put a text on the main screen; a frame that is shown comes back after it."""
        if text:
            self._put(f"{BEGIN}{LEAVE}{END}{text}{BEGIN}{ENTER}{self._frame}{END}" if self._frame else text)
        return len(text)

    def show(self, frame: str) -> None:
        """Draw a frame over the last one; it has fewer lines than the terminal."""
        enter = "" if self._frame else ENTER
        self._frame = HOME + REST_OF_LINE + frame.replace("\n", f"\n{REST_OF_LINE}") + REST
        self._put(f"{BEGIN}{enter}{self._frame}{END}")

    def leave(self) -> None:
        """Back to the main screen, as it was before the first frame."""
        if self._frame:
            self._frame = ""
            self._put(LEAVE)

    def _put(self, text: str) -> None:
        if self.closed:
            return
        if not self.unicode:
            text = text.translate(ASCII).encode("ascii", errors="replace").decode("ascii")
        try:
            self._send(text.encode(self.encoding, errors="replace"))
        except (OSError, ValueError):  # the terminal is gone
            self.closed = True

    @property
    def ours(self) -> bool:
        """Whether the process is in the foreground: after Ctrl-Z and `bg` the terminal is the shell's."""
        try:
            return os.tcgetpgrp(self.fileno()) in (0, os.getpgrp())
        except (OSError, ValueError, AttributeError):  # not a terminal of this session, or none that has jobs
            return True

    def _send(self, data: bytes) -> None:
        """In pieces, so that one can see whether a slow terminal still takes something."""
        try:
            descriptor = None if os.name == "nt" else self._stream.fileno()  # a Windows console takes text alone
        except (OSError, ValueError, AttributeError):
            descriptor = None
        self._stream.flush()
        if descriptor is None:
            self._stream.write(data.decode(self.encoding))
            self._stream.flush()
            self.sent += len(data)
            return
        while data and not self.closed:
            sent = os.write(descriptor, data[:PIECE])
            data, self.sent = data[sent:], self.sent + sent

    def flush(self) -> None:
        """Nothing is kept back."""

    def isatty(self) -> bool:
        """What the stream says."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self._stream.fileno()


class StrayLines(FileProxy):
    """Stands in for stderr while a frame is shown: whole lines go to the main screen, of a bar its last form."""

    def flush(self) -> None:
        """Nothing to do before a line is whole."""

    def release(self) -> None:
        """Show an unfinished line."""
        super().flush()

    def isatty(self) -> bool:
        """No: nobody else may move the cursor."""
        return False


class Dashboard:
    """Shows a run on one screen.

    `handle` only writes figures down. A thread draws up to 4 times a second, as often as it may within 1.5% of one
    core and 24 kB a second, and at once when the terminal has another size; nothing while the process is in the
    background. A terminal that is stopped (Ctrl-S) or gone does not hold up the training. No random numbers are used.

    Args:
        console: the terminal, of `make_console` (default: stderr). Whether it is one is the caller's question.
        clock: seconds of a steady clock.
        thread: draw by itself; otherwise only `refresh` draws.
        capture_stderr: lines that others write to `sys.stderr` go to the main screen meanwhile.
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
        self._terminal = cast(Terminal, self._console.file)
        self._board = Board(clock)
        self._lock = threading.RLock()
        self._size = self._console.size
        self._closed = False
        self._changed = True
        self._stack = contextlib.ExitStack()
        if capture_stderr:
            stray = StrayLines(self._console, sys.stderr)
            self._stack.callback(stray.release)
            self._stack.enter_context(contextlib.redirect_stderr(cast(TextIO, stray)))
        self._answer_signals()
        self._thread: threading.Thread | None = None
        if thread:
            self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
            self._thread.start()

    def handle(self, event: Event) -> None:
        with self._lock:
            self._board.note(event)
            self._changed = True

    def stopping(self, name: str) -> None:
        """A first Ctrl-C has come; may be called in a signal's handler."""
        self._board.stopping = self._changed = True

    def quit(self) -> None:
        """Give the terminal back, where it takes anything (not after Ctrl-S); may be called in a signal's handler."""
        with contextlib.suppress(OSError, ValueError):
            if os.name == "nt" or select.select([], [self._terminal.fileno()], [], 0.0)[1]:
                self._terminal.leave()

    def refresh(self) -> None:
        """Draw a frame now."""
        self._changed = False
        self._size = self._console.size
        self._terminal.show(self._picture())

    def _picture(self) -> str:
        with self._lock:
            lines = compose(self._board, self._console)
        with self._console.capture() as picture:
            self._console.print(SegmentLines(lines, new_lines=True))
        return picture.get()

    def _answer_signals(self) -> None:
        """Give the terminal back at Ctrl-Z and SIGTERM; after `fg` the next frame takes it again."""

        def handle(number: int, frame: object) -> None:
            self.quit()
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number if number == signal.SIGTERM else signal.SIGSTOP)

        for name in ("SIGTSTP", "SIGTERM"):
            number = getattr(signal, name, None)
            main = threading.current_thread() is threading.main_thread()
            if number is not None and main and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, handle)
                self._stack.callback(signal.signal, number, signal.SIG_DFL)

    def close(self) -> None:
        """Stop drawing and leave the summary; without an end the last frame; before step 1 the notices."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            sent = -1
            while self._thread.is_alive() and self._terminal.sent != sent:  # a slow terminal gets its time
                sent = self._terminal.sent
                self._thread.join(timeout=PATIENCE_S)
            if self._thread.is_alive():  # it is stopped: nothing more is sent
                self._terminal.closed = True
                self._stack.pop_all()
                return
        self._stack.close()
        self._terminal.leave()
        board = self._board
        if board.end is not None:
            print_summary(self._console, board, board.end)
        elif board.last is not None:
            self._terminal.write(self._picture())
        else:
            print_notices(self._console, board)

    def _run(self) -> None:
        """Draw once the last drawing is paid for, and when the size is another one."""
        due, last = 0.0, 0.0
        while not self._closed:
            now = time.monotonic()
            news = self._changed or now >= last + IDLE_S
            if (self._console.size != self._size or (news and now >= due)) and self._terminal.ours:
                began, sent = time.thread_time(), self._terminal.sent
                self.refresh()
                cost, sent = time.thread_time() - began, self._terminal.sent - sent
                last = now
                due = now + max(FASTEST_S, cost / SHARE, sent / BYTES_PER_S)
            time.sleep(LOOK_S)


def make_console(
    stream: TextIO,
    environ: Mapping[str, str] | None = None,
    *,
    width: int | None = None,
    height: int | None = None,
) -> Console:
    """A rich console for a stream that is a terminal, of the size that it has, whatever COLUMNS and LINES say."""
    names = {
        key: value
        for key, value in (os.environ if environ is None else environ).items()
        if key not in ("COLUMNS", "LINES")
    }
    return Console(
        file=cast(TextIO, Terminal(stream)),
        force_terminal=True,
        highlight=False,
        theme=Theme(STYLES),
        width=width,
        height=height,
        _environ=names,
    )
