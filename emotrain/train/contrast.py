"""Does a caption belong to its picture? The loss with its own caption against that with the captions of others.

At the same noise and timestep two captions differ by what the model makes of their words alone, so the picture's own
difficulty, which rules the plain loss, cancels out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emotrain.dataset.contrasts import PictureContrast
from emotrain.dataset.loader import Batch
from emotrain.train.losses import sample_losses
from emotrain.train.probe import part

if TYPE_CHECKING:
    from emotrain.diffusion import Objective
    from emotrain.families.base import Family, TextEmbeds

Caption = tuple[str, "TextEmbeds"]  # with its row of cached embeddings; none where text encoders are trained
SMALL = 4096 * 4  # latent values of a picture up to where several go through the denoiser at once
TOGETHER = 16


@torch.no_grad()
def contrastive_losses(
    family: Family,
    objective: Objective,
    batches: Sequence[Batch],
    *,
    others: int = 7,
    draws: int = 4,
    low: float = 0.3,
    high: float = 0.9,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[PictureContrast]:
    """Losses of every picture under its own caption and under those of `others` other pictures.

    Costs `draws * (1 + others)` forward passes a picture. Whether the adapter is on is the caller's choice: off asks
    what the base model makes of the captions, which a wrong caption in the data set cannot have taught it.

    Args:
        family: with its denoiser; the encoders are not needed.
        objective: noise and targets.
        batches: the pictures with their plain captions, such as `CachedDataset.fixed(ids)`.
        others: captions to compare with, drawn from the other pictures whose text differs.
        draws: noise draws per picture, spread evenly over `low`..`high` of the timestep density.
        low: smallest u given to `objective.timesteps`.
        high: largest.
        seed: of the noise and of the choice of captions.
        progress: told (done, total) pictures.

    Raises:
        ValueError: no pictures, or batches without captions.
    """
    captions = _captions(batches)
    if not captions:
        raise ValueError("no captions to compare")
    total = sum(len(batch.ids) for batch in batches)
    found: list[PictureContrast] = []
    for batch in batches:
        for k, name in enumerate(batch.ids):
            own, row = captions[name]
            rng = random.Random(f"{seed}/{name}")
            pool = sorted(other for other, (text, _) in captions.items() if text != own)
            chosen = rng.sample(pool, min(others, len(pool)))
            wanted = [(own, row), *(captions[other] for other in chosen)]
            rows = _losses(family, objective, part(batch, k, k + 1), wanted, (draws, low, high), rng)
            if chosen:
                found.append(PictureContrast(name, rows[0], tuple(zip(chosen, rows[1:], strict=True))))
            if progress is not None:
                progress(len(found), total)
    return found


def _captions(batches: Sequence[Batch]) -> dict[str, Caption]:
    """Each picture's caption."""
    return {
        name: (batch.texts[k], {key: rows[k : k + 1] for key, rows in batch.text.items()})
        for batch in batches
        for k, name in enumerate(batch.ids)
        if batch.texts
    }


def _losses(
    family: Family,
    objective: Objective,
    single: Batch,
    captions: Sequence[Caption],
    where: tuple[int, float, float],
    rng: random.Random,
) -> tuple[tuple[float, ...], ...]:
    """Loss per caption and draw, the draws the same for all captions."""
    draws, low, high = where
    u = torch.tensor([low + (high - low) * (j + 0.5) / draws for j in range(draws)])
    timesteps = objective.timesteps(u, single.latents.shape[-1] * single.latents.shape[-2])
    generator = torch.Generator().manual_seed(rng.randrange(2**62))
    noise = torch.randn((draws, *single.latents.shape[1:]), generator=generator)
    jobs = [(caption, j) for caption in captions for j in range(draws)]
    losses: list[float] = []
    for group in _groups(jobs, TOGETHER if single.latents[0].numel() <= SMALL else 1):
        at = torch.tensor([j for _, j in group])
        batch = _with_captions(single, [caption for caption, _ in group])
        losses += sample_losses(family, objective, batch, noise[at], timesteps[at]).tolist()
    return tuple(tuple(losses[k : k + draws]) for k in range(0, len(losses), draws))


def _groups(jobs: Sequence[tuple[Caption, int]], size: int) -> Iterator[Sequence[tuple[Caption, int]]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _with_captions(single: Batch, captions: Sequence[Caption]) -> Batch:
    """The one picture of a batch, once per caption."""
    count = len(captions)

    def each(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:])

    sizes = single.conditioning
    return replace(
        single,
        latents=each(single.latents),
        text={name: torch.cat([row[name] for _, row in captions]) for name in captions[0][1]},
        conditioning=replace(
            sizes,
            original_sizes=each(sizes.original_sizes),
            crop_top_lefts=each(sizes.crop_top_lefts),
            target_sizes=each(sizes.target_sizes),
        ),
        weights=each(single.weights),
        masks=None if single.masks is None else each(single.masks),
        ids=single.ids * count,
        texts=tuple(text for text, _ in captions),
    )
