"""Curves and meters out of characters: braille and blocks, or plain ASCII.

A line is a list of spans (text, style name); nothing here knows about colours or terminals. H and W
are counted in character cells; a braille cell holds 4 x 2 dots.
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
    """One curve of a chart: a joined line, or `dots` at the two values of each column."""

    style: str
    low: Floats
    high: Floats
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A single sign in a chart at `x` in [0, 1] and a value."""

    x: float
    value: float
    style: str


@dataclass(frozen=True)
class Scale:
    """How values become heights, linear or logarithmic: `low` at the bottom, `high` on top."""

    low: float
    high: float
    log: bool = False

    def heights(self, values: Floats) -> Floats:
        """Values [N] as heights in [0, 1], clipped; NaN stays."""
        low, high = self.low, self.high
        if self.log:
            values = np.log10(np.maximum(values, 1e-12))
            low, high = math.log10(max(low, 1e-12)), math.log10(max(high, 1e-12))
        heights = (values - low) * (1.0 / max(high - low, 1e-12))
        return np.minimum(np.maximum(heights, 0.0), 1.0)


def scale_for(bounds: tuple[float, float] | None, *, log: bool = False, symmetric: bool = False) -> Scale:
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
        if ascii_only:
            cells = _fill(curve, scale, height) * np.uint32(ord("." if curve.dots else "*"))
            codes = np.where(cells > 0, cells, codes)
        else:
            cells = _braille(_fill(curve, scale, height * 4))  # [H*4, W*2] -> [H, W]
            codes |= cells
        owners[cells > 0] = number
    signs = np.where(codes > 0, codes + (0 if ascii_only else 0x2800), ord(" "))
    styles = ["rule", *(curve.style for curve in curves)]
    if zero and scale.low < 0.0 < scale.high:
        row = int(_rows(np.zeros(1), scale, height)[0])
        empty = codes[row] == 0
        signs[row][empty] = ord("-") if ascii_only else ord("╌")
    if marks:
        styles.append(marks[0].style)
        columns = np.array([mark.x for mark in marks]) * (width - 1)
        where = np.minimum(np.maximum(np.round(columns), 0), width - 1).astype(int)
        rows = _rows(np.array([mark.value for mark in marks]), scale, height)
        signs[rows, where] = ord("o") if ascii_only else ord("◆")
        owners[rows, where] = len(styles) - 1
    return _spans(signs, owners, styles)


def _braille(filled: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Dots [H*4, W*2] as the code of each cell [H, W]."""
    codes = np.zeros((filled.shape[0] // 4, filled.shape[1] // 2), dtype=np.uint32)
    for y in range(4):
        for x in range(2):
            codes += filled[y::4, x::2] * _DOTS[y, x]
    return codes


def _fill(curve: Curve, scale: Scale, height: int) -> NDArray[np.bool_]:
    """Dots [height, columns] of a curve; neighbouring columns of a line are joined."""
    rows = np.arange(height)[:, None]
    same = curve.low is curve.high
    bottom = np.round((1.0 - scale.heights(curve.low)) * (height - 1))  # rows count from the top
    top = bottom if same else np.round((1.0 - scale.heights(curve.high)) * (height - 1))
    if curve.dots:
        return np.asarray((rows == top) | (rows == bottom))
    # Reach towards the previous column, so that a steep curve has no holes.
    above, below = top.copy(), bottom.copy()
    above[1:] = np.fmin(top[1:], np.where(bottom[:-1] < top[1:], bottom[:-1] + 1, top[1:]))
    below[1:] = np.fmax(bottom[1:], np.where(top[:-1] > bottom[1:], top[:-1] - 1, bottom[1:]))
    return np.asarray((rows >= above) & (rows <= below))  # comparisons with NaN are False


def _rows(values: Floats, scale: Scale, height: int) -> NDArray[np.int64]:
    """The rows of values [N] in a chart of `height` lines; what is not finite is at the bottom."""
    rows = np.nan_to_num((1.0 - scale.heights(values)) * height, nan=height)
    return np.minimum(rows.astype(np.int64), height - 1)


def _spans(signs: NDArray[np.uint32], owners: NDArray[np.uint8], styles: Sequence[str]) -> list[Line]:
    """Character codes [H, W] as lines of spans of equal style."""
    height, width = signs.shape
    # A blank cell takes the style before it, which saves spans.
    places = np.where(signs == ord(" "), 0, np.arange(width))
    owners = np.take_along_axis(owners, np.maximum.accumulate(places, axis=1), axis=1)
    text = signs.astype("<u4").tobytes().decode("utf-32-le")
    changes = np.ones((height, width), dtype=bool)  # where a span begins
    changes[:, 1:] = owners[:, 1:] != owners[:, :-1]
    starts = np.flatnonzero(changes).tolist()
    kinds = owners.reshape(-1)[starts].tolist()
    lines: list[Line] = [[] for _ in range(height)]
    for start, end, kind in zip(starts, [*starts[1:], height * width], kinds, strict=True):
        lines[start // width].append((text[start:end], styles[kind]))
    return lines


def curve_of(trace: Trace, width: int, style: str, *, dots: bool = False, ascii_only: bool = False) -> Curve:
    """A trace over `width` cells."""
    low, high = trace.columns(width if ascii_only else 2 * width, joined=not dots)
    return Curve(style, low, high, dots)


def sparkline(trace: Trace, width: int, scale: Scale, *, ascii_only: bool = False) -> str:
    """A curve in one line of `width` cells: each column's middle as one of eight heights."""
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
