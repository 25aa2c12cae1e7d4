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

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, 8H, 8W] in -1..1 -> latents float32 [B, C, H, W], on the CPU."""
        weight = next(self.vae.parameters())
        raw: Tensor = self.vae.encode(pixels[:, :, None].to(weight.device, weight.dtype)).latent_dist.mode()
        mean, deviation = self._statistics(raw)
        return ((raw.float() - mean) / deviation)[:, :, 0].cpu()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> pixels float32 [B, 3, 8H, 8W] on the CPU, about -1..1."""
        weight = next(self.vae.parameters())
        raw = latents[:, :, None].float().to(weight.device)
        mean, deviation = self._statistics(raw)
        pixels: Tensor = self.vae.decode((raw * deviation + mean).to(weight.dtype)).sample
        return pixels[:, :, 0].float().cpu()

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, [1, C, 1, 1, 1]."""
        config = self.vae.config
        values = (torch.tensor(numbers, device=like.device) for numbers in (config.latents_mean, config.latents_std))
        mean, deviation = (value.view(1, -1, 1, 1, 1) for value in values)
        return mean, deviation
