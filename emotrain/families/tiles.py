"""Pictures that are too large for one pass of a VAE, in overlapping pieces.

Not diffusers' own tiles: those begin at fixed places, so that the last one may be a strip of 64 pixels, as of 832x1216,
and a VAE's norms see a strip as another picture. Here all pieces are of one size, evenly spread, and there are fewer.

Shape letters: H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OVERLAP = 0.25  # of a piece's side, at least


def in_tiles(work: Callable[[Tensor], Tensor], whole: Tensor, side: int, step: int = 1) -> Tensor:
    """What `work` makes of a tensor [..., H, W] piece by piece, blended where pieces overlap.

    Args:
        work: gives [..., H, W] of the same scale to what it is given, for pieces of any size.
        whole: what it is done to.
        side: of a piece.
        step: pieces begin at multiples of this, so that what `work` makes smaller begins at whole places too.
    """
    rows, columns = (starts(length, side, step) for length in whole.shape[-2:])
    pieces = [[work(whole[..., y : y + side, x : x + side]) for x in columns] for y in rows]
    one = pieces[0][0]
    scale = one.shape[-1] / min(side, whole.shape[-1])
    tops, lefts = ([round(start * scale) for start in found] for found in (rows, columns))
    height, width = one.shape[-2:]
    total = one.new_zeros(*one.shape[:-2], tops[-1] + height, lefts[-1] + width)
    shares = total.new_zeros(total.shape[-2:])
    for row, top, high in zip(pieces, tops, ramps(tops, height), strict=True):
        for piece, left, wide in zip(row, lefts, ramps(lefts, width), strict=True):
            share = (high[:, None] * wide).to(total.device)
            total[..., top : top + height, left : left + width] += piece * share
            shares[top : top + height, left : left + width] += share
    return total / shares


def starts(length: int, side: int, step: int) -> list[int]:
    """Where pieces of `side` begin, evenly spread over `length`."""
    if length <= side:
        return [0]
    count = math.ceil((length - OVERLAP * side) / ((1 - OVERLAP) * side))
    return [round((length - side) * number / (count - 1) / step) * step for number in range(count)]


def ramps(begins: Sequence[int], side: int) -> list[Tensor]:
    """What each piece counts, [side]: from almost nothing to one over what it shares with a neighbour."""
    found = [torch.ones(side) for _ in begins]
    for first, (one, other) in enumerate(zip(begins, begins[1:], strict=False)):
        shared = one + side - other
        rising = (torch.arange(shared) + 0.5) / shared
        found[first][side - shared :] *= 1 - rising
        found[first + 1][:shared] *= rising
    return found
