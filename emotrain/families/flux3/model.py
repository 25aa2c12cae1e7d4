"""FLUX.3 klein: blocks of one kind of token each, then joint ones, on FLUX.2's latents; captions by Qwen3-VL.

Shape letters: B batch, C latent channels (128), H W latent height and width (16 pixels each), S tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import TextEncoderPart
from emotrain.families.flow import hidden_states
from emotrain.families.flux2.model import Flux2Vae, places
from emotrain.families.flux3.spec import PAD

LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)  # of the text encoder, side by side
PICTURE_SCALE = 0.5  # of rows and columns


class Flux3(Flux2Vae):
    """klein base, and small ones of the same build; the distilled one, which is told where a step ends, is another."""

    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """[S, 8D]: eight layers side by side, up to the next multiple of 80 tokens: padding is attended to."""
        message = [{"role": "user", "content": text}]
        said = part.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        words: dict[str, Any] = {"return_tensors": "pt", "truncation": True}
        real = part.tokenizer(said, **words, max_length=part.max_tokens).input_ids.shape[1]
        length = min(-(-real // PAD) * PAD, part.max_tokens)
        batch = part.tokenizer(said, **words, padding="max_length", padding_side="right", max_length=length)
        device = next(part.encoder.parameters()).device
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        at = torch.arange(length, device=device)[None].masked_fill(mask == 0, 1)
        states = hidden_states(part, ids, mask, position_ids=at)
        layers = LAYERS if len(states) > LAYERS[-1] else range(1, 9)  # small ones of the same build are not so deep
        return torch.cat([states[layer][0] for layer in layers], dim=-1)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """The flow's velocity, float32 [B, C, H, W]; the model takes no mask."""
        return self._alike(self._velocity, noisy_latents, timesteps, text)

    def _velocity(self, latents: Tensor, sigmas: Tensor, embeds: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        scale = torch.tensor([1.0, PICTURE_SCALE, PICTURE_SCALE, 1.0], device=latents.device)
        output: Tensor = self.denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=embeds,
            timestep=sigmas.to(self.dtype),
            img_ids=places(height, width, 1, latents.device) * scale,
            txt_ids=places(1, 1, embeds.shape[1], latents.device).float(),
        ).sample
        return output.transpose(1, 2).reshape(latents.shape).float()
