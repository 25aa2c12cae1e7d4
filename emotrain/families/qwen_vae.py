"""The VAE of Qwen-Image, which other families take too: pictures are films of one frame to it.

Shape letters: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emotrain.families.flow import FlowFamily


class QwenVae(FlowFamily):
    """A flow family whose latents are normalised by a mean and a deviation per channel."""

    vae_encoder_may_go = False  # its decoder clears the caches of both halves

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
