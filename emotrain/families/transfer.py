"""Tensors to a device in one copy: packed as bytes, out of page-locked memory where that lets the host go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALIGNED = 16  # bytes: where a tensor may begin, whatever its dtype
Unpack = Callable[[Tensor], list[Tensor]]


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The CPU's tensors on the device, by one copy that nothing waits for.

    A copy from common (pageable) memory makes the host wait for all that the device has still to do.
    """
    if device.type == "cpu":
        return list(tensors)
    size, unpack = layout(tensors)
    return unpack(pack(tensors, size, unpack, device).to(device, non_blocking=True))


def pack(tensors: Sequence[Tensor], size: int, unpack: Unpack, device: torch.device) -> Tensor:
    """The CPU's tensors as bytes, uint8 [size], in memory from which a copy to the device lets the host go on."""
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    fill(packed, unpack, tensors)
    return packed


def layout(tensors: Sequence[Tensor]) -> tuple[int, Unpack]:
    """How many bytes the tensors take in one, and what finds them in it again, as views."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    room = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    kinds = [(size, tensor.dtype, tensor.shape) for size, tensor in zip(sizes, tensors, strict=True)]

    def unpack(whole: Tensor) -> list[Tensor]:
        pieces = zip(torch.split(whole, room), kinds, strict=True)
        return [piece[:size].view(dtype).view(shape) for piece, (size, dtype, shape) in pieces]

    return sum(room), unpack


def fill(packed: Tensor, unpack: Unpack, tensors: Sequence[Tensor]) -> None:
    """Write the tensors to their places in the uint8 tensor."""
    for place, tensor in zip(unpack(packed), tensors, strict=True):
        place.copy_(tensor)
