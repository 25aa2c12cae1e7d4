"""EmoNavi: AdamW without bias correction, the user's learning rate times emoDrive."""

from __future__ import annotations

from typing import Any, ClassVar

from emotrain.optim.base import EmoOptimizer
from emotrain.optim.kernels import Batch, momentum_descent
from emotrain.pulse.signal import Watch


class EmoNavi(EmoOptimizer):
    """EmoNavi 3.6; after muooon's EmoNavi (Apache-2.0). lr is a learning rate (1e-3), and schedulers can move it.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p -= lr wd p;  p -= lr drive m / (sqrt(v) + eps)

    State: twice the parameters.
    """

    name: ClassVar[str] = "emonavi"
    generations: ClassVar[tuple[str, ...]] = ("3.6",)
    watch: ClassVar[Watch] = "long"

    def _slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _update(self, batch: Batch, group: dict[str, Any]) -> None:
        momentum_descent(batch, betas=group["betas"], eps=group["eps"], correction=self._correction(group))
