"""What a run writes as it goes, a line each time; all of it goes on exactly at a resume.

metrics.jsonl and picture_losses.jsonl have a line a step, validation.jsonl and likeness.jsonl one a measurement.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Protocol

from emotrain.dataset.ranking import NO_CAPTION
from emotrain.errors import ResourceError
from emotrain.files import fsync_folder
from emotrain.train.events import Event, LikenessMeasured, Notice, RunStart, StepEnd, ValidationEnd

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
LIKENESS_FILE = "likeness.jsonl"  # only where validate.likeness names a model
LOSSES_FILE = "picture_losses.jsonl"
MAX_WAITING = 200  # lines that may wait for a full disk to get room before the run is ended


class Log(Protocol):
    """What a run writes as it goes and a checkpoint must not be ahead of."""

    def sync(self) -> None:
        """Bring to the disk what has been written so far."""


def sync(logs: Sequence[Log], notify: Callable[[Event], None]) -> None:
    """Bring all logs to the disk; one that cannot be costs a notice."""
    for log in logs:
        try:
            log.sync()
        except OSError as error:
            notify(Notice(f"a log was not brought to the disk ({error.strerror}); a power cut may shorten it"))


class MetricsLog:
    """Appends to the logs of a run folder; `handle` returns when the system has the line.

    At `RunStart` everything after `start_step` is cut off, also a half line that a crash has left.
    While the disk refuses lines they wait and are tried again with the next one.

    Raises:
        ResourceError: a log could not be written for 200 lines (from `handle`).
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        files = (METRICS_FILE, LOSSES_FILE, VALIDATION_FILE, LIKENESS_FILE)
        self._logs = {name: _Log(run_dir / name) for name in files}

    def handle(self, event: Event) -> None:
        """Cut at the start, then write steps, their pictures' losses, validations and likenesses."""
        if isinstance(event, StepEnd):
            self._logs[METRICS_FILE].append(event.line())
            rows = [[one.id, one.position, one.loss, *([] if one.captioned else [NO_CAPTION])] for one in event.samples]
            self._logs[LOSSES_FILE].append(json.dumps({"step": event.step, "samples": rows}) + "\n")
        elif isinstance(event, ValidationEnd):
            self._logs[VALIDATION_FILE].append(event.line())
        elif isinstance(event, LikenessMeasured):
            self._logs[LIKENESS_FILE].append(event.line())
        elif isinstance(event, RunStart):
            self.close()
            self._run_dir.mkdir(parents=True, exist_ok=True)
            for log in self._logs.values():
                truncate_log(log.path, event.start_step)

    def sync(self) -> None:
        """Bring the lines to the disk, so that a power cut cannot take them.

        Raises:
            OSError: the disk refuses.
        """
        for log in self._logs.values():
            log.sync()

    def close(self) -> None:
        """Close the files; a later event opens them again."""
        for log in self._logs.values():
            log.close()


class _Log:
    """One file, unbuffered, with the lines that it has not taken yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._waiting: list[bytes] = []
        self._is_new = True  # its name may not be on the disk yet

    def append(self, line: str) -> None:
        self._waiting.append(line.encode("utf-8"))
        try:
            self._write_waiting()
        except OSError as error:
            if len(self._waiting) < MAX_WAITING:
                return
            reason = error.strerror or type(error).__name__
            raise ResourceError(
                f"{self.path}: the log cannot be written ({reason})",
                hint="free some space on that disk, then resume the run",
            ) from error

    def sync(self) -> None:
        if self._file is None:
            return  # nothing was written since the last checkpoint
        os.fsync(self._file.fileno())
        if self._is_new:
            fsync_folder(self.path.parent)
            self._is_new = False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._write_waiting()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_waiting(self) -> None:
        while self._waiting:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            line = self._waiting[0]
            written = self._file.write(line) or 0
            if written < len(line):  # a full disk may take a part
                self._waiting[0] = line[written:]
            else:
                del self._waiting[0]


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
