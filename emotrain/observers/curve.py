"""Curves out of braille dots: a whole run in bounded memory, drawn into any number of cells.

W and H count character cells; a braille cell holds 2 x 4 dots. Terminals without Unicode get stars.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.text import Text

from emotrain.observers.text import number

CAPACITY = 1024
AXIS = 8  # cells for the figures at the left of a chart
BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " _.-=+*%#"
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], dtype=np.uint32)  # [4, 2]

Floats = NDArray[np.float64]
Bounds = tuple[float, float]


class Source(Protocol):
    """Something that can be drawn as a line."""

    def columns(self, width: int) -> tuple[Floats, Floats]:
        """Lowest and highest value in each of `width` columns [width]; NaN where there is none."""


class Trace:
    """A value a step; when all buckets are full, pairs are joined.

    So a curve of any length keeps at most `capacity` buckets, each with its lowest and highest value, and loses no
    peak. Values that are not finite are left out of the curve, but still take their place in time.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity must be even and at least 2, got {capacity}")
        self._low = np.full(capacity, np.nan)
        self._high = np.full(capacity, np.nan)
        self._stride = 1
        self._full = 0  # buckets that are complete
        self._count = 0  # values in the bucket after them
        self.num_values = 0
        self.last = math.nan

    def __len__(self) -> int:
        """Buckets in use."""
        return self._full + (self._count > 0)

    def add(self, value: float) -> None:
        """Append one value."""
        self.num_values += 1
        self.last = value
        if math.isfinite(value):
            place = self._full
            low, high = self._low[place], self._high[place]
            self._low[place] = value if not low <= value else low
            self._high[place] = value if not high >= value else high
        self._count += 1
        if self._count == self._stride:
            self._full += 1
            self._count = 0
            if self._full == len(self._low):
                self._halve()

    def _halve(self) -> None:
        half = len(self._low) // 2
        self._low[:half] = np.fmin(self._low[0::2], self._low[1::2])
        self._high[:half] = np.fmax(self._high[0::2], self._high[1::2])
        self._low[half:] = np.nan
        self._high[half:] = np.nan
        self._full = half
        self._stride *= 2

    def columns(self, width: int) -> tuple[Floats, Floats]:
        """Where there are fewer values than columns, the columns between them are filled."""
        num = len(self)
        low, high = self._low[:num], self._high[:num]
        if num >= width > 0:
            starts = (np.arange(width) * num) // width
            return np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
        known = np.flatnonzero(np.isfinite(low))
        if width < 1 or known.size == 0:
            empty = np.full(max(width, 0), np.nan)
            return empty, empty
        where = np.arange(width) * ((num - 1) / max(width - 1, 1))
        line = np.interp(where, known, 0.5 * (low + high)[known])
        return line, line

    def bounds(self, outside: float = 0.0) -> Bounds | None:
        """Lowest and highest value; None before the first finite one.

        Args:
            outside: share of the buckets at each end that may lie beyond.
        """
        num = len(self)
        low, high = self._low[:num], self._high[:num]
        low, high = np.sort(low[np.isfinite(low)]), np.sort(high[np.isfinite(high)])
        if low.size == 0:
            return None
        skip = int(low.size * outside)
        return float(low[skip]), float(high[-1 - skip])


@dataclass(frozen=True)
class Points:
    """Values at some steps of `first`..`last`, joined by a line."""

    points: Sequence[tuple[int, float]]
    first: int
    last: int

    def columns(self, width: int) -> tuple[Floats, Floats]:
        """The line between the points; NaN before the first and after the last."""
        if not self.points or width < 1:
            empty = np.full(max(width, 0), np.nan)
            return empty, empty
        steps, values = np.array(self.points, dtype=float).T
        where = np.linspace(self.first, max(self.last, self.first + 1), width)
        half = 0.5 * (where[-1] - where[0]) / max(width - 1, 1)
        line = np.interp(where, steps, values)
        line[(where < steps[0] - half) | (where > steps[-1] + half)] = np.nan
        return line, line

    def cells(self, width: int) -> NDArray[np.int64]:
        """The column of each point."""
        steps = np.array([step for step, _ in self.points], dtype=float)
        places = np.round((steps - self.first) / max(self.last - self.first, 1) * (width - 1))
        return np.clip(places, 0, width - 1).astype(np.int64)


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
        return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)


