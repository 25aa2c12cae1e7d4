"""`--json`: every event as one line of JSON on stdout, the last one `run_end`."""

from __future__ import annotations

import sys
from typing import TextIO

from emotrain.observers.fields import event_row, to_line
from emotrain.observers.stream import LineWriter
from emotrain.train.events import Event


class JsonEvents:
    """Newline-delimited events. A step has the fields of metrics.jsonl and `"event": "step"`.

    Args:
        stream: where to write (default: stdout as it is now).
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._writer = LineWriter(sys.stdout if stream is None else stream)

    def handle(self, event: Event) -> None:
        """Write one event."""
        self._writer.write(to_line(event_row(event)))

    def close(self) -> None:
        """Nothing is kept back: every line is flushed when it is written."""
