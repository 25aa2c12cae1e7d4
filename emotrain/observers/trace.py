"""A whole run's curve in bounded memory: neighbours share a bucket once it is long."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

CAPACITY = 1024

Floats = NDArray[np.float64]


class Trace:
    """Lowest and highest value of each bucket; when all buckets are full, pairs are joined.

    So a curve of any length keeps at most `capacity` buckets and loses no peak. Values that are not
    finite are left out of the curve, but still take their place in time.
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

    def columns(self, width: int, *, joined: bool = True) -> tuple[Floats, Floats]:
        """Lowest and highest value in each of `width` columns [width]; NaN where there is none.

        Where there are fewer values than columns, `joined` fills the columns between them.
        """
        num = len(self)
        if num == 0 or width < 1:
            empty = np.full(max(width, 0), np.nan)
            return empty, empty
        low, high = self._low[:num], self._high[:num]
        if num >= width:
            starts = (np.arange(width) * num) // width
            return np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
        if not joined:
            places = np.round(np.arange(num) * ((width - 1) / max(num - 1, 1))).astype(int)
            spread = np.full((2, width), np.nan)
            spread[:, places] = low, high
            return spread[0], spread[1]
        where = np.arange(width) * ((num - 1) / max(width - 1, 1))
        middle = 0.5 * (low + high)
        known = np.flatnonzero(np.isfinite(middle))
        if known.size == 0:
            empty = np.full(width, np.nan)
            return empty, empty
        line = np.interp(where, known, middle[known])
        return line, line

    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest value of all; None before the first finite one."""
        num = len(self)
        low, high = self._low[:num], self._high[:num]
        known = np.isfinite(low)
        if not known.any():
            return None
        return float(low[known].min()), float(high[known].max())

    def robust_bounds(self, share: float = 0.02) -> tuple[float, float] | None:
        """As `bounds`, but without the outermost `share` of the buckets at each side."""
        num = len(self)
        low, high = self._low[:num], self._high[:num]
        low, high = np.sort(low[np.isfinite(low)]), np.sort(high[np.isfinite(high)])
        if low.size == 0:
            return None
        skip = int(low.size * share)
        return float(low[skip]), float(high[-1 - skip])
