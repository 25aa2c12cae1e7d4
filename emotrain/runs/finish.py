"""What a run writes: its logs, the loss of every picture, and at the end the checked LoRA files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from emotrain.config.schema import Preset
from emotrain.dataset.ranking import NO_CAPTION
from emotrain.errors import ModelError, ResourceError, UnwritableWeightsError
from emotrain.files import fsync_folder
from emotrain.lora.check import self_check
from emotrain.lora.file import read_lora, save_lora
from emotrain.observers.metrics_log import MetricsLog, truncate_log
from emotrain.observers.tensorboard import TensorBoard
from emotrain.runs.folder import RunFolder
from emotrain.runs.metadata import lora_metadata
from emotrain.train.events import Event, Notice, Observer, Phase, Saved
from emotrain.train.loop import Outcome, Sample, StopReason

if TYPE_CHECKING:
    from emotrain.runs.session import Session


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


def hand_over(session: Session, outcome: Outcome) -> tuple[Path | None, Outcome]:
    """Write the best and the last LoRA, read both back and compare; the best one's path and how the run ended.

    Weights that no file can hold (not finite, or too large for save.dtype) are a divergence: the best LoRA is written
    all the same, where it is whole.

    Raises:
        ModelError: a file does not say what the live weights are: the run is not done.
        ResourceError: the disk is full, or the file cannot be written.
    """
    session.notify(Phase("writing and checking the LoRA"))
    with session.optimizer.eval_mode():
        last = session.model.adapter.state()
    best, best_step = session.state.best_adapter or last, session.state.best_step
    if best_step == 0:
        session.notify(
            Notice("no validation was better than that of step 0, and lora.safetensors is the LoRA of step 0")
        )
    written: Path | None = None
    for path, state, step in (
        (session.folder.lora_path, best, session.state.step if best_step is None else best_step),
        (session.folder.lora_last_path, last, session.state.step),
    ):
        try:
            write_lora(session, path, state, step, outcome)
        except UnwritableWeightsError as error:
            session.notify(Notice(f"{path.name} is not written: {error.message}"))
            outcome = Outcome(StopReason.DIVERGED, f"the weights of step {step} cannot be written: {error.message}")
            continue
        written = written or path
    session.notify(Phase("writing and checking the LoRA", 1, 1))
    return written, outcome


def write_lora(session: Session, path: Path, state: dict[str, Tensor], step: int, outcome: Outcome) -> None:
    """One file, checked."""
    save, adapter, family = session.preset.save, session.model.adapter, session.model.family
    save_lora(
        path,
        state,
        alphas=adapter.alphas(),
        family=family.name,
        format=save.format,
        dtype=save.dtype,
        metadata=lora_metadata(session, step, outcome),
    )
    self_check(path, state, adapter.alphas(), family.name)
    session.notify(Saved(step, path, best=path == session.folder.lora_path))


def draw_written(session: Session, lora: Path | None, outcome: Outcome) -> None:
    """The sheet's last column: what the LoRA file draws, read back as its users read it.

    Left out where the run was interrupted or diverged; pictures of an earlier file go in any case.
    """
    sampler, adapter = session.sampler, session.model.adapter
    if sampler is None:
        return
    try:
        for path in sampler.lora_paths():
            path.unlink(missing_ok=True)
    except OSError as error:
        session.notify(Notice(f"pictures of an earlier LoRA file stay in {sampler.folder}: {error.strerror}"))
        return
    if lora is None or outcome.reason not in (StopReason.SIGNAL, StopReason.MAX_STEPS):
        return
    live = adapter.state()
    try:
        adapter.load_state(read_lora(lora).state)
    except ModelError as error:  # a layout that joins modules may give them other ranks
        session.notify(Notice(f"the sheet has no column of {lora.name}: {error.message}"))
        return
    best = session.state.best_step
    sampler.draw_lora(session.state.step if best is None else best, best)
    adapter.load_state(live)
    sync([sampler], session.notify)
