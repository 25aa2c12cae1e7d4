"""Stable Diffusion 1.x and 2.x: a UNet and one CLIP text encoder (Rombach et al. 2022, arXiv:2112.10752)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import SMALL_MODEL_GUIDANCE, PipelineFamily, ids_of
from emotrain.families.sd.spec import SD15


class StableDiffusion(PipelineFamily):
    """sd15 and sd21; they differ in sizes and in what is predicted only."""

    def encode_with_grad(self, texts: list[str], frozen: TextEmbeds | None = None) -> TextEmbeds:
        """prompt_embeds [B, S, D]: the state after CLIP's last layer, or an earlier one (`clip_skip`), normalised."""
        part = self.text_encoders[0]
        ids = ids_of(part, texts)
        if self.clip_skip == 1:
            return {"prompt_embeds": part.encoder(ids)[0]}
        states = part.encoder(ids, output_hidden_states=True).hidden_states
        norm: Any = getattr(part.encoder, "text_model", part.encoder).final_layer_norm
        return {"prompt_embeds": norm(states[-self.clip_skip])}

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> TextEmbeds:
        """prompt_embeds float32 [B, S, D] on the CPU."""
        return self.to_rows(self.encode_with_grad(texts))

    @staticmethod
    def text_shapes(config: Any, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """One embedding a token."""
        return {"prompt_embeds": (num_tokens, config.cross_attention_dim)}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """Epsilon or v, float32 [B, C, H, W]; the sizes in `conditioning` play no part."""
        latents, timesteps, text = self._inputs(noisy_latents, timesteps, text)
        output: Tensor = self.denoiser(latents, timesteps.long(), encoder_hidden_states=text["prompt_embeds"]).sample
        return output.float()

    def pipeline(self, **parts: Any) -> Any:
        """StableDiffusionPipeline."""
        from diffusers import StableDiffusionPipeline

        built = {"vae": self.vae, "unet": self.denoiser, "scheduler": self.fresh_scheduler()}
        built |= {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        built |= {"requires_safety_checker": False, **self.encoder_kwargs()}
        return StableDiffusionPipeline(**{**built, **parts})

    def pipeline_kwargs(self, text: TextEmbeds, negative: TextEmbeds, guidance: float | None) -> dict[str, Any]:
        """Classifier-free guidance."""
        return {
            "prompt_embeds": text["prompt_embeds"],
            "negative_prompt_embeds": negative["prompt_embeds"],
            "guidance_scale": usual_guidance(self.variant) if guidance is None else guidance,
        }


def usual_guidance(variant: str) -> float:
    """The guidance of samples."""
    return SD15.guidance if variant != "custom" else SMALL_MODEL_GUIDANCE
