"""What the training loop asks of an optimizer, emo or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from emotrain.pulse.signal import Reading


class OptimizerLike(Protocol):
    """An optimizer that is told the loss of each step."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their settings, as torch has them."""

    @property
    def reading(self) -> Reading | None:
        """The last reading, None before the first loss."""

    @property
    def should_stop(self) -> bool:
        """Whether the optimizer's own stop signal is lit."""

    def begin(self, loss: float) -> None:
        """Tell what the loss is before the first step, as the mean of many."""

    def observe(self, loss: float | Tensor) -> Reading:
        """Tell the mean loss of the whole step; call it before `step`."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters."""

    def rescale(self, scale: float) -> None:
        """Go on with steps `scale` times as long."""

    def restart(self, scale: float) -> None:
        """The same from weights that were put in place."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on exactly."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""

    def eval_mode(self) -> AbstractContextManager[None]:
        """Within it the parameters are the ones to look at and to save (an average, where one is kept)."""
