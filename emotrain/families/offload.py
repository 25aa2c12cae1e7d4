"""Frozen layers that stay in the computer's memory and visit the GPU for their turn.

Why not diffusers' `apply_group_offloading`: it is made for inference. It takes a layer's parameters home
when its forward pass is done, and autograd, which remembers a frozen norm weight as the parameter itself,
finds the one at home in the backward pass: another device, an error (with gradient checkpointing too,
since the block is computed again under the same hooks). Without streams it takes the LoRA's trained
weights home as well, away from their gradients. A test holds diffusers to this: when it fails, this file
may go.

Here only Linear layers move, which are nearly all of a model. Their backward pass keeps the moved copy
alive (autograd saves a view of it), so the parameter may go home as soon as its forward pass is done.
Use it with gradient checkpointing: without, all moved copies stay until the backward pass. Not measured
on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Move = Callable[[Tensor], Tensor]


def offload_linears(model: nn.Module, device: torch.device, move: Move | None = None) -> frozenset[nn.Module]:
    """Keep the weights of all Linear layers at home, and move everything else to `device`.

    Call it before a LoRA is added: peft wraps the layers, and what it adds is no Linear layer of
    the base any more; `move_rest` then moves that too.

    Args:
        model: the denoiser, on the CPU.
        device: where its arithmetic is done.
        move: brings a tensor to the device (default: a copy that need not be waited for).

    Returns:
        The layers whose weights stay at home.
    """
    move = move or (lambda tensor: tensor.to(device, non_blocking=True))
    linears = frozenset(module for module in model.modules() if isinstance(module, nn.Linear))
    for module in linears:
        _visit(module, _home(module.weight, device), move)
    move_rest(model, linears, device)
    return linears


def move_rest(model: nn.Module, stay: frozenset[nn.Module], device: torch.device) -> None:
    """Move all parameters and buffers to `device` but the weights of the layers in `stay`."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not (module in stay and name == "weight"):
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=_persists(module, name))


def _persists(module: nn.Module, name: str) -> bool:
    return name not in module._non_persistent_buffers_set


def _home(weight: Tensor, device: torch.device) -> Tensor:
    home = weight.detach()
    return home.pin_memory() if device.type == "cuda" else home


def _visit(module: nn.Linear, home: Tensor, move: Move) -> None:
    """Move the weight in before the layer's forward pass, and home again after it."""
    module.weight.data = home

    def come(layer: nn.Module, args: Any) -> None:
        module.weight.data = move(home)

    def go(layer: nn.Module, args: Any, output: Any) -> None:
        module.weight.data = home

    module.register_forward_pre_hook(come)
    module.register_forward_hook(go, always_call=True)
