"""Stable Diffusion 1.x and 2.x: a UNet and one CLIP text encoder (Rombach et al. 2022, arXiv:2112.10752)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import SMALL_MODEL_GUIDANCE, PipelineFamily, ids_of


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

    @classmethod
    def text_shapes(cls, config: Any, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """One embedding a token."""
        return {"prompt_embeds": (num_tokens, config.cross_attention_dim)}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """Epsilon or v, float32 [B, C, H, W]; the sizes in `conditioning` play no part."""
        latents, timesteps, text = self._inputs(noisy_latents, timesteps, text)
        output: Tensor = self.denoiser(latents, timesteps.long(), encoder_hidden_states=text["prompt_embeds"]).sample
        return output.float()

    def pipeline_settings(self) -> dict[str, Any]:
        """No filter of the pictures."""
        absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        return {**absent, "requires_safety_checker": False}

    @property
    def usual_guidance(self) -> float:
        """Less for small models."""
        return super().usual_guidance if self.variant != "custom" else SMALL_MODEL_GUIDANCE
