"""Two models that take turns on one device: the frozen weights of the one wait in the computer's memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def away(model: nn.Module, device: torch.device, stays: Iterable[Tensor]) -> Iterator[None]:
    """Take what a model has on a device to the computer's memory; at the end it comes back, bit for bit.

    Parameters keep their identity, and what is at home already (offloaded blocks) is left alone.

    Args:
        model: placed, with or without a LoRA.
        device: which it leaves.
        stays: tensors that stay there: a LoRA that an optimizer knows, and whose copies are views of one buffer.
    """
    moved = leave(model, device, stays)
    try:
        yield
    finally:
        come_back(moved, device)


def leave(model: nn.Module, device: torch.device, stays: Iterable[Tensor]) -> list[tuple[Any, str]]:
    """The first half of `away`: the owners and names of the tensors that were moved."""
    kept = {id(tensor) for tensor in stays}
    moved = [place for place, tensor in _places(model) if tensor.device.type == device.type and id(tensor) not in kept]
    _move(moved, torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return moved


def come_back(moved: list[tuple[Any, str]], device: torch.device) -> None:
    """The second half of `away`."""
    _move(moved, device)


def _places(model: nn.Module) -> Iterator[tuple[tuple[Any, str], Tensor]]:
    """Every tensor of a model with its owner and name, once: parameters, buffers, and what bitsandbytes keeps aside."""
    seen = set()
    for module in model.modules():
        owners = [module, getattr(module, "state", None), getattr(module, "weight", None)]
        named = [(module, name) for name in (*module._parameters, *module._buffers)]
        named += [(owner, name) for owner in owners[1:] for name in ("CB", "SCB") if owner is not None]
        for owner, name in named:
            tensor = getattr(owner, name, None)
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield (owner, name), tensor


def _move(places: list[tuple[Any, str]], device: torch.device) -> None:
    there: dict[tuple[int, torch.Size], Tensor] = {}  # int8 layers have one tensor under two names
    for owner, name in places:
        tensor = getattr(owner, name)
        key = tensor.data_ptr(), tensor.shape
        if not tensor.numel() or key not in there:
            there[key] = tensor.data.to(device)
        if isinstance(tensor, nn.Parameter):
            tensor.data = there[key]
        else:
            setattr(owner, name, there[key])
