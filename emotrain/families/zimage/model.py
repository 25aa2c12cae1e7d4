"""Z-Image: a single-stream transformer over picture and caption tokens, captions by Qwen3.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.families.common import TextEncoderPart
from emotrain.families.flow import FlowFamily, chat_ids, hidden_states


class ZImage(FlowFamily):
    """Base, Turbo and what descends from them; they differ in weights, steps and guidance only."""

    text_width = "cap_feat_dim"

    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """[S, D]: the last layer but one at the real tokens, in thinking mode's template."""
        ids, mask = chat_ids(part, text, enable_thinking=True)
        states = hidden_states(part, ids, mask.bool())
        return states[-2][0][mask[0].bool()]

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """The flow's velocity, float32 [B, C, H, W].

        The model is given 1 - sigma, lists in place of batches, and its output is the negative velocity.
        """
        latents, sigmas, embeds, mask = self._flow_inputs(noisy_latents, timesteps, text)
        counts = mask.sum(dim=1).tolist()
        captions = [row[:count] for row, count in zip(embeds, counts, strict=True)]
        pictures = list(latents[:, :, None].unbind(0))
        output: list[Tensor] = self.denoiser(pictures, 1.0 - sigmas, captions).sample
        return -torch.stack(output)[:, :, 0].float()
