"""The size each picture is brought to: nearest aspect, not enlarged, none dropped (no torch).

A bucket has about the area of the resolution and sides that are multiples of `step`. A picture is
scaled until it covers its bucket, and what stands out is cut off evenly on both sides. A picture
too small for that gets a smaller bucket of its own, its size rounded down to the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Size = tuple[int, int]  # width, height in pixels
FILLS = 0.75  # share of a resolution's area that a picture needs for being trained at it


@dataclass(frozen=True)
class Placement:
    """Where a picture goes: scaled to `resize`, cut to the bucket at (left, top); in pixels."""

    bucket_w: int
    bucket_h: int
    resize_w: int
    resize_h: int
    crop_left: int
    crop_top: int
    crop_share: float  # part of the scaled picture's area that is cut off, 0..1
    scale: float  # resize over original; above 1 it is enlarged
    resolution: int

    @property
    def size(self) -> Size:
        """Width and height of the bucket."""
        return self.bucket_w, self.bucket_h

    @property
    def enlarged(self) -> bool:
        """Whether the picture is made larger than it is."""
        return self.scale > 1.0


@dataclass(frozen=True)
class BucketRules:
    """How buckets are made; `None` takes half, and one and a half times, the resolution."""

    resolutions: tuple[int, ...]
    step: int = 64
    min_side: int | None = None
    max_side: int | None = None
    upscale: bool = False

    def __post_init__(self) -> None:
        if not self.resolutions or self.step < 1:
            raise ValueError(f"no resolution, or step {self.step} is not positive")
        if self.limits(self.resolutions[0])[0] > self.limits(self.resolutions[0])[1]:
            raise ValueError(f"min_side {self.min_side} is above max_side {self.max_side}")

    def limits(self, resolution: int) -> Size:
        """Shortest and longest side at a resolution, multiples of the step."""
        low = self.min_side if self.min_side is not None else resolution // 2
        high = self.max_side if self.max_side is not None else resolution * 3 // 2
        up = max(self.step, -(-low // self.step) * self.step)
        return up, max(self.step, high // self.step * self.step)


def make_buckets(resolution: int, step: int, min_side: int, max_side: int) -> tuple[Size, ...]:
    """All sizes of at most resolution^2 pixels, sides multiples of `step` in min_side..max_side.

    For every width the largest such height, both ways round, and the square.

    Raises:
        ValueError: a number that is not positive.
    """
    if min(resolution, step, min_side, max_side) < 1:
        raise ValueError(f"bad resolution {resolution}, step {step} or sides {min_side}..{max_side}")
    area = resolution * resolution
    square = max(step, resolution // step * step)
    sizes = {(square, square)}
    for width in range(min_side, max_side + 1, step):
        height = min(area // width // step * step, max_side)
        if height >= min_side:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def assign(width: int, height: int, rules: BucketRules, resolution: int | None = None) -> Placement:
    """The placement of a picture of `width` x `height` pixels at one resolution (or the first).

    Raises:
        ValueError: a side that is not positive.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels")
    resolution = rules.resolutions[0] if resolution is None else resolution
    sizes = make_buckets(resolution, rules.step, *rules.limits(resolution))
    picture = (width, height)
    bucket = min(sizes, key=lambda size: (_distance(size, picture), -size[0] * size[1], size))
    if not rules.upscale and _cover(picture, bucket) > 1.0:
        bucket = _own_bucket(width, height, rules, resolution)
    return _place(width, height, bucket, resolution)


def place(width: int, height: int, rules: BucketRules) -> tuple[Placement, ...]:
    """The placements of a picture at all resolutions it is trained at, smallest first.

    These are the resolutions of which it has three quarters of the area (all, where enlarging is
    allowed), and in any case the smallest one. Placements of the same size are given once.
    """
    smallest = min(rules.resolutions)
    placements: dict[Size, Placement] = {}
    for resolution in sorted(set(rules.resolutions)):
        if resolution == smallest or rules.upscale or width * height >= FILLS * resolution**2:
            placement = assign(width, height, rules, resolution)
            placements.setdefault(placement.size, placement)
    return tuple(placements.values())


def _own_bucket(width: int, height: int, rules: BucketRules, resolution: int) -> Size:
    """The picture's own size, shrunk to area and longest side, rounded down to the step."""
    longest = rules.limits(resolution)[1]
    shrink = min(1.0, resolution / math.sqrt(width * height), longest / max(width, height))
    w, h = (max(1, math.floor(side * shrink / rules.step + 1e-9)) * rules.step for side in (width, height))
    return w, h


def _distance(size: Size, other: Size) -> float:
    return abs(math.log(size[0] * other[1] / (size[1] * other[0])))


def _cover(size: Size, bucket: Size) -> float:
    return max(bucket[0] / size[0], bucket[1] / size[1])


def _place(width: int, height: int, bucket: Size, resolution: int) -> Placement:
    scale = _cover((width, height), bucket)
    resize_w = max(bucket[0], round(width * scale))
    resize_h = max(bucket[1], round(height * scale))
    return Placement(
        bucket_w=bucket[0],
        bucket_h=bucket[1],
        resize_w=resize_w,
        resize_h=resize_h,
        crop_left=(resize_w - bucket[0]) // 2,
        crop_top=(resize_h - bucket[1]) // 2,
        crop_share=1.0 - bucket[0] * bucket[1] / (resize_w * resize_h),
        scale=scale,
        resolution=resolution,
    )
