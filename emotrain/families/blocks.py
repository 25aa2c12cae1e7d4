"""The repeated blocks of a denoiser while it trains."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(denoiser: Any) -> None:
    """Keep of each block its inputs alone (gradient checkpointing).

    Nothing in a frozen model draws random numbers, so their state is not kept for the second pass: asking for it cannot
    be recorded in a CUDA graph.
    """
    denoiser.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
