"""The shadow: a slow copy of the weights that pulls them back while the emotion is high."""

from __future__ import annotations

import torch

from emotrain.optim.batches import Batch
from emotrain.pulse.reading import Reading


def follow_shadow(batch: Batch, reading: Reading) -> None:
    """One step of the shadow, before the update; all generations, after muooon's EmoNavi and EmoSens (Apache-2.0).

    ratio = 1 - |scalar| where |scalar| > 0.625, else 0. With ratio > 0: p = (1-ratio) p + |trust| shadow; otherwise
    shadow += 0.1 |trust| (p - shadow).

    Args:
        batch: with state "shadow"; its params and shadows are changed in place.
        reading: of this step.
    """
    shadows, trust = batch.state["shadow"], abs(reading.trust)
    ratio = 1.0 - abs(reading.scalar) if abs(reading.scalar) > 0.625 else 0.0
    if ratio > 0.0:
        torch._foreach_mul_(batch.params, 1.0 - ratio)
        torch._foreach_add_(batch.params, torch._foreach_mul(shadows, trust))
    else:
        torch._foreach_lerp_(shadows, batch.params, 0.1 * trust)
