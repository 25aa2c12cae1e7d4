"""What the training loop asks of an optimizer, emo or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from emotrain.pulse.reading import Reading


class OptimizerLike(Protocol):
    """An optimizer that is told the loss of each step."""

    param_groups: list[dict[str, Any]]
    reading: Reading | None

    @property
    def should_stop(self) -> bool:
        """Whether the optimizer's own stop signal is lit."""

    def observe(self, loss: float | Tensor) -> Reading:
        """Tell the mean loss of the whole step; call it before `step`."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on exactly."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""

    def eval_mode(self) -> AbstractContextManager[None]:
        """Within it the parameters are the ones to look at and to save (schedule-free averages them)."""

    def train_mode(self) -> AbstractContextManager[None]:
        """Within it the parameters are the ones to train."""