def scale_for(bounds: Bounds | None, *, log: bool = False, symmetric: bool = False) -> Scale:
    """A scale with room at both ends; `symmetric` keeps zero in the middle."""
    low, high = bounds or (1e-8 if log else 0.0, 1.0)
    if symmetric:
        size = max(abs(low), abs(high), 1e-3)
        return Scale(-size, size)
    if log:
        return Scale(max(low, 1e-12) / 1.2, max(high, 1e-12) * 1.2, True)
    room = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-6)
    return Scale(low - room, high + room)


@dataclass(frozen=True)
class Plot:
    """Curves over each other, the later ones in front: fills the width, and the height that it is given.

    Args:
        layers: what to draw, each in a style.
        scale: shared by all.
        marks: single signs in front of the curves, in a style.
        title: a line above.
        steps: first and last step, for an axis below.
        rows: the height where none is given.
    """

    layers: Sequence[tuple[Source, str]]
    scale: Scale
    marks: tuple[Points, str] | None = None
    title: Text = field(default_factory=Text)
    steps: tuple[int, int] | None = None
    rows: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment | Text]:
        """Title, curves with the highest and lowest figure at their left, and the steps below."""
        width, height = options.max_width, options.height or self.rows
        dim = console.get_style("dim")
        if self.title:
            title = self.title.copy()
            title.truncate(width, overflow="ellipsis")
            yield title
            height -= 1
        rows = height - (self.steps is not None)
        if rows < 1 or width <= AXIS:
            return
        if height == 1:
            source, style = self.layers[-1]
            yield Segment(sparkline(source, width, self.scale, ascii_only=options.ascii_only), console.get_style(style))
            yield Segment.line()
            return
        for row, spans in enumerate(self._rows(width - AXIS, rows, options.ascii_only)):
            figure = self.scale.high if row == 0 else self.scale.low if row == rows - 1 else None
            text = number(figure, digits=3) if figure is not None else ""
            yield Segment(f"{text:>{AXIS - 1}} "[:AXIS], dim)
            yield from (Segment(text, console.get_style(style)) for text, style in spans)
            yield Segment.line()
        if self.steps is not None:
            yield Segment(" " * AXIS + step_axis(*self.steps, width - AXIS), dim)
            yield Segment.line()

    def _rows(self, width: int, height: int, ascii_only: bool) -> list[list[tuple[str, str]]]:
        """H lines of W cells as spans of equal style."""
        codes = np.zeros((height, width), dtype=np.uint32)
        owners = np.zeros((height, width), dtype=np.uint8)
        for place, (source, _) in enumerate(self.layers, start=1):
            dots = _fill(
                source.columns(width if ascii_only else 2 * width), self.scale, height * (1 if ascii_only else 4)
            )
            cells = dots * np.uint32(ord("*")) if ascii_only else _braille(dots)
            codes |= cells
            owners[cells > 0] = place
        signs = np.where(codes > 0, codes + (0 if ascii_only else 0x2800), ord(" "))
        styles = ["dim", *(style for _, style in self.layers)]
        if self.scale.low < 0.0 < self.scale.high:
            row = int(self._row_of(np.zeros(1), height)[0])
            signs[row][codes[row] == 0] = ord("-") if ascii_only else ord("╌")
        if self.marks is not None and self.marks[0].points:
            points, style = self.marks
            styles.append(style)
            where = self._row_of(np.array([value for _, value in points.points]), height), points.cells(width)
            signs[where] = ord("o") if ascii_only else ord("◆")
            owners[where] = len(styles) - 1
        return _spans(signs, owners, styles)

    def _row_of(self, values: Floats, height: int) -> NDArray[np.int64]:
        """The rows of values [N]; what is not finite is at the bottom."""
        rows = np.nan_to_num((1.0 - self.scale.heights(values)) * height, nan=height)
        return np.minimum(rows.astype(np.int64), height - 1)


