"""FLUX.2: a transformer over latents of 2x2 patches; captions by Qwen3 (klein) or by Mistral Small 3 (dev).

Shape letters: B batch, C latent channels (128), H W latent height and width (16 pixels each), S tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import DrawRequest, TextEncoderPart
from emotrain.families.flow import FlowFamily, chat_ids, hidden_states
from emotrain.families.flux2.spec import FLUX2

LAYERS, MISTRAL_LAYERS = (9, 18, 27), (10, 20, 30)  # of the text encoder, side by side
TRAINING_GUIDANCE = 1.0  # dev is distilled; at 1.0 its own prediction is the least bent
# What stands before every caption of dev.
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


def patchify(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4C, H/2, W/2]: each 2x2 patch becomes channels."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def unpatchify(latents: Tensor) -> Tensor:
    """[B, 4C, H, W] -> [B, C, 2H, 2W]."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def empirical_mu(num_tokens: int, steps: int) -> float:
    """The logarithm of the sampler's shift, as the release fits it to tokens and steps (`compute_empirical_mu`)."""
    many = 0.00016927 * num_tokens + 0.45666666  # 200 steps
    if num_tokens > 4300:
        return many
    few = 8.73809524e-05 * num_tokens + 1.89833333  # 10 steps
    return few + (many - few) * (steps - 10) / 190


class Flux2Vae(FlowFamily):
    """A flow family on patches of FLUX.2's latents."""

    def normalised(self, raw: Tensor) -> Tensor:
        shift, scale = self._statistics()
        return (patchify(raw) - shift) / scale

    def unnormalised(self, latents: Tensor) -> Tensor:
        shift, scale = self._statistics()
        return unpatchify(latents * scale + shift)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, [1, C, 1, 1]: the VAE's batch norm, which stands still."""
        norm = self.vae.bn
        deviation = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        return norm.running_mean.float().view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)


class Flux2(Flux2Vae):
    """klein base 4B and 9B, dev, and small ones of the same build."""

    guidance = TRAINING_GUIDANCE  # what dev is told

    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """[S, 3D]: three layers side by side at all places, padding too: the model attends to it."""
        config: Any = part.encoder.config
        mistral = config.model_type == "mistral"
        ids, mask = system_ids(part, text) if mistral else chat_ids(part, text, enable_thinking=False)
        states = hidden_states(part, ids, mask)
        deep = MISTRAL_LAYERS if mistral else LAYERS
        layers = deep if len(states) > deep[-1] else range(1, 4)  # small ones of the same build are not so deep
        return torch.cat([states[layer][0] for layer in layers], dim=-1)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        latents, sigmas, embeds, _ = self._flow_inputs(noisy_latents, timesteps, text)
        height, width = latents.shape[-2:]
        output: Tensor = self.denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2),
            timestep=sigmas.to(self.dtype),
            guidance=torch.full_like(sigmas, self.guidance) if self.denoiser.config.guidance_embeds else None,
            encoder_hidden_states=embeds,
            txt_ids=places(1, 1, embeds.shape[1], latents.device),
            img_ids=places(height, width, 1, latents.device),
        ).sample
        return output.transpose(1, 2).reshape(latents.shape).float()

    def draw(self, request: DrawRequest, text: TextEmbeds, negative: TextEmbeds) -> Tensor:
        """As every flow; dev is told the guidance, in place of a second pass without the caption."""
        if not self.denoiser.config.guidance_embeds:
            return super().draw(request, text, negative)
        self.guidance = FLUX2.guidance if request.guidance is None else request.guidance
        try:
            return super().draw(replace(request, guidance=1.0), text, negative)
        finally:
            self.guidance = TRAINING_GUIDANCE

    def mu(self, scheduler_config: Any, num_tokens: int, steps: int) -> float:
        return empirical_mu(num_tokens, steps)


def system_ids(part: TextEncoderPart, text: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [1, max_tokens] of a message after dev's own instruction; pictures are no part of it."""
    said = [("system", SYSTEM), ("user", text.replace("[IMG]", ""))]
    messages = [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in said]
    batch = part.tokenizer.apply_chat_template(
        [messages], add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt",
        padding="max_length", truncation=True, max_length=part.max_tokens,
    )  # fmt: skip
    device = next(part.encoder.parameters()).device
    return batch.input_ids.to(device), batch.attention_mask.to(device)


def places(height: int, width: int, tokens: int, device: torch.device) -> Tensor:
    """[H * W * S, 4]: (0, row, column, token) of every place."""
    axes = (torch.arange(count, device=device) for count in (1, height, width, tokens))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(math.prod((height, width, tokens)), 4)
