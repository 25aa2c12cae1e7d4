"""Ctrl-C, SIGTERM, SIGHUP: the first asks to stop at the step's end, a second quits at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from emotrain.errors import ExitCode

ECHO_S = 0.2  # wrappers (`uv run`, shells) pass the same key press on a second time


def tell_stopping(name: str) -> None:
    """Say on stderr that a stop is under way; may be called in a handler, where printing may not."""
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopping after this step; press Ctrl-C again to quit at once\n")


class StopSignals:
    """While it is entered, a first signal only sets `received`; a second one ends the process: 130.

    A signal that is ignored on entry (`nohup`) stays ignored. A further SIGHUP never quits: a
    closing terminal sends several. Outside the main thread nothing is installed. Quitting at once
    is safe: saves are atomic.

    Args:
        on_first: called in the handler with the first signal's name, to say that a save is coming.
        on_quit: called in the handler before the process ends at once, to give the terminal back.
    """

    def __init__(
        self,
        on_first: Callable[[str], None] | None = None,
        on_quit: Callable[[], None] | None = None,
    ) -> None:
        self.received: signal.Signals | None = None
        self._on_first = on_first
        self._on_quit = on_quit
        self._first_s = 0.0
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.received is not None

    @property
    def name(self) -> str | None:
        """`SIGINT`, `SIGTERM`, `SIGHUP` or None."""
        return self.received.name if self.received is not None else None

    @property
    def exit_code(self) -> ExitCode:
        """130 after Ctrl-C, 143 after SIGTERM or SIGHUP, 0 after none."""
        if self.received is None:
            return ExitCode.OK
        by_key = self.received == signal.SIGINT
        return ExitCode.INTERRUPTED if by_key else ExitCode.TERMINATED

    def __enter__(self) -> StopSignals:
        """Install the handlers, in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put back the handlers that were there."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first_s = signal.Signals(number), time.monotonic()
            if self._on_first is not None:
                self._on_first(self.received.name)
            return
        echo = number == self.received and time.monotonic() - self._first_s < ECHO_S
        if echo or number == getattr(signal, "SIGHUP", None):
            return
        try:
            if self._on_quit is not None:
                self._on_quit()
        finally:
            os._exit(ExitCode.INTERRUPTED)
