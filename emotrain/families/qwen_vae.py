"""The VAE of Qwen-Image, which other families take too: pictures are films of one frame to it.

Shape letters: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emotrain.families.common import Parts
from emotrain.families.flow import FlowFamily


class QwenVae(FlowFamily):
    """A flow family whose latents are normalised by a mean and a deviation per channel."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        keep_no_frames(self.vae)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return super().encode_images(pixels[:, :, None])[:, :, 0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        return super().decode_latents(latents[:, :, None])[:, :, 0]

    def normalised(self, raw: Tensor) -> Tensor:
        mean, deviation = self._statistics(raw)
        return (raw - mean) / deviation

    def unnormalised(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, [1, C, 1, 1, 1]."""
        config = self.vae.config
        values = (torch.tensor(numbers, device=like.device) for numbers in (config.latents_mean, config.latents_std))
        mean, deviation = (value.view(1, -1, 1, 1, 1) for value in values)
        return mean, deviation


def keep_no_frames(vae: Any) -> None:
    """Leave the VAE nowhere to keep its maps for the next frame, which never comes: the first one is made without.

    They are copies, more than all else that a pass holds.
    """
    vae._feat_map = vae._enc_feat_map = None
    vae.clear_cache = _nothing


def _nothing() -> None:
    """There is no cache to clear."""
