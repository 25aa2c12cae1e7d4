"""Writing whole lines to a stream that may be closed under our feet."""

from __future__ import annotations

import os
from typing import TextIO


class LineWriter:
    """Writes and flushes lines; goes silent once nobody reads them (`| head`, closed ssh).

    Training goes on then: an observer's reader must not be able to end a run.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.closed = False

    def write(self, line: str) -> None:
        """Write one line that ends in its line break."""
        if self.closed:
            return
        try:
            self._write(line)
            self._stream.flush()
        except (OSError, ValueError):  # BrokenPipeError, EIO; ValueError: the stream is closed
            self.closed = True
            self._silence()

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(line.encode(encoding, errors="replace").decode(encoding))

    def _silence(self) -> None:
        """Point the dead descriptor at nothing, or Python fails when it flushes at exit."""
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            return
        if descriptor not in (1, 2):
            return
        nothing = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, descriptor)
        finally:
            os.close(nothing)
