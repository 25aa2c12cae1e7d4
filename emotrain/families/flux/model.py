"""FLUX.1: a transformer over packed latents, pooled CLIP and a T5 (Black Forest Labs 2024).

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import SMALL_MODEL_GUIDANCE, PipelineFamily, ids_of
from emotrain.families.flux.spec import FLUX

TRAINING_GUIDANCE = 1.0  # the dev model is distilled; at 1.0 its own prediction is the least bent


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4C]: each 2x2 patch becomes a token."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H/2 * W/2, 4C] -> [B, C, H, W]; `height` and `width` in latents."""
    b, _, channels = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, height, width)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each token for the rotary embedding: [H/2 * W/2, 3], the first number is 0."""
    ids = torch.zeros(height // 2, width // 2, 3, device=like.device, dtype=like.dtype)
    ids[..., 1] = torch.arange(height // 2, device=like.device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=like.device)[None, :]
    return ids.reshape(-1, 3)


class Flux(PipelineFamily):
    """FLUX.1-dev (guidance embedding), FLUX.1-schnell, and small ones of the same build."""

    def encode_with_grad(self, texts: list[str], frozen: TextEmbeds | None = None) -> TextEmbeds:
        """prompt_embeds [B, S, D] of the T5, pooled_prompt_embeds [B, D] of CLIP."""
        clip = self.part("text_encoder")
        assert clip is not None
        if frozen is None:
            t5 = self.part("text_encoder_2")
            assert t5 is not None
            tokens = t5.encoder(ids_of(t5, texts), output_hidden_states=False)[0]
        else:
            tokens = frozen["prompt_embeds"].to(self.device)
        pooled = clip.encoder(ids_of(clip, texts), output_hidden_states=False).pooler_output
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """The flow's velocity, float32 [B, C, H, W].

        `timesteps` are sigmas; the transformer multiplies them by 1000 itself.
        """
        latents, sigmas, text = self._inputs(noisy_latents, timesteps, text)
        height, width = latents.shape[-2:]
        guidance = torch.full_like(sigmas, TRAINING_GUIDANCE) if self.denoiser.config.guidance_embeds else None
        output = self.denoiser(
            hidden_states=pack(latents),
            timestep=sigmas.to(self.dtype),
            guidance=guidance,
            pooled_projections=text["pooled_prompt_embeds"],
            encoder_hidden_states=text["prompt_embeds"],
            txt_ids=torch.zeros(text["prompt_embeds"].shape[1], 3, device=latents.device, dtype=latents.dtype),
            img_ids=image_ids(height, width, latents),
        )
        return unpack(output.sample, height, width).float()

    def pipeline_kwargs(self, text: TextEmbeds, negative: TextEmbeds, guidance: float | None) -> dict[str, Any]:
        """dev: guidance goes into its embedding. Others: true classifier-free guidance, where any is asked for."""
        kwargs: dict[str, Any] = {
            "prompt_embeds": text["prompt_embeds"],
            "pooled_prompt_embeds": text["pooled_prompt_embeds"],
            "max_sequence_length": text["prompt_embeds"].shape[1],
        }
        if self.denoiser.config.guidance_embeds:
            return {
                **kwargs,
                "guidance_scale": FLUX.guidance if guidance is None else guidance,
            }
        scale = usual_true_guidance(self.variant) if guidance is None else guidance
        if scale > 1.0:
            kwargs["negative_prompt_embeds"] = negative["prompt_embeds"]
            kwargs["negative_pooled_prompt_embeds"] = negative["pooled_prompt_embeds"]
        return {**kwargs, "guidance_scale": 0.0, "true_cfg_scale": max(scale, 1.0)}

    def unpack_sampled(self, latents: Tensor, width: int, height: int) -> Tensor:
        return unpack(latents, height // self.vae_scale, width // self.vae_scale)


def usual_true_guidance(variant: str) -> float:
    """1 is none: schnell is distilled to do without."""
    return SMALL_MODEL_GUIDANCE if variant == "custom" else 1.0
