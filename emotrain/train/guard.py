"""Numbers that are not finite never reach optimizer or emotion; too many in a row end the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

LIMIT = 3  # steps in a row


@dataclass(frozen=True)
class Guard:
    """How many steps were left out because their loss or gradient norm was not finite.

    Ask it before `optimizer.observe`: `guard = guard.update(loss, grad_norm)`; with `leave_out` the
    step must be left out (gradients zeroed, no observe, no optimizer step).
    """

    in_a_row: int = 0
    skipped: int = 0

    def update(self, loss: float, grad_norm: float) -> Guard:
        """The guard after one step with this loss and gradient norm (before clipping)."""
        if isfinite(loss) and isfinite(grad_norm):
            return replace(self, in_a_row=0)
        return replace(self, in_a_row=self.in_a_row + 1, skipped=self.skipped + 1)

    @property
    def leave_out(self) -> bool:
        """Whether the step that was just asked about must not be taken."""
        return self.in_a_row > 0

    @property
    def diverged(self) -> bool:
        """Whether the run has to end."""
        return self.in_a_row >= LIMIT

    def to_dict(self) -> dict[str, int]:
        """Plain numbers, for the checkpoint."""
        return {"in_a_row": self.in_a_row, "skipped": self.skipped}

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Any]) -> Guard:
        """The guard that `to_dict` wrote."""
        return cls(in_a_row=int(numbers["in_a_row"]), skipped=int(numbers["skipped"]))


def describe(step: int, loss: float, grad_norm: float, ids: Iterable[str]) -> str:
    """One line for the user: what was not finite, and in which pictures' batch."""
    what = f"loss is {loss}" if not isfinite(loss) else f"gradient norm is {grad_norm}"
    names = ", ".join(dict.fromkeys(ids)) or "unknown"
    return f"step {step} left out: {what}; pictures of this step: {names}"
