"""The loss of a batch, and the numbers it is taken at: pure functions of (seed, micro-step).

Shape letters: B samples of a micro-batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emotrain.batch import Batch, Conditioning, TextEmbeds, embeddings_and_masks, send

if TYPE_CHECKING:
    from emotrain.diffusion import Objective
    from emotrain.families.common import LoadedFamily

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


def timesteps_at(family: LoadedFamily, objective: Objective, u: Tensor, latents: Tensor) -> Tensor:
    """Timesteps [B] at the places `u` [B] of their density, for pictures whose latents have the size of `latents`.

    The one way to timesteps: some flow models shift them by the number of image tokens, which the family counts.
    """
    height, width = latents.shape[-2:]
    return timesteps_of(family, objective, u, (height, width))


def timesteps_of(family: LoadedFamily, objective: Objective, u: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """As `timesteps_at`, for latents of this height and width."""
    return objective.timesteps(u, family.num_image_tokens(*latent_size))


def text_of(family: LoadedFamily, texts: Sequence[str], cached: Mapping[str, Tensor]) -> TextEmbeds:
    """What the denoiser is told: `cached` embeddings, or fresh ones where text encoders are trained.

    Fresh ones carry gradients, and are those of the encoders as they are now: with the adapter on or off.
    """
    embeddings, masks = embeddings_and_masks(dict(cached))
    known = {key: value.to(family.device) for key, value in embeddings.items()} | masks
    if not family.trained_encoders:
        return known
    if torch.is_grad_enabled():
        return family.encode_with_grad(list(texts), known or None)
    unique = list(dict.fromkeys(texts))  # a validation asks for each caption several times
    at = [texts.index(text) for text in unique]
    fresh = family.encode_with_grad(unique, {key: value[at] for key, value in known.items()} or None)
    return {key: value[[unique.index(text) for text in texts]] for key, value in fresh.items()}


def inputs(objective: Objective, batch: Batch, noise: Tensor, timesteps: Tensor) -> list[Tensor]:
    """What `losses_there` takes, still on the CPU: latents with noise first.

    Latents and noise are mixed here, where they are: that costs less than sending both and the coefficients.
    """
    noise = objective.noise(batch.latents, noise)
    noisy = objective.add_noise(batch.latents, noise, timesteps)
    target, weight = objective.target(batch.latents, noise, timesteps), objective.weight(timesteps)
    return [*_asked(batch, noisy, timesteps), target, weight, *([] if batch.masks is None else [batch.masks])]


def _asked(batch: Batch, noisy: Tensor, timesteps: Tensor) -> list[Tensor]:
    """What the denoiser is given; the embeddings of `batch.text` come last."""
    sizes = batch.conditioning
    embeddings = embeddings_and_masks(batch.text)[0].values()
    return [noisy, timesteps, sizes.original_sizes, sizes.crop_top_lefts, sizes.target_sizes, *embeddings]


def _predicted(family: LoadedFamily, batch: Batch, there: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The denoiser's output for `_asked` on the device, and what came after that."""
    noisy, timesteps, original, crop, target, *rest = there
    keys, masks = embeddings_and_masks(batch.text)
    text = dict(zip(keys, rest, strict=False)) | masks
    told = text_of(family, batch.texts, text)
    return family.predict(noisy, timesteps, told, Conditioning(original, crop, target)).float(), rest[len(keys) :]


def predict(family: LoadedFamily, batch: Batch, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The denoiser's output for a batch, float32 [B, C, H, W]; `noisy` and `timesteps` [B] are on the CPU."""
    return _predicted(family, batch, send(_asked(batch, noisy, timesteps), family.device))[0]


def losses_there(family: LoadedFamily, batch: Batch, there: Sequence[Tensor]) -> Tensor:
    """See `sample_losses`; `there` is what `inputs` gave, on the device."""
    prediction, (target, weight, *masks) = _predicted(family, batch, there)
    error = (prediction - target).pow(2)
    for mask in masks:
        error = error * mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
    return error.mean(dim=(1, 2, 3)) * weight


def sample_losses(family: LoadedFamily, objective: Objective, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Mean squared error of each sample, weighted by mask and noise level but not by the data set: float32 [B]."""
    return losses_there(family, batch, send(inputs(objective, batch, noise, timesteps), family.device))


BINS = 20


@dataclass
class LossBaseline:
    """Turns the losses of one step into the number that the optimizer observes: their mean, or a corrected one.

    Its averages should begin at what the base's loss is in the mean. The first loss of a run is one draw, often off by
    a fifth; the slowest average carries that for a hundred steps, and takes it for progress, or for its absence.

    A loss of 0.9 says nothing by itself: at one end of the noise scale that is usual, at the other it is terrible. The
    corrected loss divides every sample's loss by what the base model has at that position, relative to its mean: a
    loss as the base's is observed as the base's mean, so that absolute bounds (`stopcoef`) keep their sense. Only what
    the optimizer observes is corrected; the gradient is that of the raw loss and stays unbiased.

    Args:
        expected: the base's loss in `BINS` equal parts of the noise scale, over its mean; empty for the raw loss.
        start: what is observed of the base in the mean, where the averages begin; None: at the first loss.
    """

    expected: list[float] = field(default_factory=list)
    start: float | None = None

    def observe(self, positions: Sequence[float], losses: Sequence[float]) -> float:
        """Mean over the samples of one step, each divided by the expected loss at its position (0..1)."""
        if not self.expected:
            return sum(losses) / len(losses)
        parts = [loss / self._at(position) for position, loss in zip(positions, losses, strict=True)]
        return sum(parts) / len(parts)

    def _at(self, position: float) -> float:
        """Expected loss, linear between the centres of the bins."""
        place = min(max(position * BINS - 0.5, 0.0), BINS - 1.0)
        low = min(int(place), BINS - 2)
        share = place - low
        return max((1 - share) * self.expected[low] + share * self.expected[low + 1], 1e-8)


def expected_by_bins(positions: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Mean loss in each of `BINS` parts of the noise scale, over the mean of all.

    Empty parts take their nearest neighbour's.

    Raises:
        ValueError: no losses.
    """
    sums, counts = [0.0] * BINS, [0] * BINS
    for position, loss in zip(positions, losses, strict=True):
        part = min(int(position * BINS), BINS - 1)
        sums[part] += loss
        counts[part] += 1
    filled = [i for i in range(BINS) if counts[i]]
    if not filled:
        raise ValueError("no losses to learn the expected loss from")
    nearest = [min(filled, key=lambda j: abs(i - j)) for i in range(BINS)]
    mean = sum(losses) / len(losses)
    return [sums[j] / counts[j] / mean for j in nearest]
