"""What the data set hands to the loop, and the loop to the denoiser; and how tensors get to a device, and from it.

They travel in one copy, packed as bytes; to the device out of page-locked memory where that lets the host go on. A copy
of each tensor would cost a wait for the device each: a checkpoint of SDXL's LoRA alone has 1,444 of them.

Shape letters: B samples, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 2**28  # bytes that `fetch` packs on the device at a time
ALIGNED = 16  # bytes: where a tensor may begin, whatever its dtype
Unpack = Callable[[Tensor], list[Tensor]]
TextEmbeds = dict[str, Tensor]  # "prompt_embeds" [B, S, D]; "pooled_prompt_embeds" [B, D] where the family has them


def embeddings_and_masks(text: TextEmbeds) -> tuple[TextEmbeds, TextEmbeds]:
    """What goes to the device, and the masks, which stay on the CPU: there they are counted without waiting for it."""
    embeddings = {key: value for key, value in text.items() if value.is_floating_point()}
    return embeddings, {key: value for key, value in text.items() if key not in embeddings}


@dataclass(frozen=True)
class Conditioning:
    """Sizes in pixels that some families take besides the text (SDXL micro-conditioning, arXiv:2307.01952 2.2).

    Each tensor is int64 [B, 2]: (height, width), and (top, left) for the crop.
    """

    original_sizes: Tensor
    crop_top_lefts: Tensor
    target_sizes: Tensor


class Labels(NamedTuple):
    """What can be said of a micro-batch without its tensors."""

    ids: tuple[str, ...]
    captioned: tuple[bool, ...]  # False where the caption was dropped
    latent_size: tuple[int, int]  # height and width


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket size, on the CPU."""

    latents: Tensor  # float32 [B, C, H, W]
    text: TextEmbeds  # float32, one row a sample; {} where texts are not encoded ahead
    conditioning: Conditioning
    weights: Tensor  # float32 [B]: 1, or the prior weight of regularisation pictures
    masks: Tensor | None  # float32 [B, 1, H, W] in 0..1
    ids: tuple[str, ...]
    epoch: int
    texts: tuple[str, ...] = ()  # what each sample is trained with

    @property
    def labels(self) -> Labels:
        """What it is, without its tensors."""
        height, width = self.latents.shape[-2:]
        return Labels(self.ids, tuple(bool(text) for text in self.texts or self.ids), (height, width))


# ------------------------------------------------------------ to a device and back


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
