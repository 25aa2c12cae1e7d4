"""Stable Diffusion 3 and 3.5: a transformer, two CLIP text encoders and a T5 (arXiv:2403.03206)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import PipelineFamily, ids_of
from emotrain.families.sd3.spec import T5_TOKENS


class StableDiffusion3(PipelineFamily):
    """SD3 medium, SD3.5 medium and large. The T5 may be absent; its tokens are then zeros."""

    def encode_with_grad(self, texts: list[str], frozen: TextEmbeds | None = None) -> TextEmbeds:
        """prompt_embeds [B, S + S', D]: CLIP tokens padded to the T5's width, then the T5's.

        pooled_prompt_embeds [B, D' + D'']: of both CLIP encoders.
        """
        hidden, pooled = [], []
        for name in ("text_encoder", "text_encoder_2"):
            part = self.part(name)
            assert part is not None
            output = part.encoder(ids_of(part, texts), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output[0])
        clip = torch.cat(hidden, dim=-1)
        t5 = self._t5_tokens(texts, clip) if frozen is None else frozen["prompt_embeds"][:, clip.shape[1] :].to(clip)
        clip = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "prompt_embeds": torch.cat([clip, t5], dim=-2),
            "pooled_prompt_embeds": torch.cat(pooled, dim=-1),
        }

    def _t5_tokens(self, texts: list[str], like: Tensor) -> Tensor:
        """[B, S', D] of the T5, or zeros of the same shape without one."""
        part = self.part("text_encoder_3")
        if part is None:
            width = self.denoiser.config.joint_attention_dim
            return torch.zeros(len(texts), T5_TOKENS, width, device=like.device, dtype=like.dtype)
        tokens: Tensor = part.encoder(ids_of(part, texts))[0]
        return tokens

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """The flow's velocity, float32 [B, C, H, W]; sigmas become timesteps 0..1000 here."""
        latents, sigmas, text = self._inputs(noisy_latents, timesteps, text)
        output: Tensor = self.denoiser(
            hidden_states=latents,
            timestep=sigmas * 1000,
            encoder_hidden_states=text["prompt_embeds"],
            pooled_projections=text["pooled_prompt_embeds"],
        ).sample
        return output.float()
