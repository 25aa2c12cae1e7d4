"""Two validations of the same pictures, noise and timesteps: how much better one is, and how sure that is.

What differs between pictures is the same in both and falls out of the difference, so that a few pictures say more of it
than of the loss itself. The picture is the unit, each with the mean of its draws: draws of one picture are not
independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


def share_above(t: float, degrees: int) -> float:
    """Probability that Student's t is above `t`: the finite series for whole degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    within = math.sin(angle) * total
    return 0.5 - (angle + within) / math.pi if odd else 0.5 - within / 2


@dataclass(frozen=True)
class Paired:
    """A validation beside the best before it.

    Args:
        step: of the validation.
        best_step: of the best before it; 0 is the base.
        difference: mean over the pictures of its loss minus the best's; below zero it is better.
        error: standard error of that; None with one picture.
        pictures: how many.
        gained: what the better of both has gained over the base.
        base_loss: of the base.
        negligible: share of the gain that an improvement has to have to count.
    """

    step: int
    best_step: int
    difference: float
    error: float | None
    pictures: int
    gained: float
    base_loss: float
    negligible: float

    @classmethod
    def of(cls, losses: Sequence[float], best: Sequence[float], **facts: Any) -> Paired:
        """From the losses of the same pictures, in the same order; `facts` are the other fields."""
        differences = [new - old for new, old in zip(losses, best, strict=True)]
        count = len(differences)
        mean = math.fsum(differences) / count
        error = None
        if count > 1:
            error = math.sqrt(math.fsum((each - mean) ** 2 for each in differences) / (count - 1) / count)
        return cls(difference=mean, error=error, pictures=count, **facts)

    @property
    def chance(self) -> float | None:
        """Of an improvement that counts, for other pictures of the kind; None with one picture or nothing gained."""
        if self.error is None or not self.best_step or self.gained <= 0.0:
            return None
        missing = self.negligible * self.gained + self.difference
        if self.error == 0.0:
            return float(missing <= 0.0)
        return share_above(missing / self.error, self.pictures - 1)

    def words(self) -> str:
        """Such as `worse than step 300 by 0.2% of the gain, plus or minus 0.4%; ...`."""
        beside, whole, of = f"step {self.best_step}", self.gained, "the gain"
        if not self.best_step or self.gained <= 0.0:
            beside, whole, of = "the base model" if not self.best_step else beside, self.base_loss, "the base's loss"
        if whole <= 0.0:
            return ""
        said = f"{'better' if self.difference < 0.0 else 'worse'} than {beside}"
        said = f"{said} by {abs(self.difference) / whole:.1%} of {of}"
        if self.error is None:
            return f"{said} (one picture, so nobody knows how sure that is)"
        said += f", plus or minus {self.error / whole:.1%}"
        if self.chance is None:
            return said
        likely = f"{self.chance:.0%}"
        if not 0.01 <= self.chance <= 0.99:
            likely = "below 1%" if self.chance < 0.5 else "above 99%"
        return f"{said}; the chance of an improvement of {100 * self.negligible:g}% is {likely}"

    def summary(self) -> dict[str, Any]:
        return {**asdict(self), "chance": self.chance, "words": self.words()}
