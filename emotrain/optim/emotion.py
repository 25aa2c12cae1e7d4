"""EmoTion: the sign of a momentum that refreshes itself when the weights change size."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from emotrain.optim.base import EmoOptimizer
from emotrain.optim.kernels import Batch, Tensors, descend, l1_norm


class EmoTion(EmoOptimizer):
    """EmoTion 3.9; after muooon's EmoTion (Apache-2.0); no weight decay, as in the source.

    G = sum of the L1 norms of the first group's tensors with gradients;  ratio = |G - prev| / (prev
    + 1e-8); fresh = max(tanh(ratio / 0.03), 1-b1), 1 at the first step;  a = (1-b1) fresh;
    m = (1-a) m + a g;  p -= eta sign(m);  prev = G at the first step, else G ratio.

    G stays on the device as a float32 number: a step waits for nothing. State: once the parameters.
    """

    name: ClassVar[str] = "emotion"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._previous: Tensor | None = None
        self._fresh: Tensor | float = 1.0
        super().__init__(*args, **kwargs)

    def _slots(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def _prepare(self, members: list[list[Tensor]]) -> None:
        if not members[0]:
            return
        norm = l1_norm(members[0])
        if self._previous is None:
            self._previous, self._fresh = norm, torch.ones_like(norm)
            return
        previous = self._previous.to(norm.device)
        ratio = (norm - previous).abs() / (previous + 1e-8)
        self._fresh = torch.tanh(ratio / 0.03)
        self._previous = norm * ratio

    def _update(self, batch: Batch, group: dict[str, Any]) -> None:
        m, share = batch.state["exp_avg"], 1.0 - group["betas"][0]
        fresh = torch.as_tensor(self._fresh, device=m[0].device)
        amount = share * fresh.clamp(min=share)
        rest = 1.0 - amount
        batch.decay = 0.0

        def direction(part: slice) -> Tensors:
            torch._foreach_mul_(m[part], rest)
            torch._foreach_add_(m[part], torch._foreach_mul(batch.grads[part], amount))
            return torch._foreach_sign(m[part])

        descend(batch, direction)

    def _memory(self) -> dict[str, float]:
        return {} if self._previous is None else {"previous": float(self._previous)}

    def _recall(self, memory: dict[str, float]) -> None:
        self._previous = torch.tensor(memory["previous"]) if "previous" in memory else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_previous": self._previous, "_fresh": self._fresh}
