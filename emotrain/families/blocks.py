"""The repeated blocks of a denoiser while it trains: computed again in the backward pass, or compiled.

A model's blocks of one kind share one compiled form: compiling takes as long for 70 of them as for one. Passes without
gradients (validations, samples) stay as they are: each would ask for a form of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

FORMS = 64  # compiled forms of one kind of block: widths of a UNet's levels, with and without gradients, sizes


def checkpoint_blocks(denoiser: Any) -> None:
    """Keep of each block its inputs alone (gradient checkpointing).

    Nothing in a frozen model draws random numbers, so their state is not kept for the second pass: asking for it cannot
    be recorded in a CUDA graph.
    """
    denoiser.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


def compile_blocks(model: nn.Module, kinds: Sequence[str], backend: str = "inductor") -> Callable[[], None]:
    """Let blocks of these classes be compiled at their next pass with gradients; gives what takes it back."""
    torch._dynamo.config.recompile_limit = FORMS
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    for block in blocks:
        block.forward = _forward(block.forward, torch.compile(block.forward, backend=backend))

    def undo() -> None:
        for block in blocks:
            del block.forward

    return undo


def _forward(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward
