"""EmoCats and EmoLynx: Lion at the emotion's step length."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from emotrain.optim.base import EmoOptimizer
from emotrain.optim.kernels import Batch, Tensors, descend


class EmoCats(EmoOptimizer):
    """EmoCats, generations 3.9, 3.7.6 ("3.7") and 3.7.0; after muooon's EmoCats (Apache-2.0).

    The rule is Lion's (Chen et al. 2023, arXiv:2302.06675):

    u = sign(b1 m + (1-b1) g);  p -= pulse wd p;  p -= eta u;  m = b2 m + (1-b2) g

    State: once the parameters.
    """

    name: ClassVar[str] = "emocats"
    generations: ClassVar[tuple[str, ...]] = ("3.9", "3.7.6", "3.7.0")

    def _decays_by_factor(self) -> bool:
        return True

    def _slots(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def _update(self, batch: Batch, group: dict[str, Any]) -> None:
        m, (beta1, beta2) = batch.state["exp_avg"], group["betas"]

        def direction(part: slice) -> Tensors:
            grads, momentum = batch.grads[part], m[part]
            lerped = torch._foreach_lerp(momentum, grads, 1.0 - beta1)
            torch._foreach_lerp_(momentum, grads, 1.0 - beta2)  # here, while it is in the cache
            torch._foreach_sign_(lerped)
            return lerped

        descend(batch, direction)


class EmoLynx(EmoCats):
    """EmoLynx 3.6; after muooon's EmoLynx (Apache-2.0). The rule of EmoCats.

    u = sign(b1 m + (1-b1) g);  p -= lr wd p;  p -= lr drive u;  m = b2 m + (1-b2) g
    """

    name: ClassVar[str] = "emolynx"
    generations: ClassVar[tuple[str, ...]] = ("3.6",)
