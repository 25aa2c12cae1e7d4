"""EmoAiry and EmoFact: the sign of the gradient at the emotion's step length, without any state."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from emotrain.optim.base import EmoOptimizer
from emotrain.optim.kernels import Batch, descend


class EmoAiry(EmoOptimizer):
    """EmoAiry, generations 3.9, 3.7.6 ("3.7") and 3.7.0; after muooon's EmoAiry (Apache-2.0).

    p -= pulse wd p;  p -= eta sign(g)

    The source keeps row and column statistics, divides the gradient by a positive number made of
    them and then takes the sign: they cannot change the result. So none are held here: the
    trajectory is the same, the state empty.
    """

    name: ClassVar[str] = "emoairy"
    generations: ClassVar[tuple[str, ...]] = ("3.9", "3.7.6", "3.7.0")

    def _update(self, batch: Batch, group: dict[str, Any]) -> None:
        descend(batch, lambda part: torch._foreach_sign(batch.grads[part]))


class EmoFact(EmoAiry):
    """EmoFact 3.6; after muooon's EmoFact (Apache-2.0). The rule of EmoAiry, and for the same reason no state.

    p -= lr wd p;  p -= lr drive sign(g)
    """

    name: ClassVar[str] = "emofact"
    generations: ClassVar[tuple[str, ...]] = ("3.6",)
