"""EmoVoid: the sign of the gradient, with the weights' size held still in the first steps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from emotrain.optim.base import EmoOptimizer
from emotrain.optim.batches import Batch
from emotrain.optim.kernels import descend, l1_norm

HELD_STEPS = 55


class EmoVoid(EmoOptimizer):
    """EmoVoid 3.9; after muooon's EmoVoid (Apache-2.0). Weight decay is not applied, as in the
    source.

    G = sum of the L1 norms of the first group's tensors with gradients; in the first 55 steps, and
    in one more when the stop signal turns on, p *= prev / (G + 1e-8) (first group) and G likewise;
    prev = G;  p -= eta sign(g).

    G stays on the device as a float32 number: a step waits for nothing. No state tensors.
    """

    name: ClassVar[str] = "emovoid"
    chunk_elements: ClassVar[int | None] = 1 << 17

    def __init__(self, *args: Any, **words: Any) -> None:
        self._previous: Tensor | None = None
        self._count = 0
        super().__init__(*args, **words)

    def _prepare(self, members: list[list[Tensor]]) -> None:
        self._count += 1
        if not members[0]:
            return
        norm = l1_norm(members[0])
        if self._previous is not None and self._count <= HELD_STEPS:
            ratio = self._previous.to(norm.device) / (norm + 1e-8)
            torch._foreach_mul_(members[0], ratio)
            norm = norm * ratio
        self._previous = norm

    def _turned_on(self) -> None:
        self._count = HELD_STEPS

    def _update(self, batch: Batch, group: dict[str, Any]) -> None:
        batch.decay = 0.0
        descend(batch, torch._foreach_sign(batch.grads))

    def _memory(self) -> dict[str, float]:
        memory: dict[str, float] = {"count": self._count}
        return memory if self._previous is None else {**memory, "previous": float(self._previous)}

    def _recall(self, memory: dict[str, float]) -> None:
        self._count = int(memory["count"])
        self._previous = torch.tensor(memory["previous"]) if "previous" in memory else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_previous": self._previous, "_count": self._count}
