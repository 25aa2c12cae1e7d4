"""Qwen-Image 2.1: a single-stream transformer, causal over captions, on latents of 16 pixels; captions by Qwen3-VL.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import TextEncoderPart
from emotrain.families.qwen_vae import QwenVae

# The template that the model was trained with; the system's part is left out of what the denoiser is given.
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
TEMPLATE = SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SLOT = 4  # latents that one place of the sequence stands for


class QwenImage21(QwenVae):
    """Qwen-Image 2.1, and small ones of the same build. Pictures have a fourth channel: training's are opaque."""

    text_width = "context_in_dim"

    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """[S, D]: the last layer before the norm, at the prompt's tokens; the empty text is a blank."""
        words = part.tokenizer(TEMPLATE.format(text or " "), return_tensors="pt")
        left_out = part.tokenizer(SYSTEM, return_tensors="pt").input_ids.shape[1]
        limit = left_out + part.max_tokens
        encoder: Any = part.encoder
        device = next(encoder.parameters()).device
        before_norm = encoder.norm.register_forward_hook(lambda module, args, output: args[0])
        try:
            states = encoder(
                input_ids=words.input_ids[:, :limit].to(device),
                attention_mask=words.attention_mask[:, :limit].to(device),
                use_cache=False,
            ).last_hidden_state
        finally:
            before_norm.remove()
        tokens: Tensor = states[0, left_out:]
        return tokens

    def encode_images(self, pixels: Tensor) -> Tensor:
        return super().encode_images(torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))

    def decode_latents(self, latents: Tensor) -> Tensor:
        return super().decode_latents(latents)[:, :3]

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """The flow's velocity, float32 [B, C, H, W]; padding would move the picture's places, which follow it."""
        return self._alike(self._velocity, noisy_latents, timesteps, text)

    def _velocity(self, latents: Tensor, sigmas: Tensor, embeds: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        texts = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        places = torch.cat([texts, torch.ones(batch, height * width // SLOT, dtype=torch.bool)], dim=1)
        output: Tensor = self.denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=embeds,
            timestep=sigmas.to(self.dtype),
            img_shapes=[[(1, height, width)]] * batch,
            img_mask=places if latents.is_meta else places.to(self.device),  # it is looked at, number by number
        ).sample
        return output[:, -height * width :].transpose(1, 2).reshape(latents.shape).float()
