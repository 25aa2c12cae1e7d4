"""Krea 2: a single-stream transformer; captions by twelve layers of Qwen3-VL.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, L layers, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import TextEncoderPart
from emotrain.families.flux.model import image_ids, pack, unpack
from emotrain.families.qwen_vae import QwenVae

LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # of the text encoder, one above the other
# The template that the model was trained with; its first tokens are left out of what the denoiser is given.
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
LEFT_OUT, SUFFIX = 34, 5  # tokens of the two
TURBO_MU = 1.15  # the logarithm of its sampler's shift


class Krea2(QwenVae):
    """Raw, Turbo, and small ones of the same build."""

    def mu(self, scheduler_config: Any, num_tokens: int, steps: int) -> float:
        """Of Turbo one for all sizes."""
        return TURBO_MU if self.distilled else super().mu(scheduler_config, num_tokens, steps)

    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """[S, L, D]: the real tokens. Padding stands between prompt and suffix, and takes no position."""
        device = next(part.encoder.parameters()).device
        head = part.tokenizer(
            BEFORE + text, truncation=True, padding="max_length", max_length=part.max_tokens + LEFT_OUT - SUFFIX,
            return_tensors="pt",
        )  # fmt: skip
        tail = part.tokenizer(AFTER, return_tensors="pt")
        ids = torch.cat([head.input_ids, tail.input_ids], dim=1).to(device)
        mask = torch.cat([head.attention_mask, tail.attention_mask], dim=1).to(device).bool()
        places = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        states = part.encoder(
            input_ids=ids, attention_mask=mask, position_ids=places.expand(3, -1, -1), output_hidden_states=True,
            use_cache=False,
        ).hidden_states  # fmt: skip
        count = int(self.denoiser.config.num_text_layers)
        layers = LAYERS if count == len(LAYERS) else range(1, count + 1)  # small ones are not so deep
        stacked = torch.stack([states[layer][0] for layer in layers], dim=1)
        return stacked[LEFT_OUT:][mask[0, LEFT_OUT:]]

    @classmethod
    def text_shapes(cls, config: Any, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """Several layers a token."""
        return {"prompt_embeds": (num_tokens, config.num_text_layers, config.text_hidden_dim)}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        latents, sigmas, embeds, mask = self._flow_inputs(noisy_latents, timesteps, text)
        height, width = latents.shape[-2:]
        places = image_ids(height, width, sigmas)
        places = torch.cat([places.new_zeros(embeds.shape[1], 3), places])
        output: Tensor = self.denoiser(
            hidden_states=pack(latents),
            encoder_hidden_states=embeds,
            timestep=sigmas.to(self.dtype),
            position_ids=places,
            encoder_attention_mask=None if bool(mask.all()) else mask.to(self.device),
        ).sample
        return unpack(output, height, width).float()
