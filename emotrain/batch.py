"""What the data set hands to the loop, and the loop to the denoiser.

Shape letters: B samples, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

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
