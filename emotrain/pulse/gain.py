"""A gain on the emotion's step length, measured by the validation: what LR 1.0 is on this model and these pictures.

The published step length has a fixed unit, 1e-4 times what the loss says. How long a step may be depends on the model,
the network and the pictures as well, and no loss of single steps tells. So a run begins at START times the published
length. Where FAILURES validations in a row bring no new best, the best weights are put back and the gain is divided by
FACTOR; when VAIN gains in a row, none above START, have each brought less than NEGLIGIBLE of the whole improvement,
the run is done.

Where SURE validations in a row have each been better than the best before by more than their standard error, the steps
are shorter than they could be: the gain is multiplied by FACTOR. Gains above START fail before everything is learned,
as they are tried until they do, so they say nothing about whether the run is done.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

FACTOR = 3.0  # from one gain to the next
START = FACTOR  # the second gain is the published unit
FAILURES = 2  # validations in a row without a new best
SURE = 10  # validations in a row, each surely better: half of all that a small set takes to be learned
VAIN = 2  # gains in a row, none above START, that brought next to nothing
NEGLIGIBLE = 0.005  # of the improvement over the base
LOWEST = 0.01  # a run that is not finite at this gain is not finite because of something else
HOPE = 200  # steps that a run gets in which no validation is better than the base


class Change(StrEnum):
    """What a validation did to the step length; the values end the sentence `step length ...`."""

    NONE = ""
    RAISED = "tripled"
    LOWERED = "reduced to a third"

    @property
    def factor(self) -> float:
        """On the step length."""
        return {Change.RAISED: FACTOR, Change.LOWERED: 1.0 / FACTOR}.get(self, 1.0)

    @property
    def why(self) -> str:
        """What brought it about."""
        return {
            Change.RAISED: f"{SURE} validations in a row were each better by more than their standard error",
            Change.LOWERED: f"{FAILURES} validations without improvement",
        }.get(self, "")


@dataclass
class Path:
    """Steps that weights are made of; those between a best validation and the return to it are not among them."""

    steps: int = 0
    length: float = 0.0  # sum of the step lengths
    gain: float = 0.0  # sum of the gains


@dataclass
class Gain:
    """The factor on the step length, and what it has brought.

    Args:
        value: the factor now.
    """

    value: float = START
    failed: int = 0  # validations in a row without a new best
    sure: int = 0  # validations in a row that were better by more than their standard error
    vain: int = 0  # gains in a row, none above START, that brought next to nothing
    mark: float | None = None  # the lowest loss when the gain changed last; None: the base's
    validated: int = 0  # the step of the last validation
    interval: int = 0  # steps between the last two
    now: Path = field(default_factory=Path)
    best: Path = field(default_factory=Path)
    changes: list[tuple[int, float]] = field(default_factory=list)  # (step, gain from there on)

    @property
    def done(self) -> bool:
        """No other gain will bring more."""
        return self.vain >= VAIN

    def update_step(self, length: float) -> None:
        """Take in one step of that length (the learning rate in use)."""
        self.now = Path(self.now.steps + 1, self.now.length + length, self.now.gain + self.value)

    def update_validation(
        self, step: int, *, is_best: bool, best_loss: float, base_loss: float, surely: bool = False
    ) -> Change:
        """Take in one validation, `surely` better or not; what it did to the gain."""
        self.interval, self.validated = step - self.validated, step
        self.sure = self.sure + 1 if surely else 0
        if is_best:
            self.failed, self.best = 0, self.now
            if self.sure < SURE or self.done:
                return Change.NONE
            return self._change(step, Change.RAISED)
        self.failed += 1
        if self.failed < FAILURES or self.done:
            return Change.NONE
        improvement = base_loss - best_loss
        brought = (base_loss if self.mark is None else self.mark) - best_loss
        if brought > NEGLIGIBLE * improvement:
            self.vain = 0
        elif self.value <= START and (improvement > 0.0 or step >= HOPE):
            self.vain += 1
        self.mark = best_loss
        if self.done:
            return Change.NONE
        return self._change(step, Change.LOWERED)

    def update_divergence(self, step: int) -> bool:
        """Numbers were not finite; true when the gain was lowered and the best weights are to be put back."""
        if self.value <= LOWEST:
            return False
        self._change(step, Change.LOWERED)
        return True

    def _change(self, step: int, change: Change) -> Change:
        self.failed, self.sure = 0, 0
        self.value *= change.factor
        self.now = self.best
        self.changes.append((step, self.value))
        return change

    def progress(self) -> float:
        """0..1: how far it is towards `done`."""
        return 1.0 if self.done else (self.vain * FAILURES + self.failed) / (VAIN * FAILURES)

    def missing(self, best_loss: float, base_loss: float) -> int:
        """How many more validations it takes until it is done, if none of them is better."""
        trial = replace(self, changes=[])
        for count in range(2 * VAIN * FAILURES + HOPE):
            if trial.done:
                return count
            step = trial.validated + max(trial.interval, 1)
            trial.update_validation(step, is_best=False, best_loss=best_loss, base_loss=base_loss)
        return count

    def step_length(self) -> float | None:
        """Mean length of the steps that the best weights are made of."""
        return self.best.length / self.best.steps if self.best.steps else None

    def summary(self) -> dict[str, Any]:
        """What run.json says: the gain at the end and its changes, the best weights' steps and their mean length."""
        return {
            "value": self.value,
            "changes": [list(change) for change in self.changes],
            "steps": self.best.steps,
            "step_length": self.step_length(),
        }

    def to_document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Gain:
        """Inverse of `to_document`; what an earlier version did not write is as at the start."""
        known = {name.name for name in fields(cls)}
        values = {name: value for name, value in (asdict(cls()) | document).items() if name in known}
        changes = [(int(step), float(value)) for step, value in values["changes"]]
        return cls(**{**values, "now": Path(**values["now"]), "best": Path(**values["best"]), "changes": changes})
