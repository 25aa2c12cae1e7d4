"""The repeated blocks of a denoiser while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from emotrain.errors import first_line

Backend = str | Callable[..., Any]
MOST_FORMS = 64  # forms of one kind of block: widths, dtypes and LoRA layers that differ each need one


def checkpoint_blocks(denoiser: Any) -> None:
    """Keep of each block its inputs alone (gradient checkpointing).

    Nothing in a frozen model draws random numbers, so their state is not kept for the second pass: asking for it cannot
    be recorded in a CUDA graph.
    """
    denoiser.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


def can_compile() -> bool:
    """Whether this torch has the settings that `compile_blocks` needs: 2.6 has them not."""
    forms, backward = torch._dynamo.config, torch._functorch.config
    return hasattr(forms, "recompile_limit") and hasattr(backward, "force_non_lazy_backward_lowering")


def compile_blocks(
    denoiser: nn.Module, kinds: Sequence[str], notify: Callable[[str], None], *, backend: Backend = "inductor"
) -> CompiledBlocks:
    """Let `torch.compile` make kernels of the blocks' passes with gradients; where it cannot, they stay as they are.

    One form serves all blocks of a kind and all sizes of pictures. Passes without gradients (validation, samples) are
    not compiled: each would need forms of its own, for a small part of a run.

    Args:
        denoiser: a model whose LoRA is on it.
        kinds: class names of its repeated blocks.
        notify: gets one line where compiling does not work.
        backend: of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_FORMS)
    # the backward pass with the forward pass: what fails, fails where the plain form can still take its place
    torch._functorch.config.force_non_lazy_backward_lowering = True
    blocks = CompiledBlocks(notify)
    for block in denoiser.modules():
        if type(block).__name__ in kinds:
            block.forward = blocks.wrap(block.forward, backend)
    return blocks


class CompiledBlocks:
    """The compiled forms of a model's blocks; `works` until one fails, and from then on the plain ones run."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.notify, self.works = notify, True

    def wrap(self, forward: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
        """The compiled form of a block's forward, or the plain one."""
        compiled = torch.compile(forward, dynamic=True, backend=backend)

        def either(*args: Any, **kwargs: Any) -> Any:
            if not (self.works and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what torch.compile raises; an error of the model itself comes again below
                self.works = False
                cause = getattr(error, "inner_exception", error)
                self.notify(f"the model's blocks are not compiled: {first_line(cause)}")
            return forward(*args, **kwargs)

        return either