def _fill(columns: tuple[Floats, Floats], scale: Scale, height: int) -> NDArray[np.bool_]:
    """Dots [height, columns] of a curve; neighbouring columns are joined, so that a steep curve has no holes."""
    rows = np.arange(height)[:, None]
    low, high = columns
    bottom = np.round((1.0 - scale.heights(low)) * (height - 1))  # rows count from the top
    top = np.round((1.0 - scale.heights(high)) * (height - 1))
    above, below = top.copy(), bottom.copy()
    above[1:] = np.fmin(top[1:], np.where(bottom[:-1] < top[1:], bottom[:-1] + 1, top[1:]))
    below[1:] = np.fmax(bottom[1:], np.where(top[:-1] > bottom[1:], top[:-1] - 1, bottom[1:]))
    return np.asarray((rows >= above) & (rows <= below))  # comparisons with NaN are False


def _braille(filled: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Dots [H*4, W*2] as the code of each cell [H, W]."""
    codes = np.zeros((filled.shape[0] // 4, filled.shape[1] // 2), dtype=np.uint32)
    for y in range(4):
        for x in range(2):
            codes += filled[y::4, x::2] * _DOTS[y, x]
    return codes


def _spans(signs: NDArray[np.uint32], owners: NDArray[np.uint8], styles: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Character codes [H, W] as lines of spans of equal style."""
    height, width = signs.shape
    places = np.where(signs == ord(" "), 0, np.arange(width))  # a blank takes the style before it, which saves spans
    owners = np.take_along_axis(owners, np.maximum.accumulate(places, axis=1), axis=1)
    text = signs.astype("<u4").tobytes().decode("utf-32-le")
    changes = np.ones((height, width), dtype=bool)  # where a span begins
    changes[:, 1:] = owners[:, 1:] != owners[:, :-1]
    starts = np.flatnonzero(changes).tolist()
    kinds = owners.reshape(-1)[starts].tolist()
    lines: list[list[tuple[str, str]]] = [[] for _ in range(height)]
    for start, end, kind in zip(starts, [*starts[1:], height * width], kinds, strict=True):
        lines[start // width].append((text[start:end], styles[kind]))
    return lines


def sparkline(source: Source, width: int, scale: Scale, *, ascii_only: bool = False) -> str:
    """A curve in one line of `width` cells: each column's middle as one of eight heights."""
    low, high = source.columns(width)
    levels = scale.heights(0.5 * (low + high)) * 7.0 + 1.0
    signs = ASCII_BLOCKS if ascii_only else BLOCKS
    known = np.where(np.isfinite(levels), np.round(levels), 0.0).astype(int)
    return "".join(signs[level] for level in known.tolist())


def step_axis(first: int, last: int, width: int) -> str:
    """Round steps, each over its place, in a line of `width` cells that ends with the last step."""
    tail = f"step {last}"
    if width < len(tail):
        return ""
    unit = next(
        round(lead * 10**power)
        for power in range(12)
        for lead in (1, 2, 5)
        if (last - first) / (lead * 10**power) * (len(str(last)) + 6) <= width
    )
    cells = [" "] * (width - len(tail))
    free = 0
    for step in range(-(-first // unit) * unit, last, unit):
        text = str(step)
        place = max(0, round((step - first) / max(last - first, 1) * (width - 1)) - len(text) // 2)
        if free <= place and place + len(text) < len(cells):
            cells[place : place + len(text)] = text
            free = place + len(text) + 1
    return "".join(cells) + tail
