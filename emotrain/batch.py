"""What the data set hands to the loop, and the loop to the denoiser.

Shape letters: B samples, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

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
