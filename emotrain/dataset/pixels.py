"""From a decoded picture to the tensors of one placement.

Shape letters: C channels, H W height and width in pixels; h w in latents.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emotrain.dataset.buckets import Placement


def to_pixels(image: Image.Image, placement: Placement) -> Tensor:
    """An RGB picture scaled (Lanczos) and cut as placed: float32 [3, H, W] in -1..1."""
    values = np.asarray(_placed(image, placement, Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(values / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def to_mask(mask: Image.Image, placement: Placement, vae_scale: int) -> Tensor:
    """A gray mask of the whole picture as the weight of each latent: float32 [1, h, w] in 0..1.

    The mask is stretched to the picture where their sizes differ; a latent's weight is the mean of
    its pixels.
    """
    placed = _placed(mask.convert("L"), placement, Image.Resampling.BOX)
    size = (placement.bucket_w // vae_scale, placement.bucket_h // vae_scale)
    values = np.asarray(placed.resize(size, Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(values / 255.0)[None]


def _placed(image: Image.Image, placement: Placement, resampling: Image.Resampling) -> Image.Image:
    size = (placement.resize_w, placement.resize_h)
    if image.size != size:
        image = image.resize(size, resampling)
    left, top = placement.crop_left, placement.crop_top
    return image.crop((left, top, left + placement.bucket_w, top + placement.bucket_h))
