"""What a run writes as it goes: its logs, and the loss of every picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from emotrain.config.schema import Preset
from emotrain.dataset.ranking import NO_CAPTION
from emotrain.errors import ResourceError
from emotrain.files import fsync_folder
from emotrain.observers.metrics_log import MetricsLog, truncate_log
from emotrain.observers.tensorboard import TensorBoard
from emotrain.runs.folder import RunFolder
from emotrain.train.events import Event, Notice, Observer
from emotrain.train.loop import Sample


def file_observers(preset: Preset, folder: RunFolder) -> list[Observer]:
    """The logs that every run keeps, and TensorBoard where the preset wants it."""
    logs: list[Observer] = [MetricsLog(folder.path)]
    if preset.log.tensorboard:
        logs.append(TensorBoard(folder.tensorboard_dir))
    return logs


@runtime_checkable
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


class PictureLosses:
    """`picture_losses.jsonl`: a line per step with the loss of each picture and where on the noise scale it was taken.

    Args:
        path: the file; a resumed run cuts it after `start_step`.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        truncate_log(path, start_step)
        self._is_new = True
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        """One line; a full disk loses it and nothing else."""
        rows = [
            [sample.id, round(sample.position, 5), round(sample.loss, 6), *([] if sample.captioned else [NO_CAPTION])]
            for sample in samples
        ]
        try:
            self._file.write(json.dumps({"step": step, "samples": rows}) + "\n")
            self._file.flush()
        except OSError as error:
            raise ResourceError(f"{self._file.name} cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Bring what has been written to the disk."""
        os.fsync(self._file.fileno())
        if self._is_new:
            fsync_folder(Path(self._file.name).parent)
            self._is_new = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()
