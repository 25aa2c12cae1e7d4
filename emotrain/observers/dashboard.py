"""The live dashboard on a terminal: it takes note of events at once and draws in its own thread."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TextIO, cast

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.live import Live
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
ASCII = str.maketrans({"✓": "+", "◆": "o", "…": "~", "–": "-", "━": "=", "╸": "=", "╺": "-"})


class Terminal:
    """The stream that rich draws on: counts bytes, and goes silent when the terminal is gone.

    Between two frames the terminal is as it was: a process that is killed leaves it sane. The text goes straight to
    the descriptor, so that a stopped terminal holds no lock of Python's.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.sent = 0
        self.closed = False
        self.live = True  # frames are drawn

    @property
    def unicode(self) -> bool:
        """Whether block and braille characters can be shown."""
        return self.encoding.lower().replace("_", "-").startswith("utf")

    def write(self, text: str) -> int:
        """Send a text."""
        if self.closed or not text:
            return 0
        shown = f"{BEGIN}{text}{END}" if self.live else text
        if not self.unicode:
            shown = shown.translate(ASCII).encode("ascii", errors="replace").decode("ascii")
        try:
            self._send(shown.encode(self.encoding, errors="replace"))
        except (OSError, ValueError):  # the terminal is gone
            self.closed = True
        return len(text)

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
    """Stands in for stderr while a frame is shown: whole lines go above it, of a progress bar only its last form."""

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
    core and 24 kB a second, and at once when the terminal has another size. A terminal that is stopped (Ctrl-S) or
    gone does not hold up the training. No random numbers are used.

    Args:
        console: the terminal, of `make_console` (default: stderr). Whether it is one is the caller's question.
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
        self._terminal = cast(Terminal, self._console.file)
        self._board = Board(clock)
        self._lock = threading.RLock()
        self._size = self._console.size
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._closed = False
        self._changed = True
        self._stack = contextlib.ExitStack()
        if capture_stderr:
            stray = StrayLines(self._console, sys.stderr)
            self._stack.callback(stray.release)
            self._stack.enter_context(contextlib.redirect_stderr(cast(TextIO, stray)))
        self._live.start()
        self._thread: threading.Thread | None = None
        if thread:
            self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
            self._thread.start()

    def handle(self, event: Event) -> None:
        """Take note of one event; the next frame shows it."""
        with self._lock:
            self._board.note(event)
            self._changed = True

    def stopping(self, name: str) -> None:
        """A first Ctrl-C has come; may be called in a signal's handler."""
        self._board.stopping = self._changed = True

    def refresh(self) -> None:
        """Draw a frame now."""
        self._changed = False
        if self._console.size != self._size:
            self._clear()
        with self._lock:
            lines = compose(self._board, self._console)
        lines.append([])  # where the cursor waits: what is typed (^C) finds room there
        self._live.update(SegmentLines(lines, new_lines=True), refresh=True)

    def _clear(self) -> None:
        """Begin anew on an empty screen: a terminal of another size has folded and moved the last frame's lines."""
        self._size = self._console.size
        self._take_away()
        self._terminal.write("\x1b[H\x1b[J")
        self._live.transient, self._live.vertical_overflow = False, "crop"
        self._live.start()

    def _take_away(self) -> None:
        self._live.update("")
        self._live.transient = True
        self._live.stop()

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
        board = self._board
        if board.end is None and board.last is not None:
            self.refresh()
            self._live.stop()
            return
        self._take_away()
        self._terminal.live = False
        if board.end is not None:
            print_summary(self._console, board, board.end)
        else:
            print_notices(self._console, board)

    def _run(self) -> None:
        """Draw once the last drawing is paid for, and when the size is another one."""
        due, last = 0.0, 0.0
        while not self._closed:
            now = time.monotonic()
            news = self._changed or now >= last + IDLE_S
            if self._console.size != self._size or (news and now >= due):
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
