"""Does a caption belong to its picture? The loss with its own caption against that with the captions of others.

At the same noise and timestep two captions differ by what the model makes of their words alone, so the picture's own
difficulty, which rules the plain loss, cancels out. The middle of the noise scale tells most (Li et al. 2023,
arXiv:2303.16203, found the same for the classes of ImageNet).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from emotrain.batch import Batch
from emotrain.dataset.contrasts import PictureContrast
from emotrain.train.losses import GOLDEN, sample_losses, timesteps_at
from emotrain.train.validation import part

if TYPE_CHECKING:
    from emotrain.batch import TextEmbeds
    from emotrain.diffusion import Objective
    from emotrain.families.common import LoadedFamily

Caption = tuple[str, "TextEmbeds"]  # with its row of cached embeddings; none where text encoders are trained
TOGETHER = 16  # samples in one forward pass at most ...
VALUES = 65536  # ... and latent values in all of them: one picture of 1,024 pixels, four of 512
LOW, HIGH = 0.25, 0.75


class Pictures(Protocol):
    """What is needed of a data set: pictures with their plain captions, as `CachedDataset` gives them."""

    def fixed(self, ids: Sequence[str]) -> list[Batch]:
        """These pictures, a batch per bucket."""


@torch.no_grad()
def contrastive_losses(
    family: LoadedFamily,
    objective: Objective,
    data: Pictures,
    captions: Mapping[str, str],
    *,
    others: int = 3,
    draws: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[PictureContrast]:
    """Losses of every picture under its own caption and under those of `others` other pictures, picture by picture.

    Costs `draws * (1 + others)` forward passes a picture. Whether the adapter is on is the caller's choice: off asks
    what the base model makes of the captions, which a wrong caption in the data set cannot have taught it.

    Args:
        family: with its denoiser; the encoders are not needed.
        objective: noise and targets.
        data: the pictures.
        captions: by id, the pictures to look at; only a caption that differs is one to compare with.
        others: captions to compare with, drawn from the other pictures.
        draws: noise draws per picture, spread evenly over the middle half of the timestep density.
        seed: of the noise and of the choice of captions; a picture's do not depend on the other pictures' order.
        progress: told (done, total) pictures.
        stop: asked before each picture; True ends it.

    Raises:
        ValueError: fewer than `others` other captions.
    """
    names = sorted(captions)
    for done, name in enumerate(names):
        if stop():
            return
        rng = random.Random(f"{seed}/{name}")
        chosen = _others(captions, name, others, rng)
        places = [LOW + (HIGH - LOW) * (j + 0.5) / draws for j in range(draws)]
        rows = _losses(family, objective, *_picture(data, name, chosen), places, rng)
        yield PictureContrast(name, rows[0], tuple(zip(chosen, rows[1:], strict=True)))
        if progress is not None:
            progress(done + 1, len(names))


@torch.no_grad()
def one_draw(
    family: LoadedFamily,
    objective: Objective,
    data: Pictures,
    captions: Mapping[str, str],
    name: str,
    *,
    number: int,
    others: int = 3,
    seed: int = 0,
) -> PictureContrast:
    """Draw `number` (from 0) of one picture: as `contrastive_losses`, always against the same captions.

    The draws of a picture lie evenly over the middle half of the timestep density, however many there are in the end.

    Raises:
        ValueError: fewer than `others` other captions.
    """
    chosen = _others(captions, name, others, random.Random(f"{seed}/{name}"))
    place = LOW + (HIGH - LOW) * ((0.5 + number * GOLDEN) % 1.0)
    rng = random.Random(f"{seed}/{name}/{number}")
    rows = _losses(family, objective, *_picture(data, name, chosen), [place], rng)
    return PictureContrast(name, rows[0], tuple(zip(chosen, rows[1:], strict=True)))


def _others(captions: Mapping[str, str], name: str, count: int, rng: random.Random) -> list[str]:
    """Pictures whose captions are to be compared with that of `name`."""
    pool = [other for other in sorted(captions) if captions[other] != captions[name]]
    if len(pool) < count:
        raise ValueError(f"{name} has {len(pool)} other captions, fewer than {count}")
    return rng.sample(pool, count)


def _picture(data: Pictures, name: str, others: Sequence[str]) -> tuple[Batch, list[Caption]]:
    """One picture, its caption and those of others."""
    single: Batch | None = None
    found: dict[str, Caption] = {}
    for batch in data.fixed([name, *others]):
        for k, one in enumerate(batch.ids):
            found[one] = batch.texts[k], {key: rows[k : k + 1] for key, rows in batch.text.items()}
            if one == name:
                single = part(batch, k, k + 1)
    assert single is not None
    return single, [found[name], *(found[other] for other in others)]


def _losses(
    family: LoadedFamily,
    objective: Objective,
    single: Batch,
    captions: Sequence[Caption],
    places: Sequence[float],
    rng: random.Random,
) -> list[tuple[float, ...]]:
    """Loss per caption and draw, one at each of the `places`, the draws the same for all captions."""
    draws = len(places)
    timesteps = timesteps_at(family, objective, torch.tensor(places), single.latents)
    generator = torch.Generator().manual_seed(rng.randrange(2**62))
    noise = torch.randn((draws, *single.latents.shape[1:]), generator=generator)
    jobs = [(caption, j) for caption in captions for j in range(draws)]
    size = max(1, min(TOGETHER, VALUES // single.latents[0].numel()))
    losses: list[float] = []
    for start in range(0, len(jobs), size):
        group = jobs[start : start + size]
        at = torch.tensor([j for _, j in group])
        batch = _with_captions(single, [caption for caption, _ in group])
        losses += sample_losses(family, objective, batch, noise[at], timesteps[at]).tolist()
    return [tuple(losses[k : k + draws]) for k in range(0, len(losses), draws)]


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
