"""The weights' average over the last part of a run: what a falling learning rate does for others, at a constant one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from emotrain.optim.protocol import OptimizerLike
from emotrain.pulse.signal import Reading

POWER = 10  # step n weighs about 10/n: the average looks back over a tenth of the run, however long it is
SLOT = "average"


class Averaged:
    """An optimizer that trains as it did, but whose weights are looked at and saved as an average.

    average <- average + w (weights - average), w = 1 - (1 - 1/n)^POWER after step n: the power function average of
    Karras et al. 2024 (arXiv:2312.02696), section 3.1, eq. 2, gamma = POWER - 1. Its mean age is n / (POWER + 1) steps.
    Averaging takes out the noise of a step length that does not fall, as schedules do it by letting it fall (Polyak
    and Juditsky 1992; Sandler et al. 2023, arXiv:2301.02312). The average lies beside the parameters, in their dtype.

    Args:
        inner: the optimizer; its parameters must not be replaced.
    """

    def __init__(self, inner: OptimizerLike) -> None:
        self.inner = inner
        self.steps = 0
        self._average: list[Tensor] = []  # begun at the first step: memory is not taken before
        self._shown = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def reading(self) -> Reading | None:
        return self.inner.reading

    @property
    def should_stop(self) -> bool:
        return self.inner.should_stop

    def begin(self, loss: float) -> None:
        self.inner.begin(loss)

    def observe(self, loss: float | Tensor) -> Reading:
        return self.inner.observe(loss)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, then the average."""
        loss = self.inner.step(closure)
        self.steps += 1
        if not self._average:
            self._average = [p.detach().clone() for p in self._params()]
        weight = 1.0 - (1.0 - 1.0 / self.steps) ** POWER
        torch._foreach_lerp_(self._average, [p.detach() for p in self._params()], weight)
        return loss

    def rescale(self, scale: float) -> None:
        self.inner.rescale(scale)

    @torch.no_grad()
    def restart(self, scale: float) -> None:
        """Go on from weights that were put in place, with steps `scale` times as long.

        The average is those weights too, and looks back as far as before: over a few steps alone it would be as noisy
        as the weights, and worse than the average that was put back whatever the steps are worth.
        """
        self.inner.restart(scale)
        if self._average:
            torch._foreach_copy_(self._average, [p.detach() for p in self._params()])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state with a slot more for each parameter."""
        packed = self.inner.state_dict()
        state = {index: dict(slots) for index, slots in packed["state"].items()}
        for index, average in enumerate(self._average):
            state.setdefault(index, {})[SLOT] = average.clone()
        return {**packed, "state": state, "averaged_steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly from `state_dict`, which is not touched.

        Raises:
            WrongStateError: it belongs to another optimizer.
            KeyError: it is of a run without an average.
        """
        state = {index: dict(slots) for index, slots in state_dict["state"].items()}
        steps = int(state_dict["averaged_steps"])
        params = self._params() if steps else []
        averages = [state[index].pop(SLOT) for index in range(len(params))]
        rest = {key: value for key, value in state_dict.items() if key != "averaged_steps"}
        self.inner.load_state_dict({**rest, "state": {index: slots for index, slots in state.items() if slots}})
        self.steps = steps
        self._average = [torch.empty_like(p.detach()).copy_(a) for p, a in zip(params, averages, strict=True)]

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Within it the parameters are the average."""
        was = self._shown
        self._show(True)
        try:
            yield
        finally:
            self._show(was)

    def _show(self, shown: bool) -> None:
        """Exchange the parameters' memory with the average's: nothing is copied."""
        if shown == self._shown or not self._average:
            return
        self._shown = shown
        for place, parameter in enumerate(self._params()):
            parameter.data, self._average[place] = self._average[place], parameter.data

    def _params(self) -> list[Tensor]:
        return [p for group in self.inner.param_groups for p in group["params"]]
