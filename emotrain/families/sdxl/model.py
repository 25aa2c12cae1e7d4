"""Stable Diffusion XL: a UNet, two CLIP text encoders, sizes as conditioning (arXiv:2307.01952)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import PipelineFamily, ids_of


def time_ids(conditioning: Conditioning) -> Tensor:
    """[B, 6]: original height, width; crop top, left; target height, width (section 2.2)."""
    sizes = (conditioning.original_sizes, conditioning.crop_top_lefts, conditioning.target_sizes)
    return torch.cat(sizes, dim=1)


class StableDiffusionXL(PipelineFamily):
    """SDXL and its many children, epsilon or v."""

    def encode_with_grad(self, texts: list[str], frozen: TextEmbeds | None = None) -> TextEmbeds:
        """prompt_embeds [B, S, D + D']: both penultimate layers, or `clip_skip`'s; pooled [B, D'] of the second.

        An empty caption is encoded like any other text, so caption dropout trains what ComfyUI and others make
        of an empty prompt; zeros, which stand for no negative prompt (see `no_negative`), would give the
        cross-attention nothing to learn from: keys and values of zeros are zeros, with a LoRA as without.
        """
        hidden, pooled = [], None
        for part in self.text_encoders:
            output = part.encoder(ids_of(part, texts), output_hidden_states=True)
            hidden.append(output.hidden_states[-self.clip_skip])
            pooled = output[0]
        assert pooled is not None
        return {"prompt_embeds": torch.cat(hidden, dim=-1), "pooled_prompt_embeds": pooled}

    def no_negative(self, empty: TextEmbeds) -> TextEmbeds:
        """Zeros, unless the model's model_index.json says otherwise."""
        return {key: torch.zeros_like(value) for key, value in empty.items()} if self.force_zeros else empty

    @classmethod
    def text_shapes(cls, config: Any, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """The pooled embedding shares its input with the six sizes."""
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"prompt_embeds": (num_tokens, config.cross_attention_dim), "pooled_prompt_embeds": (pooled,)}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        latents, timesteps, text = self._inputs(noisy_latents, timesteps, text)
        added = {
            "text_embeds": text["pooled_prompt_embeds"],
            "time_ids": time_ids(conditioning).to(self.device, torch.float32),  # bf16 makes 1368 of 1365
        }
        output: Tensor = self.denoiser(
            latents,
            timesteps.long(),
            encoder_hidden_states=text["prompt_embeds"],
            added_cond_kwargs=added,
        ).sample
        return output.float()

    def pipeline_settings(self) -> dict[str, Any]:
        """No watermark."""
        return {"add_watermarker": False, "force_zeros_for_empty_prompt": self.force_zeros}
