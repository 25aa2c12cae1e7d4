"""Curves and meters out of characters: braille or block elements, plain ASCII where those cannot be shown.

A line is a list of spans (text, style name); nothing here knows about colours or terminals. H and W are counted in
character cells; a braille cell holds 4 x 2 dots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emotrain.observers.trace import Floats, Trace

Span = tuple[str, str]
Line = list[Span]

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], dtype=np.uint32)  # [4, 2]
_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = " _.-=+*%#"
_BAR_PARTS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Curve:
    """One curve of a chart. `points` are single marks at a share of the width instead of a line."""

    style: str
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Mark:
    """A single sign in a chart at `x` in [0, 1] and a value."""

    x: float
    value: float
    style: str


@dataclass(frozen=True)
class Scale:
    """How values become heights: linear or logarithmic from `low` at the bottom to `high` at the top."""

    low: float
    high: float
    log: bool = False

    def heights(self, values: Floats) -> Floats:
        """Values [N] as heights in [0, 1], clipped; NaN stays."""
        low, high = self.low, self.high
        if self.log:
            values = np.log10(np.maximum(values, 1e-12))
            low, high = math.log10(max(low, 1e-12)), math.log10(max(high, 1e-12))
        return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)


def scale_for(
    bounds: tuple[float, float] | None, *, log: bool = False, symmetric: bool = False
) -> Scale:
    """A scale with room at both ends; `symmetric` keeps zero in the middle."""
    if bounds is None:
        return Scale(-1.0, 1.0) if symmetric else Scale(1e-8 if log else 0.0, 1.0, log)
    low, high = bounds
    if symmetric:
        size = max(abs(low), abs(high), 1e-3)
        return Scale(-size, size)
    if log:
        low, high = max(low, 1e-12), max(high, 1e-12)
        return Scale(low / 1.2, high * 1.2, True)
    room = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-6)
    return Scale(low - room, high + room)


def chart(
    curves: Sequence[Curve],
    scale: Scale,
    width: int,
    height: int,
    *,
    marks: Sequence[Mark] = (),
    zero: bool = False,
    ascii_only: bool = False,
) -> list[Line]:
    """Curves over each other, the later ones in front: `height` lines of exactly `width` cells.

    Args:
        curves: each with two values per dot column, [2 * width] (in ASCII [width]).
        scale: shared by all.
        width: W in cells.
        height: H in cells.
        marks: single signs, in front of the curves.
        zero: draw a faint line at zero where nothing else is.
        ascii_only: no braille.
    """
    dots_y, dots_x = (1, 1) if ascii_only else (4, 2)
    codes = np.zeros((height, width), dtype=np.uint32)
    owners = np.zeros((height, width), dtype=np.uint8)
    for number, curve in enumerate(curves, start=1):
        filled = _fill(curve, scale, height * dots_y)  # [H*4, W*2]
        if ascii_only:
            cells = filled.astype(np.uint32)
        else:
            blocks = filled.reshape(height, 4, width, 2)
            cells = np.einsum("hyxc,yc->hx", blocks.astype(np.uint32), _DOTS)
        owners[cells > 0] = number
        codes |= cells
    signs = np.where(codes > 0, ord("*") if ascii_only else 0x2800 + codes, ord(" "))
    styles = ["rule", *(curve.style for curve in curves)]
    if zero and scale.low < 0.0 < scale.high:
        row = _row(0.0, scale, height)
        empty = signs[row] == ord(" ")
        signs[row][empty] = ord("-") if ascii_only else ord("╌")
    for mark in marks:
        column = min(width - 1, max(0, round(mark.x * (width - 1))))
        row = _row(mark.value, scale, height)
        signs[row, column] = ord("o") if ascii_only else ord("◆")
        if mark.style not in styles:
            styles.append(mark.style)
        owners[row, column] = styles.index(mark.style)
    return [_spans(signs[row], owners[row], styles) for row in range(height)]


def _fill(curve: Curve, scale: Scale, height: int) -> NDArray[np.bool_]:
    """Dots [height, columns] of a curve; neighbouring columns are joined."""
    bottom = np.round((1.0 - scale.heights(curve.low)) * (height - 1))  # rows count from the top
    top = np.round((1.0 - scale.heights(curve.high)) * (height - 1))
    # Reach towards the previous column, so that a steep curve has no holes.
    above, below = top.copy(), bottom.copy()
    above[1:] = np.fmin(top[1:], np.where(bottom[:-1] < top[1:], bottom[:-1] + 1, top[1:]))
    below[1:] = np.fmax(bottom[1:], np.where(top[:-1] > bottom[1:], top[:-1] - 1, bottom[1:]))
    rows = np.arange(height)[:, None]
    return (rows >= above) & (rows <= below)  # comparisons with NaN are False


def _row(value: float, scale: Scale, height: int) -> int:
    place = float(scale.heights(np.array([value]))[0])
    return min(height - 1, int((1.0 - place) * height)) if math.isfinite(place) else height - 1


def _spans(signs: NDArray[np.uint32], owners: NDArray[np.uint8], styles: Sequence[str]) -> Line:
    """One row of character codes [W] as spans of equal style."""
    text = signs.astype("<u4").tobytes().decode("utf-32-le")
    cuts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(text)]
    return [
        (text[start:end], styles[owners[start]])
        for start, end in zip(cuts[:-1], cuts[1:], strict=True)
    ]


def curve_of(trace: Trace, width: int, style: str, *, ascii_only: bool = False) -> Curve:
    """A trace over `width` cells."""
    low, high = trace.columns(width if ascii_only else 2 * width)
    return Curve(style, low, high)


def sparkline(trace: Trace, width: int, scale: Scale, *, ascii_only: bool = False) -> str:
    """A curve in one line of `width` cells: the middle of each column as a block of eight heights."""
    low, high = trace.columns(width)
    levels = scale.heights(0.5 * (low + high)) * 7.0 + 1.0
    signs = _ASCII_BLOCKS if ascii_only else _BLOCKS
    known = np.where(np.isfinite(levels), np.round(levels), 0.0).astype(int)
    return "".join(signs[level] for level in known.tolist())


def meter(share: float, width: int, *, ascii_only: bool = False) -> tuple[str, str]:
    """A bar of `width` cells that is filled to `share`: the filled and the empty part."""
    if width <= 0:
        return "", ""
    share = min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
    if ascii_only:
        full = int(share * width)
        return "#" * full, "." * (width - full)
    eighths = int(share * width * 8)
    full, part = divmod(eighths, 8)
    filled = "█" * full + (_BAR_PARTS[part] if part else "")
    return filled, "░" * (width - len(filled))
