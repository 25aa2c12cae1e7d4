"""EmoVoid: the sign of the gradient, with the weights' size held still in the first steps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from emotrain.optim.base import EmoOptimizer
from emotrain.optim.kernels import Batch, descend, l1_norm

HELD_STEPS = 56  # the source counts from 0 to 55


class EmoVoid(EmoOptimizer):
    """EmoVoid 3.9; after muooon's EmoVoid (Apache-2.0); no weight decay, as in the source.

    G = sum of the L1 norms of the first group's tensors with gradients; in steps 2 to 56, and in the
    one after the step in which the stop signal turns on, p *= prev / (G + 1e-8) (first group) and G
    likewise;  prev = G;  p -= eta sign(g).

    G stays on the device as a float32 number: a step waits for nothing. No state tensors.
    """

    name: ClassVar[str] = "emovoid"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._previous: Tensor | None = None
        self._count = 0  # steps done, at most one more than are held
        self._again = False  # the signal turned on: the step after this one is held once more
        super().__init__(*args, **kwargs)

    def _prepare(self, members: list[list[Tensor]]) -> None:
        held = self._count < HELD_STEPS
        self._count = HELD_STEPS - 1 if self._again else min(self._count + 1, HELD_STEPS)
        self._again = False
        if not members[0]:
            return
        norm = l1_norm(members[0])
        if self._previous is not None and held:
            ratio = self._previous.to(norm.device) / (norm + 1e-8)
            torch._foreach_mul_(members[0], ratio)
            norm = norm * ratio
        self._previous = norm

    def _turned_on(self) -> None:
        self._again = True

    def _update(self, batch: Batch, group: dict[str, Any]) -> None:
        batch.decay = 0.0
        descend(batch, lambda part: torch._foreach_sign(batch.grads[part]))

    def _memory(self) -> dict[str, float]:
        memory: dict[str, float] = {"count": self._count, "again": self._again}
        return memory if self._previous is None else {**memory, "previous": float(self._previous)}

    def _recall(self, memory: dict[str, float]) -> None:
        self._count, self._again = int(memory["count"]), bool(memory["again"])
        self._previous = torch.tensor(memory["previous"]) if "previous" in memory else None

    def __getstate__(self) -> dict[str, Any]:
        own = {"_previous": self._previous, "_count": self._count, "_again": self._again}
        return {**super().__getstate__(), **own}
