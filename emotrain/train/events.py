"""What the loop tells its observers: frozen values, no tensors. An observer watches; it never steers.

A value is declared once, as a field: `row` makes it a column of metrics.jsonl and a key of `--json`, and one that is
annotated with a tag is a curve in TensorBoard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, get_type_hints

from emotrain.dataset.ranking import LossRecord
from emotrain.errors import ResourceError, first_line
from emotrain.pulse.signal import Reading

SCHEMA_VERSION = 1  # of the rows


def to_json(value: Any) -> Any:
    """The value as JSON has it: paths as text, tuples as lists, None for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value).encode("utf-8", errors="replace").decode("utf-8")
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


class Record:
    """What all events have in common."""

    kind: ClassVar[str]

    def row(self) -> dict[str, Any]:
        """The fields as a flat JSON object; those of the reading stand among them, samples have a log of their own."""
        found: dict[str, Any] = {}
        for name in (field.name for field in fields(self) if field.name != "samples"):  # type: ignore[arg-type]
            value = getattr(self, name)
            found.update(to_json(asdict(value)) if name == "reading" else {name: to_json(value)})
        return found

    def line(self, *, with_kind: bool = False) -> str:
        """The row as one line of strict JSON with its line break; the kind is the key `event`."""
        row = {"event": self.kind, **self.row()} if with_kind else self.row()
        return json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n"

    def curves(self) -> dict[str, float]:
        """The finite numbers that TensorBoard shows, by tag."""
        row = self.row()
        own: Any = type(self)
        tags = _tags(Reading) | _tags(own)
        return {tag: float(row[name]) for name, tag in tags.items() if row.get(name) is not None}


@cache
def _tags(owner: Any) -> dict[str, str]:
    """The TensorBoard tags of a class's fields, by field."""
    hints = get_type_hints(owner, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


@dataclass(frozen=True)
class RunStart(Record):
    """Before the first step. `start_step` is above 0 in a resumed run."""

    kind: ClassVar[str] = "run_start"
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
    device_memory_gib: float = 0.0  # of a GPU
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class StepEnd(Record):
    """One optimizer step. `step` counts from 1; `step_s` is pure training time in seconds."""

    kind: ClassVar[str] = "step"
    step: int
    epoch: float
    loss: Annotated[float, "loss"]  # mean over the whole optimizer step, as it is
    observed_loss: Annotated[float, "loss/observed"]  # what the optimizer used: `loss`, but where it is corrected
    reading: Reading
    ready: bool  # the optimizer's own stop signal
    grad_norm: Annotated[float, "grad_norm"]
    lr: Annotated[float, "lr"]
    step_s: Annotated[float, "step_s"]
    stop_meter: Annotated[float, "emo/stop_meter"]  # 0..1: how far the stop rule is towards its decision
    expected_end: tuple[int, int] | None = None  # first and last step it may end at, once that can be said
    memory_gib: float = 0.0
    skipped: Annotated[int, "guard/skipped"] = 0  # batches left out so far because of non-finite numbers
    gain: Annotated[float, "emo/gain"] = 1.0  # on the published step length
    samples: tuple[LossRecord, ...] = ()  # the loss of each picture of the step


@dataclass(frozen=True)
class ValidationEnd(Record):
    """The validation: loss at fixed noise and timesteps, on pictures the LoRA is not trained on (or flipped ones)."""

    kind: ClassVar[str] = "validation"
    step: int
    loss: Annotated[float, "validation/loss"]
    scalar: Annotated[float, "validation/scalar"]  # the sensors fed with the validation loss; below zero: over-training
    base_loss: float  # with the adapter off
    drift: Annotated[float | None, "validation/drift"]  # mean squared change on prompts it should not change
    best_step: int
    best_loss: Annotated[float, "validation/best_loss"]
    forecast: str = ""  # when the run will end if it does not get better
    compared_step: int | None = None  # of the best validation before this one; 0 is the base
    difference: Annotated[float | None, "validation/difference"] = None  # to that, mean of the same pictures
    difference_error: Annotated[float | None, "validation/difference_error"] = None  # standard error, over pictures
    improvement_chance: float | None = None  # of an improvement that counts
    comparison: str = ""  # these figures in words


@dataclass(frozen=True)
class SamplesDrawn(Record):
    """Pictures of one step: one path per prompt, and the sheet of all steps so far."""

    kind: ClassVar[str] = "samples"
    step: int
    paths: tuple[Path, ...]
    prompts: tuple[str, ...]
    sheet: Path
    base: str = ""  # name of the model that drew them


@dataclass(frozen=True)
class LikenessMeasured(Record):
    """How alike a step's samples and the user's pictures are to a vision model: mean cosine similarity, -1 to 1."""

    kind: ClassVar[str] = "likeness"
    step: int
    likeness: Annotated[float, "likeness"]
    base_likeness: float | None = None  # of step 0, where samples were drawn then
    among_pictures: float | None = None  # of the pictures among themselves, where there are several


@dataclass(frozen=True)
class Saved(Record):
    """A checkpoint or LoRA file that is complete on disk."""

    kind: ClassVar[str] = "saved"
    step: int
    path: Path
    best: bool = False


@dataclass(frozen=True)
class Phase(Record):
    """Long silent work has begun or goes on; `done` of `total` (total 0: unknown). `done == total` ends it."""

    kind: ClassVar[str] = "phase"
    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Notice(Record):
    """One line for the user; level `warning` or `info`."""

    kind: ClassVar[str] = "notice"
    message: str
    level: str = "warning"


@dataclass(frozen=True)
class PictureAction(Record):
    """From the end of `step` on a picture counts less or is shown less often; or, with `undone`, no longer."""

    kind: ClassVar[str] = "picture_action"
    step: int
    id: str
    action: str  # weigh | leave_out | seldom
    undone: bool
    reason: str


@dataclass(frozen=True)
class RunEnd(Record):
    """After the last file is written."""

    kind: ClassVar[str] = "run_end"
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
    report: Path | None = None  # the page of the run


Event = (
    RunStart
    | StepEnd
    | ValidationEnd
    | SamplesDrawn
    | LikenessMeasured
    | Saved
    | Phase
    | Notice
    | PictureAction
    | RunEnd
)


class Observer(Protocol):
    """Gets every event, returns nothing, must not touch the random state or the parameters."""

    def handle(self, event: Event) -> None:
        """Take note of one event."""

    def close(self) -> None:
        """The run is over, in whatever way; called once, also after an exception."""


class Observers:
    """Everyone who watches a run: one that cannot write costs lines, never the run, and that is said once."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.all = list(observers)
        self._failed: set[int] = set()

    def notify(self, event: Event) -> None:
        """Tell every observer."""
        for observer in self.all:
            try:
                observer.handle(event)
            except (OSError, ResourceError) as error:
                self.lost(observer, error)

    def lost(self, writer: object, error: Exception) -> None:
        """Say that a log or display cannot be written."""
        if id(writer) not in self._failed:
            self._failed.add(id(writer))
            self.notify(Notice(f"{type(writer).__name__} loses lines while the run goes on: {first_line(error)}"))

    def close(self) -> None:
        """Let every observer finish, whatever happened: the logs first, so that a display can still tell of them."""
        for observer in reversed(self.all):
            try:
                observer.close()
            except (OSError, ResourceError) as error:
                self.lost(observer, error)
