"""EmoSens: AdamW without bias correction at the emotion's step length."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from emotrain.optim.base import EmoOptimizer
from emotrain.optim.kernels import Batch, Tensors, descend, momentum_descent
from emotrain.pulse.signal import Watch


class EmoSens(EmoOptimizer):
    """EmoSens, generations 3.9, 3.7.6 ("3.7") and 3.7.0; after muooon's EmoSens (Apache-2.0).

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p -= pulse wd p;  p -= eta m / (sqrt(v) + eps)

    3.7.0 moves by sign(m) instead, so it holds no v; its pulse differs from tensor to tensor.
    State: twice the parameters (3.7.0: once). Not bit-exact with the source: torch's fused AdamW
    kernel does it in one pass, with differences of one rounding.
    """

    name: ClassVar[str] = "emosens"
    generations: ClassVar[tuple[str, ...]] = ("3.9", "3.7.6", "3.7.0")
    watch: ClassVar[Watch] = "long"

    def _slots(self) -> tuple[str, ...]:
        return ("exp_avg",) if self.generation == "3.7.0" else ("exp_avg", "exp_avg_sq")

    def _update(self, batch: Batch, group: dict[str, Any]) -> None:
        if self.generation != "3.7.0":
            momentum_descent(batch, betas=group["betas"], eps=group["eps"], correction=self._correction(group))
            return
        m, beta1 = batch.state["exp_avg"], group["betas"][0]

        def direction(part: slice) -> Tensors:
            torch._foreach_lerp_(m[part], batch.grads[part], 1.0 - beta1)
            return torch._foreach_sign(m[part])

        descend(batch, direction)
