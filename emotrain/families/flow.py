"""What the newer flow families share: one language model as text encoder, and a sampler of our own over `predict`.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.diffusion import mu_for
from emotrain.families.common import DrawRequest, LoadedFamily, TextEncoderPart
from emotrain.families.registry import FAMILIES
from emotrain.families.sniff import latent_channels


class FlowFamily(LoadedFamily):
    """A rectified flow whose text encoder is never trained."""

    text_width = "joint_attention_dim"  # of one embedding: a key of the denoiser's config

    def encode_with_grad(self, texts: list[str], frozen: TextEmbeds | None = None) -> TextEmbeds:
        """The cached embeddings: no text encoder of these families is trained."""
        assert frozen is not None
        return frozen

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> TextEmbeds:
        """Embeddings on the CPU in the encoder's own precision, a row per text; see `encode_one`.

        Rows of fewer tokens than the longest are filled up with zeros; `prompt_mask` [B, S] says which are real.
        """
        part = self.text_encoders[0]
        rows = [self.encode_one(part, text).cpu() for text in texts]
        real = [torch.ones(row.shape[0], dtype=torch.bool) for row in rows]
        return {"prompt_embeds": pad_sequence(rows, True), "prompt_mask": pad_sequence(real, True)}

    @classmethod
    def text_shapes(cls, config: Any, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """One embedding a token."""
        return {"prompt_embeds": (num_tokens, getattr(config, cls.text_width))}

    @abstractmethod
    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """The tokens of one text that the denoiser is given, [S, D...]."""

    def mu(self, scheduler_config: Any, num_tokens: int, steps: int) -> float:
        """What the stock pipeline shifts its sigmas by where the scheduler's shift is dynamic."""
        return mu_for(num_tokens, scheduler_config)

    def draw(self, request: DrawRequest, text: TextEmbeds, negative: TextEmbeds) -> Tensor:
        """Scaled latents [1, C, H, W] by Euler steps along the flow, with classifier-free guidance (arXiv:2207.12598).

        In float32 between the steps, as the stock pipelines; the guidance is uncond + g (cond - uncond).
        """
        spec = FAMILIES[self.name]
        scale = spec.guidance if request.guidance is None else request.guidance
        height, width = request.height // self.vae_scale, request.width // self.vae_scale
        generator = torch.Generator("cpu").manual_seed(request.seed)
        channels = latent_channels(self.name, self.vae.config)
        latents = torch.randn((1, channels, height, width), generator=generator).to(self.device)
        scheduler = self.fresh_scheduler()
        mu = self.mu(scheduler.config, self.num_image_tokens(height, width), request.steps)
        evenly = torch.linspace(1.0, 1 / request.steps, request.steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=evenly, mu=mu)
        sizes = torch.tensor([[request.height, request.width]])
        told = Conditioning(sizes, torch.zeros_like(sizes), sizes)
        for sigma, following in zip(scheduler.sigmas[:-1].tolist(), scheduler.sigmas[1:].tolist(), strict=True):
            at = torch.full((1,), sigma, device=self.device)
            velocity = self.predict(latents, at, text, told)
            if scale != 1.0:
                without = self.predict(latents, at, negative, told)
                velocity = self.guided(velocity, without, scale)
            latents = latents + (following - sigma) * velocity
        return latents

    def guided(self, told: Tensor, untold: Tensor, scale: float) -> Tensor:
        """The velocity that guidance makes of the one with the caption and the one without, [B, C, H, W]."""
        return untold + scale * (told - untold)

    def _alike(
        self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor], noisy: Tensor, sigmas: Tensor, text: TextEmbeds
    ) -> Tensor:
        """`velocity` of latents, sigmas and embeddings that are all real, [B, C, H, W], where no mask can be given.

        Captions of different lengths go one after the other.
        """
        latents, sigmas, embeds, mask = self._flow_inputs(noisy, sigmas, text)
        counts = mask.sum(dim=1).tolist()
        if len(set(counts)) == 1:
            return velocity(latents, sigmas, embeds[:, : counts[0]])
        rows = [(slice(i, i + 1), count) for i, count in enumerate(counts)]
        return torch.cat([velocity(latents[i], sigmas[i], embeds[i, :count]) for i, count in rows])

    def _flow_inputs(
        self, noisy_latents: Tensor, sigmas: Tensor, text: TextEmbeds
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents and embeddings in the denoiser's dtype, sigmas in float32, and the mask of real tokens [B, S]."""
        latents, sigmas, text = self._inputs(noisy_latents, sigmas, text)
        embeds, mask = text["prompt_embeds"], text.get("prompt_mask")
        real = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return latents, sigmas, embeds, real


def chat_ids(part: TextEncoderPart, text: str, **template: Any) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [1, max_tokens] of a user's message through the tokenizer's own chat template."""
    message = [{"role": "user", "content": text}]
    said = part.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **template)
    batch = part.tokenizer(said, padding="max_length", max_length=part.max_tokens, truncation=True, return_tensors="pt")
    device = next(part.encoder.parameters()).device
    return batch.input_ids.to(device), batch.attention_mask.to(device)


def hidden_states(part: TextEncoderPart, ids: Tensor, mask: Tensor, **words: Any) -> tuple[Tensor, ...]:
    """The embeddings and every layer's output [1, S, D]; the last one is normalised."""
    states: tuple[Tensor, ...] = part.encoder(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **words
    ).hidden_states
    return states
