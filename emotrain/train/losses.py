"""The loss of a batch, and the numbers it is taken at: pure functions of (seed, micro-step).

Shape letters: B samples of a micro-batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from emotrain.dataset.loader import Batch

if TYPE_CHECKING:
    from emotrain.diffusion import Objective
    from emotrain.families.base import Conditioning, Family, TextEmbeds

GOLDEN = (math.sqrt(5) - 1) / 2


def noise_like(latents: Tensor, seed: int, micro_step: int) -> Tensor:
    """Standard normal noise that depends on (seed, micro_step) alone, drawn on the CPU so that devices agree."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + micro_step) % 2**63)
    return torch.randn(latents.shape, generator=generator)


def uniforms(seed: int, first: int, count: int) -> Tensor:
    """Samples `first`.. of the additive recurrence u_n = frac(u_0 + n*phi), float32 [count] in [0, 1).

    u_0 is uniform by the seed, so every u_n is uniform by itself and the gradient stays unbiased; together they fill
    the noise scale evenly, which takes most of the timestep noise out of the mean loss (Kuipers & Niederreiter 1974).
    """
    offset = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n = torch.arange(first, first + count, dtype=torch.float64)
    u: Tensor = torch.frac(offset + n * GOLDEN)
    return u.clamp(max=1 - 1e-7).float()


def timesteps_at(family: Family, objective: Objective, u: Tensor, latents: Tensor) -> Tensor:
    """Timesteps [B] at the places `u` [B] of their density, for pictures whose latents have the size of `latents`.

    The one way to timesteps: some flow models shift them by the number of image tokens, which the family counts.
    """
    return objective.timesteps(u, family.num_image_tokens(*latents.shape[-2:]))


def sizes_of(batch: Batch) -> Conditioning:
    """The batch's sizes as families know them: the two rooms have one shape of it each."""
    return cast("Conditioning", batch.conditioning)


def text_of(family: Family, texts: Sequence[str], cached: Mapping[str, Tensor]) -> TextEmbeds:
    """What the denoiser is told: `cached` embeddings, or fresh ones where text encoders are trained.

    Fresh ones carry gradients, and are those of the encoders as they are now: with the adapter on or off.
    """
    known = {key: value.to(family.device) for key, value in cached.items()}
    if not family.trained_encoders:
        return known
    if torch.is_grad_enabled():
        return family.encode_with_grad(list(texts), known or None)
    unique = list(dict.fromkeys(texts))  # a validation asks for each caption several times
    at = [texts.index(text) for text in unique]
    fresh = family.encode_with_grad(unique, {key: value[at] for key, value in known.items()} or None)
    return {key: value[[unique.index(text) for text in texts]] for key, value in fresh.items()}


def sample_losses(family: Family, objective: Objective, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Mean squared error of each sample, weighted by mask and noise level but not by the data set: float32 [B]."""
    latents = batch.latents.to(family.device)  # timesteps stay on the CPU, where the noise schedule is looked up
    noise = objective.noise(latents, noise.to(family.device))
    noisy = objective.add_noise(latents, noise, timesteps)
    text = text_of(family, batch.texts, batch.text)
    prediction = family.predict(noisy, timesteps, text, sizes_of(batch))
    error = (prediction.float() - objective.target(latents, noise, timesteps)).pow(2)
    if batch.masks is not None:
        masks = batch.masks.to(family.device)
        error = error * masks / masks.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
    return error.mean(dim=(1, 2, 3)) * objective.weight(timesteps).to(error.device)
