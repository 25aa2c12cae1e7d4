"""A gain on the emotion's step length, measured by the validation: what LR 1.0 is on this model and these pictures.

The published step length has a fixed unit, 1e-4 times what the loss says. How long a step may be depends on the model,
the network and the pictures as well, and no loss of single steps tells. So a run begins at START times the published
length. Where PATIENCE validations in a row bring no new best, the best weights are put back and the gain is multiplied
by SHRINK; when VAIN gains in a row have each brought less than NEGLIGIBLE of the whole improvement, the run is done.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

START = 3.0
SHRINK = 1.0 / 3.0  # the second gain is the published unit
PATIENCE = 2  # validations in a row without a new best
VAIN = 2  # gains in a row that brought next to nothing
NEGLIGIBLE = 0.005  # of the improvement over the base
LOWEST = 0.01  # a run that is not finite at this gain is not finite because of something else
HOPE = 200  # steps in which a gain that brings nothing does not count while nothing is better than the base


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
    vain: int = 0  # gains in a row that brought next to nothing
    mark: float | None = None  # the lowest loss when the gain changed last; None: the base's
    validated: int = 0  # the step of the last validation
    interval: int = 0  # steps between the last two
    now: Path = field(default_factory=Path)
    best: Path = field(default_factory=Path)
    reductions: list[tuple[int, float]] = field(default_factory=list)  # (step, gain from there on)

    @property
    def done(self) -> bool:
        """No other gain will bring more."""
        return self.vain >= VAIN

    def update_step(self, length: float) -> None:
        """Take in one step of that length (the learning rate in use)."""
        self.now = Path(self.now.steps + 1, self.now.length + length, self.now.gain + self.value)

    def update_validation(self, step: int, *, is_best: bool, best_loss: float, base_loss: float) -> bool:
        """Take in one validation; true when the gain was lowered and the best weights are to be put back."""
        self.interval, self.validated = step - self.validated, step
        if is_best:
            self.failed, self.best = 0, self.now
            return False
        self.failed += 1
        if self.failed < PATIENCE or self.done:
            return False
        improvement = base_loss - best_loss
        brought = (base_loss if self.mark is None else self.mark) - best_loss
        if brought > NEGLIGIBLE * improvement:
            self.vain = 0
        elif improvement > 0.0 or step >= HOPE:
            self.vain += 1
        self.mark = best_loss
        if not self.done:
            self._lower(step)
        return not self.done

    def update_divergence(self, step: int) -> bool:
        """Numbers were not finite; true when the gain was lowered and the best weights are to be put back."""
        if self.value <= LOWEST:
            return False
        self._lower(step)
        return True

    def _lower(self, step: int) -> None:
        self.failed = 0
        self.value *= SHRINK
        self.now = self.best
        self.reductions.append((step, self.value))

    def progress(self) -> float:
        """0..1: how far it is towards `done`."""
        return 1.0 if self.done else (self.vain * PATIENCE + self.failed) / (VAIN * PATIENCE)

    def missing(self, best_loss: float, base_loss: float) -> int:
        """How many more validations it takes until it is done, if none of them is better."""
        trial = replace(self, reductions=[])
        for count in range(2 * VAIN * PATIENCE + HOPE):
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
            "reductions": [list(change) for change in self.reductions],
            "steps": self.best.steps,
            "step_length": self.step_length(),
        }

    def to_document(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Gain:
        """Inverse of `to_document`."""
        values = {name.name: document[name.name] for name in fields(cls)}
        reductions = [(int(step), float(value)) for step, value in values["reductions"]]
        return cls(**{**values, "now": Path(**values["now"]), "best": Path(**values["best"]), "reductions": reductions})
