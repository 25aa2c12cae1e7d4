"""What the newer flow families share: one language model as text encoder, and a sampler of our own over `predict`.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from emotrain.families.base import Conditioning, DrawRequest, TextEmbeds, TextEncoderPart
from emotrain.families.common import LoadedFamily, to_device, vae_channels
from emotrain.families.registry import FAMILIES


class FlowFamily(LoadedFamily):
    """A rectified flow whose text encoder is never trained."""

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
        rows = [self.encode_one(part, text) for text in texts]
        longest = max(row.shape[0] for row in rows)
        embeds = torch.zeros(len(rows), longest, *rows[0].shape[1:], dtype=rows[0].dtype)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            embeds[i, : row.shape[0]], mask[i, : row.shape[0]] = row.cpu(), True
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    @abstractmethod
    def encode_one(self, part: TextEncoderPart, text: str) -> Tensor:
        """The tokens of one text that the denoiser is given, [S, D...]."""

    @abstractmethod
    def set_timesteps(self, scheduler: Any, steps: int, num_tokens: int) -> None:
        """The stock pipeline's sigmas for that many steps and image tokens."""

    def usual_guidance(self) -> float:
        """Scale of classifier-free guidance in samples; 1 is none."""
        return FAMILIES[self.name].guidance

    def pipeline(self, **parts: Any) -> Any:
        """None: `draw` does without a pipeline."""
        return None

    def pipeline_words(self, text: TextEmbeds, negative: TextEmbeds, guidance: float | None) -> dict[str, Any]:
        """Nothing: `draw` does without a pipeline."""
        return {}

    def draw(self, request: DrawRequest, text: TextEmbeds, negative: TextEmbeds) -> Tensor:
        """Scaled latents [1, C, H, W] by Euler steps along the flow, with classifier-free guidance (arXiv:2207.12598).

        In float32 between the steps, as the stock pipelines; the guidance is uncond + g (cond - uncond).
        """
        scale = self.usual_guidance() if request.guidance is None else request.guidance
        height, width = request.height // self.vae_scale, request.width // self.vae_scale
        generator = torch.Generator("cpu").manual_seed(request.seed)
        shape = (1, FAMILIES[self.name].latent_channels, height, width)
        latents = torch.randn(self.latent_shape(shape), generator=generator).to(self.device)
        scheduler = self.fresh_scheduler()
        self.set_timesteps(scheduler, request.steps, self.num_image_tokens(height, width))
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

    @staticmethod
    def set_shifted_timesteps(scheduler: Any, steps: int, num_tokens: int) -> None:
        """Evenly spaced sigmas, whose shift grows with the number of tokens along the scheduler's own line."""
        config = scheduler.config
        first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = low + (high - low) * (num_tokens - first) / (last - first)
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)

    def latent_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """[B, C, H, W] with the channels that this model's VAE has."""
        return (shape[0], vae_channels(self.vae.config) * FAMILIES[self.name].vae_patch ** 2, *shape[2:])

    def _flow_inputs(
        self, noisy_latents: Tensor, sigmas: Tensor, text: TextEmbeds
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents and embeddings in the denoiser's dtype, sigmas in float32, and the mask of real tokens [B, S]."""
        self.place_denoiser()
        mask = text.get("prompt_mask")
        embeds = to_device(text["prompt_embeds"], self.device, self.dtype)
        real = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return (
            noisy_latents.to(self.device, self.dtype),
            sigmas.to(self.device, torch.float32),
            embeds,
            real,
        )


def chat_ids(part: TextEncoderPart, text: str, **template: Any) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [1, max_tokens] of a user's message through the tokenizer's own chat template."""
    message = [{"role": "user", "content": text}]
    said = part.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **template)
    batch = part.tokenizer(said, padding="max_length", max_length=part.max_tokens, truncation=True, return_tensors="pt")
    device = next(part.encoder.parameters()).device
    return batch.input_ids.to(device), batch.attention_mask.to(device)


def hidden_states(part: TextEncoderPart, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The embeddings and every layer's output [1, S, D]; the last one is normalised."""
    states: tuple[Tensor, ...] = part.encoder(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    return states
