"""The validation: the loss of a few pictures at fixed noise and fixed, stratified timesteps.

The pictures are held out (or flipped training pictures where none can be spared), so that the validation can show
over-training, which the training loss cannot. Noise and timesteps never change, so that two validations differ by the
adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emotrain.batch import Batch
from emotrain.ranks import ALONE, Ranks
from emotrain.train.losses import GOLDEN, predict, sample_losses, timesteps_at

if TYPE_CHECKING:
    from emotrain.batch import TextEmbeds
    from emotrain.diffusion import Objective
    from emotrain.families.common import LoadedFamily
    from emotrain.lora.adapter import Adapter


SMALL = 4096 * 4  # numbers of one picture's latents up to which all go through the denoiser together


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """The batch made of these samples, in this order; one may come several times."""
    size, index = batch.conditioning, torch.tensor(rows)

    def change(tensor: Tensor) -> Tensor:
        return tensor[index]

    return replace(
        batch,
        latents=change(batch.latents),
        text={key: change(value) for key, value in batch.text.items()},
        conditioning=replace(
            size,
            original_sizes=change(size.original_sizes),
            crop_top_lefts=change(size.crop_top_lefts),
            target_sizes=change(size.target_sizes),
        ),
        weights=change(batch.weights),
        masks=None if batch.masks is None else change(batch.masks),
        ids=tuple(batch.ids[row] for row in rows),
        texts=tuple(batch.texts[row] for row in rows) if batch.texts else (),
    )


def repeat(batch: Batch, times: int) -> Batch:
    """Every sample `times` times in a row."""
    return rows_of(batch, [row for row in range(len(batch.ids)) for _ in range(times)])


def part(batch: Batch, start: int, end: int) -> Batch:
    """Samples start..end of a batch."""
    return rows_of(batch, range(start, min(end, len(batch.ids))))


class Validation:
    """Fixed pictures, noise and timesteps.

    Args:
        batches: the pictures, one bucket size a batch.
        empty_text: cached embeddings of the empty caption, one row: what the drift is measured with.
        draws: noise draws and timesteps per picture, spread evenly over the noise scale.
        seed: of the noise.
        ranks: the processes that share the work.
    """

    def __init__(
        self,
        family: LoadedFamily,
        objective: Objective,
        adapter: Adapter,
        batches: Sequence[Batch],
        empty_text: TextEmbeds,
        *,
        draws: int = 4,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.family, self.objective, self.adapter, self.ranks = family, objective, adapter, ranks
        self.empty_text, self.draws = empty_text, draws
        self.parts: list[tuple[Batch, Tensor, Tensor]] = []
        self._base: list[Tensor] = []  # what the base predicts where drift looks
        generator = torch.Generator().manual_seed(seed + 77_777)
        picture = 0
        for batch in batches:
            wide = repeat(batch, draws)
            u = torch.tensor(
                [
                    (j + ((picture + i + 0.5) * GOLDEN) % 1.0) / draws
                    for i in range(len(batch.ids))
                    for j in range(draws)
                ]
            )
            picture += len(batch.ids)
            self.parts.append(
                (
                    wide,
                    torch.randn(wide.latents.shape, generator=generator),
                    timesteps_at(family, objective, u, batch.latents),
                )
            )

    def pictures(self, progress: Callable[[int, int], None] | None = None) -> list[float]:
        """Mean loss of each picture over its draws; `progress` is told how many of how many pieces are done."""
        each: list[float] = self.losses(progress).double().view(-1, self.draws).mean(dim=1).tolist()
        return each

    @torch.no_grad()
    def losses(self, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Loss of each picture and draw, always in the same order, float32 [pictures * draws]."""
        pieces = [piece for part in self.parts for piece in self._pieces(*part)]
        own = [number for number in range(len(pieces)) if self.ranks.has(number)]
        losses = []
        for done, number in enumerate(own):
            if progress is not None:
                progress(done, len(own))
            losses.append(sample_losses(self.family, self.objective, *pieces[number]))
        if self.ranks.world > 1:
            found = self.ranks.meet([each.tolist() for each in losses])
            losses = [torch.tensor(found[n % self.ranks.world][n // self.ranks.world]) for n in range(len(pieces))]
        return torch.cat(losses)

    @torch.no_grad()
    def drift(self) -> float:
        """Mean squared change that the adapter makes to predictions without a caption, one draw a picture."""
        if not self._base:
            with self.adapter.off():
                self._base = self._uncaptioned()
        changes = [(on - off).pow(2).flatten() for on, off in zip(self._uncaptioned(), self._base, strict=True)]
        if self.ranks.world == 1:
            return float(torch.cat(changes).mean())
        sums = self.ranks.meet([[float(each.double().sum()), each.numel()] for each in changes])
        totals = [sum(column) for column in zip(*(pair for pairs in sums for pair in pairs), strict=True)]
        return float(totals[0] / totals[1])

    def _uncaptioned(self) -> list[Tensor]:
        """Predictions for the first bucket's pictures with the empty caption, float32, piece by piece."""
        batch, noise, timesteps = self.parts[0]
        rows = [row * self.draws + row % self.draws for row in range(len(batch.ids) // self.draws)]
        found = []
        pieces = self._pieces(rows_of(batch, rows), noise[rows], timesteps[rows])
        for number, (piece, own_noise, own_timesteps) in enumerate(pieces):
            if not self.ranks.has(number):
                continue
            count = len(piece.ids)
            empty = {key: value.expand(count, *value.shape[1:]) for key, value in self.empty_text.items()}
            noisy = self.objective.add_noise(piece.latents, own_noise, own_timesteps)
            found.append(predict(self.family, replace(piece, text=empty, texts=("",) * count), noisy, own_timesteps))
        return found

    def _pieces(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> list[tuple[Batch, Tensor, Tensor]]:
        """Small latents go through the denoiser together, large ones one by one, to spare memory.

        In as many parts as there are processes at least.
        """
        size = -(-len(batch.ids) // self.ranks.world) if batch.latents[0].numel() <= SMALL else 1
        return [
            (
                part(batch, start, start + size),
                noise[start : start + size],
                timesteps[start : start + size],
            )
            for start in range(0, len(batch.ids), size)
        ]
