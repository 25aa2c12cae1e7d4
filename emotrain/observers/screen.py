"""A frame at the bottom of a terminal, drawn in place: only lines that changed are sent.

No alternate screen, no hidden cursor between two frames: a process that is killed leaves a sane
terminal. Lines are drawn with automatic wrapping off, so that a character whose width the terminal
sees otherwise cannot break a frame. When the terminal has got another size its visible part is
cleared first, because terminals then fold and move the lines of the last frame.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import IO

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

from emotrain.observers.charts import Line
from emotrain.observers.lines import wrap
from emotrain.observers.text import clean

STYLES: Mapping[str, str] = {
    "": "",
    "title": "bold",
    "label": "dim",
    "value": "bold",
    "rule": "dim",
    "raw": "dim cyan",
    "loss": "bright_cyan",
    "observed_loss": "magenta",
    "validation": "bright_magenta",
    "scalar": "green",
    "trust": "bright_blue",
    "pulse": "yellow",
    "bar": "green",
    "stop": "magenta",
    "good": "bold green",
    "warning": "bold yellow",
    "bad": "bold red",
    "path": "underline",
}

MAX_STRAY_LINES = 12  # of one line that somebody else writes
PATIENCE_S = 1.0  # a stopped terminal (Ctrl-S) may hold up a drawing for ever
_BEGIN = "\x1b[?2026h\x1b[?25l\x1b[?7l"  # one update, cursor away, no wrapping
_END = "\x1b[?7h\x1b[?25h\x1b[?2026l"


def _codes(console: Console) -> dict[str, tuple[str, str]]:
    """For each style the codes before and after a text, as far as colours are allowed."""
    systems = {"256": ColorSystem.EIGHT_BIT, "truecolor": ColorSystem.TRUECOLOR}
    codes: dict[str, tuple[str, str]] = {}
    for name, definition in STYLES.items():
        style = Style.parse(definition)
        if console.no_color:
            style = style.without_color
        if console.color_system is None or not style:
            codes[name] = ("", "")
            continue
        system = systems.get(console.color_system, ColorSystem.STANDARD)
        before, _, after = style.render("\0", color_system=system).partition("\0")
        codes[name] = (before, after)
    return codes


def to_text(lines: Sequence[Line]) -> Text:
    """Lines as a rich Text, for pictures and tests."""
    text = Text(no_wrap=True, overflow="crop", end="")
    for number, line in enumerate(lines):
        if number:
            text.append("\n")
        for part, style in line:
            text.append(part, STYLES[style] or None)
    return text


def to_plain(lines: Sequence[Line]) -> list[str]:
    """Lines without styles."""
    return ["".join(part for part, _ in line) for line in lines]


class Screen:
    """Draws frames on the terminal of a rich console; goes silent when the terminal is gone.

    Args:
        console: says size, colours and encoding; the text goes to its file.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._codes = _codes(console)
        self._lock = threading.RLock()
        self._shown: list[str] = []
        self._size = (0, 0)
        self.closed = False

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows as they are now, whatever COLUMNS and LINES say."""
        try:
            found = os.get_terminal_size(self._console.file.fileno())
        except (OSError, ValueError):
            return self._console.width, self._console.height
        if found.columns > 0 and found.lines > 0:
            return found.columns, found.lines
        return self._console.width, self._console.height

    def encode(self, line: Line) -> str:
        """One line with its escape codes."""
        parts: list[str] = []
        for text, style in line:
            before, after = self._codes[style]
            parts += (before, text, after)
        return "".join(parts)

    def draw(self, lines: Sequence[Line], size: tuple[int, int]) -> None:
        """Show a frame that was made for `size`, at least one row lower than that."""
        encoded = [self.encode(line) for line in lines]
        with self._lock:
            if self.closed:
                return
            parts = [_BEGIN]
            old = self._shown
            if old and size != self._size:
                parts.append("\x1b[H\x1b[J")
                old = []
            elif old:
                parts.append(f"\x1b[{len(old)}A\r")
            for number, line in enumerate(encoded):
                same = number < len(old) and old[number] == line
                parts.append("\r\n" if same else f"\r{line}\x1b[K\r\n")
            parts.append("\x1b[J" + _END)
            self._shown, self._size = encoded, size
            self._send("".join(parts))

    def print_above(self, lines: Sequence[Line]) -> None:
        """Put lines above the frame for good; dropped while the terminal is stopped."""
        if not self._lock.acquire(timeout=PATIENCE_S):
            return
        try:
            parts = [_BEGIN]
            if self._shown:
                parts.append(f"\x1b[{len(self._shown)}A\r")
            parts.extend(f"{self.encode(line)}\x1b[K\r\n" for line in lines)
            parts.extend(f"{line}\x1b[K\r\n" for line in self._shown)
            parts.append("\x1b[J" + _END)
            self._send("".join(parts))
        finally:
            self._lock.release()

    def finish(self, lines: Sequence[Line]) -> None:
        """Put `lines` in the frame's place and draw no more; gives up on a terminal that is stopped."""
        if not self._lock.acquire(timeout=PATIENCE_S):
            self.closed = True
            return
        try:
            self.draw(lines, self.size)
            self.closed = True
        finally:
            self._lock.release()

    def _send(self, text: str) -> None:
        if self.closed:
            return
        file: IO[str] = self._console.file
        try:
            file.write(text)
            file.flush()
        except UnicodeEncodeError:
            encoding = getattr(file, "encoding", None) or "ascii"
            file.write(text.encode(encoding, errors="replace").decode(encoding))
            file.flush()
        except (OSError, ValueError):  # the terminal is gone
            self.closed = True


class StrayLines:
    """Stands in for stderr while a frame is shown: whole lines go above the frame.

    Progress bars that rewrite their line leave only its last form. After `release`, and in child
    processes, everything goes straight to the real stream, since libraries keep the object that
    they found at import.
    """

    def __init__(self, screen: Screen, real: IO[str]) -> None:
        self._screen = screen
        self._real = real
        self._owner = os.getpid()
        self._held = ""
        self._released = False
        self.encoding = getattr(real, "encoding", "utf-8")
        self.errors = getattr(real, "errors", "replace")

    def write(self, text: str) -> int:
        """Keep text until its line is whole."""
        if self._released or os.getpid() != self._owner:
            return self._real.write(text)
        self._held += text
        if "\n" in self._held:
            *whole, self._held = self._held.split("\n")
            self._show(whole)
        return len(text)

    def _show(self, whole: Sequence[str]) -> None:
        width = max(20, self._screen.size[0] - 1)
        shown = [clean(line.rstrip("\r").rsplit("\r", 1)[-1]) for line in whole]
        lines = [part for line in shown for part in wrap(line, width)[:MAX_STRAY_LINES]]
        if lines:
            self._screen.print_above([[(line, "")] for line in lines])

    def flush(self) -> None:
        """Nothing to do before a line is whole."""
        if self._released:
            self._real.flush()

    def isatty(self) -> bool:
        """No: nobody else may move the cursor."""
        return self._released and self._real.isatty()

    def fileno(self) -> int:
        """The real stream's descriptor (for subprocesses)."""
        return self._real.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    def release(self) -> None:
        """Let go: an unfinished line is shown, then the real stream is used."""
        if not self._released and self._held.strip():
            self._show([self._held])
        self._held = ""
        self._released = True
