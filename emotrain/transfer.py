"""Tensors to a device, and from it, in one copy: packed as bytes.

To the device out of page-locked memory where that lets the host go on. A copy of each tensor would cost a wait for the
device each: a checkpoint of SDXL's LoRA alone has 1,444 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

AT_ONCE = 2**28  # bytes that `fetch` packs on the device at a time
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


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU, each with memory of its own: one transfer from the device for all, in pieces of `AT_ONCE`."""
    made = [tensor.detach() for tensor in tensors]
    away = [index for index, tensor in enumerate(made) if tensor.device.type != "cpu"]
    for index, tensor in enumerate(made):
        if tensor.device.type == "cpu":
            made[index] = tensor.clone(memory_format=torch.contiguous_format)
    away.sort(key=lambda index: -made[index].element_size())  # so that each begins where its dtype may
    while away:
        count, size = 0, 0
        while count < len(away) and (not count or size + made[away[count]].nbytes <= AT_ONCE):
            size += made[away[count]].nbytes
            count += 1
        now, away = away[:count], away[count:]
        for index, tensor in zip(now, _fetch_packed([made[index] for index in now]), strict=True):
            made[index] = tensor
    return made


def _fetch_packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As `fetch`, of tensors on one device whose elements do not grow from one to the next."""
    packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors]).cpu()
    pieces = torch.split(packed, [tensor.nbytes for tensor in tensors])
    return [piece.view(t.dtype).view(t.shape).clone() for piece, t in zip(pieces, tensors, strict=True)]
