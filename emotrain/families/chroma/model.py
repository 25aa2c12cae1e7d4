"""Chroma: FLUX.1's transformer without pooled text, its modulation made by one small network; captions by T5.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import TextEncoderPart
from emotrain.families.flow import FlowFamily
from emotrain.families.flux.model import image_ids, pack, unpack


class Chroma(FlowFamily):
    """Base, HD, and small ones of the same build."""

    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """[S, D]: T5's real tokens, and one token of padding, which the model was trained to look at."""
        words = part.tokenizer(
            text, padding="max_length", max_length=part.max_tokens, truncation=True, return_tensors="pt"
        )
        device = next(part.encoder.parameters()).device
        states: Tensor = part.encoder(
            words.input_ids.to(device), attention_mask=words.attention_mask.to(device), output_hidden_states=False
        )[0]
        return states[0, : int(words.attention_mask.sum()) + 1]

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """The flow's velocity, float32 [B, C, H, W].

        Without a mask: it would not reach all blocks, for diffusers leaves it out of the single ones under gradient
        checkpointing, and adds it to the scores as numbers.
        """
        return self._alike(self._velocity, noisy_latents, timesteps, text)

    def _velocity(self, latents: Tensor, sigmas: Tensor, embeds: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        output: Tensor = self.denoiser(
            hidden_states=pack(latents),
            timestep=sigmas.to(self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=latents.dtype),
            img_ids=image_ids(height, width, latents),
        ).sample
        return unpack(output, height, width).float()
