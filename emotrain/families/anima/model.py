"""Anima: Cosmos-Predict2's transformer with cross-attention to captions, which a small conditioner makes.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.anima.spec import MAX_TOKENS
from emotrain.families.common import Parts, TextEncoderPart
from emotrain.families.qwen_vae import QwenVae


class Anima(QwenVae):
    """Base, and small ones of the same build. The conditioner is frozen: what it makes of a caption is cached."""

    text_width = "text_embed_dim"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        _without_padding_mask(self.denoiser)

    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """[S, D] for T5's words of the text, which look at what Qwen3 makes of it."""
        conditioner = self.part("text_encoder_2")
        assert conditioner is not None
        device = next(part.encoder.parameters()).device
        kwargs = {"max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
        read, said = part.tokenizer(text, **kwargs), conditioner.tokenizer(text, **kwargs)
        ids, mask = read.input_ids.long().to(device), read.attention_mask.to(device)
        if ids.shape[-1] == 0:  # the empty text has no token
            ids, mask = ids.new_zeros(1, 1), mask.new_zeros(1, 1)
        states = part.encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        made = conditioner.encoder(
            source_hidden_states=states * mask.to(states).unsqueeze(-1),
            target_input_ids=said.input_ids.to(device),
            target_attention_mask=said.attention_mask.to(device),
            source_attention_mask=mask,
        )
        tokens: Tensor = made[0, : said.input_ids.shape[1]]  # the rest is zeros, which `predict` puts back
        return tokens

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """The flow's velocity, float32 [B, C, H, W]; zeros after the last token are attended to, as in the release."""
        _without_padding_mask(self.denoiser)
        latents, sigmas, embeds, _ = self._flow_inputs(noisy_latents, timesteps, text)
        channels = self.denoiser.patch_embed.proj.in_features // 4
        film = F.pad(latents[:, :, None], (0, 0) * 3 + (0, channels - latents.shape[1]))
        output: Tensor = self.denoiser(
            hidden_states=film,
            timestep=sigmas.to(self.dtype),
            encoder_hidden_states=F.pad(embeds, (0, 0, 0, max(MAX_TOKENS - embeds.shape[1], 0))),
        ).sample
        return output[:, :, 0].float()


def _without_padding_mask(denoiser: Any) -> None:
    """Have `predict` add the mask of padded pixels, which is zero for a picture, as a channel.

    diffusers brings that mask to size by torchvision, and only that asks for torchvision.
    """
    if denoiser.config.concat_padding_mask:
        denoiser.register_to_config(concat_padding_mask=False)
