"""Qwen-Image: a double-stream transformer over packed latents, captions by Qwen2.5-VL.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import TextEncoderPart
from emotrain.families.flux.model import pack, unpack
from emotrain.families.qwen_vae import QwenVae

# The template that the model was trained with; its first tokens are left out of what the denoiser is given.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
LEFT_OUT = 34  # tokens


class QwenImage(QwenVae):
    """The first Qwen-Image, and small ones of the same build."""

    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """[S, D]: the last layer at the prompt's tokens."""
        words = part.tokenizer(
            TEMPLATE.format(text), max_length=part.max_tokens + LEFT_OUT, truncation=True, return_tensors="pt"
        )
        device = next(part.encoder.parameters()).device
        states = part.encoder(
            input_ids=words.input_ids.to(device), attention_mask=words.attention_mask.to(device), use_cache=False
        ).last_hidden_state
        tokens: Tensor = states[0, LEFT_OUT:]
        return tokens

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        latents, sigmas, embeds, mask = self._flow_inputs(noisy_latents, timesteps, text)
        height, width = latents.shape[-2:]
        output: Tensor = self.denoiser(
            hidden_states=pack(latents),
            timestep=sigmas.to(self.dtype),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=None if bool(mask.all()) else mask.to(self.device),
            img_shapes=[[(1, height // 2, width // 2)]] * latents.shape[0],
        ).sample
        return unpack(output, height, width).float()

    def guided(self, told: Tensor, untold: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance, each token brought back to the length that it has with the caption."""
        height, width = told.shape[-2:]
        wanted = pack(told)
        mixed = pack(super().guided(told, untold, scale))
        length = torch.linalg.vector_norm(wanted, dim=-1, keepdim=True)
        return unpack(mixed * (length / torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)), height, width)
