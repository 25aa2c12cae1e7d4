"""What the loop tells its observers: frozen values, no tensors. An observer watches; it never steers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from emotrain.pulse.reading import Reading


@dataclass(frozen=True)
class RunStart:
    """Before the first step. `start_step` is above 0 in a resumed run."""

    name: str
    run_dir: Path
    start_step: int
    max_steps: int
    steps_per_epoch: float
    optimizer: str
    num_images: int
    num_modules: int
    num_parameters: int
    device: str
    facts: tuple[tuple[str, str], ...] = ()  # further lines for the head of the dashboard: (label, value)


@dataclass(frozen=True)
class StepEnd:
    """One optimizer step. `step` counts from 1; `step_s` is pure training time in seconds."""

    step: int
    epoch: float
    loss: float  # mean over the whole optimizer step, as it is
    observed_loss: float  # the loss the optimizer used (equal to `loss` without a corrected loss)
    reading: Reading
    ready: bool  # the optimizer's own stop signal
    grad_norm: float
    lr: float
    step_s: float
    stop_meter: float  # 0..1: how far the stop rule is towards its decision
    expected_end: tuple[int, int] | None = None  # first and last step it may end at, once that can be said
    memory_gib: float = 0.0
    skipped: int = 0  # batches left out so far because of non-finite numbers
    gain: float = 1.0  # on the published step length


@dataclass(frozen=True)
class ValidationEnd:
    """The validation: loss at fixed noise and timesteps, on pictures the LoRA is not trained on (or flipped ones)."""

    step: int
    loss: float
    scalar: float  # the same sensors fed with the validation loss; below zero it is over-training
    base_loss: float  # with the adapter off
    drift: float | None  # mean squared change on prompts it should not change
    best_step: int
    best_loss: float


@dataclass(frozen=True)
class SamplesDrawn:
    """Pictures of one step: one path per prompt, and the sheet of all steps so far."""

    step: int
    paths: tuple[Path, ...]
    prompts: tuple[str, ...]
    sheet: Path


@dataclass(frozen=True)
class Saved:
    """A checkpoint or LoRA file that is complete on disk."""

    step: int
    path: Path
    best: bool = False


@dataclass(frozen=True)
class Phase:
    """Long silent work has begun or goes on; `done` of `total` (total 0: unknown). `done == total` ends it."""

    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Notice:
    """One line for the user; level `warning` or `info`."""

    message: str
    level: str = "warning"


@dataclass(frozen=True)
class RunEnd:
    """After the last file is written."""

    step: int
    stop_reason: str  # signal | max_steps | interrupted | diverged
    sentence: str  # why, in one sentence
    lora: Path | None
    best_step: int | None
    best_loss: float | None
    seconds: float
    resume_command: str | None = None
    all_command: str | None = None  # trains on the held-out pictures too, for the number of steps that was found
    session_steps: int = 0  # of this process: `seconds` is its time
    metrics: dict[str, float] = field(default_factory=dict)


Event = RunStart | StepEnd | ValidationEnd | SamplesDrawn | Saved | Phase | Notice | RunEnd


class Observer(Protocol):
    """Gets every event, returns nothing, must not touch the random state or the parameters."""

    def handle(self, event: Event) -> None:
        """Take note of one event."""

    def close(self) -> None:
        """The run is over, in whatever way; called once, also after an exception."""
