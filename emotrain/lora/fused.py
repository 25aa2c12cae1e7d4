"""q, k and v (and FLUX's mlp) as the one module that the original checkpoints have, and apart again: exact both ways.

Apart -> fused: A stacked in rows, B block by block on the diagonal, alpha times the number of blocks, so that
alpha / rank stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.lora import names


@dataclass(frozen=True)
class Pair:
    """One module's LoRA: A [rank, in, ...], B [out, rank, ...], and alpha (strength alpha / rank)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def strength(self) -> float:
        """Factor in front of B A."""
        return self.alpha / self.rank

    def named(self, path: str) -> dict[str, Tensor]:
        """The weights under the canonical names of a module."""
        return {path + names.DOWN: self.down, path + names.UP: self.up}

    def folded(self) -> Pair:
        """The same update with strength 1: alpha / rank multiplied into B."""
        return self if self.strength == 1.0 else Pair(self.down, self.up * self.strength, float(self.rank))

    def with_alpha(self, alpha: float) -> Pair:
        """The same update with another alpha: the difference goes into B."""
        return self if alpha == self.alpha else Pair(self.down, self.up * (self.alpha / alpha), alpha)


def fuse(parts: Sequence[Pair | None], widths: Sequence[int]) -> Pair:
    """Join parts that share their input into one pair with stacked outputs; None is a part without a LoRA.

    Args:
        parts: in the order of the output rows.
        widths: output rows of each part, needed where a part is None.

    Raises:
        ModelError: inputs of different width.
        ValueError: no part at all.
    """
    present = [part for part in parts if part is not None]
    if not present:
        raise ValueError("nothing to fuse")
    first = present[0]
    if any(part.down.shape[1:] != first.down.shape[1:] for part in present):
        raise ModelError("q, k and v of one attention have inputs of different width")
    if any(part is not None and part.up.shape[0] != width for part, width in zip(parts, widths, strict=True)):
        raise ModelError(
            f"outputs of {[p.up.shape[0] for p in present]} rows do not make a fused layer of {list(widths)}"
        )
    if len(present) == len(parts) and _one_down(present):
        return Pair(first.down, torch.cat([part.up for part in present]), first.alpha)
    if any(part.strength != first.strength for part in present):
        present = [part.folded() for part in present]
        parts = [None if part is None else part.folded() for part in parts]
        first = present[0]
    rank = max(part.rank for part in present)
    down = first.down.new_zeros((rank * len(parts), *first.down.shape[1:]))
    up = first.up.new_zeros((sum(widths), rank * len(parts), *first.up.shape[2:]))
    row = 0
    for index, (part, width) in enumerate(zip(parts, widths, strict=True)):
        if part is not None:
            column = index * rank
            down[column : column + part.rank] = part.down
            up[row : row + width, column : column + part.rank] = part.up
        row += width
    return Pair(down, up, first.strength * rank * len(parts))


def split(pair: Pair, widths: Sequence[int]) -> list[Pair | None]:
    """Take a fused pair apart. Blocks on the diagonal come back as they were; a dense one lends its A to every part.

    A part whose block is all zero (it had no LoRA) comes back as None.

    Raises:
        ModelError: B has not the rows that the widths ask for.
    """
    if pair.up.shape[0] != sum(widths):
        raise ModelError(f"a fused layer has {pair.up.shape[0]} output rows instead of {sum(widths)}")
    ups = torch.split(pair.up, list(widths))
    rank, left = divmod(pair.rank, len(widths))
    if left or not _is_block_diagonal(ups, rank):
        return [Pair(pair.down, up.contiguous(), pair.alpha) for up in ups]
    parts: list[Pair | None] = []
    for index, up in enumerate(ups):
        columns = slice(index * rank, (index + 1) * rank)
        down, block = pair.down[columns], up[:, columns]
        empty = not down.any() and not block.any()
        parts.append(None if empty else Pair(down.contiguous(), block.contiguous(), pair.alpha / len(widths)))
    return parts


def swap_halves(up: Tensor) -> Tensor:
    """(shift, scale) <-> (scale, shift) in B's rows."""
    first, second = up.chunk(2)
    return torch.cat([second, first])


def _one_down(parts: Sequence[Pair]) -> bool:
    first = parts[0]
    return len(parts) > 1 and all(
        part.rank == first.rank and part.alpha == first.alpha and torch.equal(part.down, first.down)
        for part in parts[1:]
    )


def _is_block_diagonal(ups: Sequence[Tensor], rank: int) -> bool:
    return not any(up[:, : index * rank].any() or up[:, (index + 1) * rank :].any() for index, up in enumerate(ups))
