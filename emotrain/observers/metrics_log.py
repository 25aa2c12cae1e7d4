"""metrics.jsonl: a line a step; probe.jsonl: a line a probe. A resumed run continues both without a double line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from emotrain.errors import ResourceError
from emotrain.observers.fields import probe_row, step_row, to_line
from emotrain.train.events import Event, ProbeEnd, RunStart, StepEnd

METRICS_FILE = "metrics.jsonl"
PROBE_FILE = "probe.jsonl"


class MetricsLog:
    """Appends to the logs of a run folder, flushed at every line.

    At `RunStart` everything after `start_step` is cut off, also a half line that a crash has left.

    Raises:
        ResourceError: a log cannot be written (from `handle`).
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._files: dict[str, IO[bytes]] = {}

    def handle(self, event: Event) -> None:
        """Cut at the start, then write steps and probes."""
        if isinstance(event, StepEnd):
            self._append(METRICS_FILE, to_line(step_row(event)))
        elif isinstance(event, ProbeEnd):
            self._append(PROBE_FILE, to_line(probe_row(event)))
        elif isinstance(event, RunStart):
            self.close()
            for name in (METRICS_FILE, PROBE_FILE):
                truncate_log(self._run_dir / name, event.start_step)

    def close(self) -> None:
        """Close the files; a later event opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _append(self, name: str, line: str) -> None:
        path = self._run_dir / name
        try:
            file = self._files.get(name)
            if file is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = self._files[name] = path.open("ab")
            file.write(line.encode("utf-8"))
            file.flush()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ResourceError(
                f"{path}: the log cannot be written ({reason})",
                hint="free some space on that disk, then resume the run",
            ) from error


def truncate_log(path: Path, last_step: int) -> int:
    """Keep the leading whole lines of a log up to `last_step`; returns how many bytes were cut off.

    The first line that is broken, or of a later step, ends what is kept. A missing file is fine.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            kept = _kept_bytes(file, last_step)
    except FileNotFoundError:
        return 0
    if kept < size:
        os.truncate(path, kept)
    return size - kept


def _kept_bytes(file: IO[bytes], last_step: int) -> int:
    kept = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if not isinstance(step, int) or step > last_step:
            break
        kept += len(line)
    return kept
