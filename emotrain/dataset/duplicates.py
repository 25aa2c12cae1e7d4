"""Which pictures are copies of one another: to the byte, or nearly so (no torch).

Nearly: rescaled, recompressed or slightly cropped.

Near duplicates are found in two passes over small colour thumbnails ("looks"). A coarse 8x8
descriptor proposes candidate pairs by normalised correlation; each pair is then registered (scale
and shift along both axes, by Gauss-Newton on the brightness difference: Lucas and Kanade 1981) and
accepted only where the registered pictures agree everywhere. Pictures of one series, which share
background and pose but differ in a detail, therefore do not count.

Shape letters: N pictures, P pairs, S the look's side (64).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Floats = NDArray[np.float32]
LOOK_SIDE = 64
_CANDIDATES = 8  # nearest pictures looked at per picture
_MIN_CORRELATION = 0.55  # of the coarse descriptors; registered copies cropped by a tenth still reach it
_MIN_OVERLAP = 0.70  # share of the larger picture that both show
_MAX_RESIDUAL = 0.045  # root mean square difference, 1 = black against white
_MAX_LOCAL = 0.1  # largest local excess (5x5 of 64x64), and no more than ...
_MAX_PEAK = 3.6  # ... this many times the residual: a replaced detail stands out of the noise ...
_SEEN_LOCAL = 0.03  # ... unless it is too faint to be one
_HOPELESS = 0.20  # residual at 16 pixels after registration from where a pair is given up
_CHUNK = 192  # pairs registered at a time: their arrays stay in the cache
_FLAT = 0.012  # looks with less contrast than this (standard deviation) say nothing


@dataclass(frozen=True)
class Pair:
    """Two pictures that show the same; `first < second` are their places in the list.

    `residual` is the root mean square difference in 0..1 after registration, `overlap` the share
    that both show.
    """

    first: int
    second: int
    residual: float
    overlap: float


def look_of(picture: Image.Image) -> bytes:
    """The picture squeezed into 64x64 pixels, slightly blurred: 12,288 bytes, rows of RGB."""
    small = picture if picture.mode == "RGB" else picture.convert("RGB")  # converting would copy it
    if (factor := min(small.size) // (2 * LOOK_SIDE)) > 1:
        small = small.reduce(factor)  # whole pixels first: several times faster, the same means
    small = small.resize((LOOK_SIDE, LOOK_SIDE), Image.Resampling.BOX)
    return small.filter(ImageFilter.GaussianBlur(0.8)).tobytes()


def same_bytes(digests: Sequence[str]) -> list[tuple[int, ...]]:
    """Groups of equal digests, each with two or more places, in order of their first."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, digest in enumerate(digests):
        places[digest].append(place)
    return [tuple(group) for group in places.values() if len(group) > 1]


def near_duplicates(looks: Sequence[bytes]) -> list[Pair]:
    """All pairs of looks that show the same picture.

    Args:
        looks: one `look_of` per picture.

    Returns:
        Accepted pairs in order; of a large group of copies every member is in at least one pair.

    Raises:
        ValueError: a look has another length.
    """
    size = LOOK_SIDE * LOOK_SIDE * 3
    if any(len(look) != size for look in looks):
        raise ValueError(f"a look has {size} bytes")
    if len(looks) < 2:
        return []
    stack = np.frombuffer(b"".join(looks), np.uint8).reshape(-1, LOOK_SIDE, LOOK_SIDE, 3)
    pairs = _candidates(stack)
    found: list[Pair] = []
    for start in range(0, len(pairs), _CHUNK):
        found += _verified(stack, pairs[start : start + _CHUNK])
    return found


def grouped(pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
    """Pairs joined into groups (a copy of a copy belongs to it), sorted, in order of their first."""
    leader: dict[int, int] = {}

    def find(place: int) -> int:
        while leader.setdefault(place, place) != place:
            leader[place] = leader[leader[place]]
            place = leader[place]
        return place

    for pair in pairs:
        low, high = sorted((find(pair.first), find(pair.second)))
        leader[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for place in sorted(leader):
        groups[find(place)].append(place)
    return [tuple(group) for group in groups.values()]


def _candidates(stack: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Places [P, 2] of the pairs worth registering: the nearest by their 8x8 colour means."""
    block = LOOK_SIDE // 8
    coarse = stack.reshape(-1, 8, block, 8, block, 3).mean(axis=(2, 4), dtype=np.float32) / 255
    spread = stack.reshape(len(stack), -1, 3).std(axis=1, dtype=np.float32).max(axis=1) / 255
    flat = coarse.reshape(len(coarse), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    flat /= np.maximum(norm, 1e-6)
    flat[spread < _FLAT] = 0
    pairs: set[tuple[int, int]] = set()
    for start in range(0, len(flat), 512):
        near = flat[start : start + 512] @ flat.T  # [<=512, N]
        rows = np.arange(len(near))
        near[rows, rows + start] = -1
        count = min(_CANDIDATES, len(flat) - 1)
        best = np.argpartition(near, -count, axis=1)[:, -count:]
        for row in rows:
            for other in best[row]:
                if near[row, other] >= _MIN_CORRELATION:
                    pairs.add((min(row + start, other), max(row + start, other)))
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def _verified(stack: NDArray[np.uint8], pairs: NDArray[np.int64]) -> list[Pair]:
    """Register the pairs, first at 16 and 32 pixels in grey, then compare in colour at 64."""
    warp = np.tile(np.array([1, 0, 1, 0], np.float32), (len(pairs), 1))  # [P, 4]
    for side, rounds in ((16, 8), (32, 6), (64, 3)):
        moving, still = (np.asarray(stack[at] / np.float32(255), np.float32) for at in pairs.T)
        greys = _grey(moving, side), _grey(still, side)
        warp = _register(*greys, warp, rounds)
        if side == 16:
            moved, inside = _warped(greys[0], warp)
            error = ((moved - greys[1]) ** 2 * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1)
            hopeful = error < _HOPELESS**2
            pairs, warp = pairs[hopeful], warp[hopeful]
            if not len(pairs):
                return []
    residual, local, overlap = _compare(moving, still, warp)
    good = (residual <= _MAX_RESIDUAL) & (local <= _MAX_LOCAL) & (overlap >= _MIN_OVERLAP)
    good &= local <= np.maximum(_SEEN_LOCAL, _MAX_PEAK * residual)
    return [
        Pair(int(pairs[k, 0]), int(pairs[k, 1]), float(residual[k]), float(overlap[k])) for k in np.flatnonzero(good)
    ]


def _grey(pictures: Floats, side: int) -> Floats:
    """Mean over channels and over blocks: [P, S, S, 3] -> [P, side, side]."""
    block = pictures.shape[1] // side
    grey = pictures.mean(axis=3).reshape(-1, side, block, side, block)
    return np.asarray(grey.mean(axis=(2, 4)), np.float32)


def _register(moving: Floats, still: Floats, warp: Floats, rounds: int) -> Floats:
    """Gauss-Newton on sum (moving(warp(x)) - still(x))^2 inside the overlap.

    Args:
        moving: [P, side, side].
        still: [P, side, side].
        warp: [P, 4]: x' = a x + b, y' = c y + d in coordinates from -0.5 to 0.5.
        rounds: iterations.

    Returns:
        The better warp, [P, 4].
    """
    side = moving.shape[1]
    axis = ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]
    damping = np.eye(4, dtype=np.float32) * 1e-4
    for _ in range(rounds):
        moved, inside = _warped(moving, warp)
        difference = (still - moved) * inside
        dy, dx = np.gradient(moved, 1.0 / side, axis=(1, 2))
        dx, dy = dx * inside, dy * inside
        slopes = np.stack([dx * x, dx, dy * y, dy], axis=1).reshape(len(warp), 4, -1)
        # moved(x) has slope a * moving'(x'): the division turns it back into a step of the warp
        normal = slopes @ slopes.transpose(0, 2, 1)
        right = slopes @ difference.reshape(len(warp), -1, 1)
        scale = np.trace(normal, axis1=1, axis2=2)[:, None, None] / 4 + 1e-9
        step = np.linalg.solve(normal / scale + damping, right / scale)[..., 0]
        step = np.clip(step, -0.08, 0.08)
        # composed on the right: warp(x) <- warp(step(x))
        a, b, c, d = warp.T
        da, db, dc, dd = step.T
        warp = np.stack([a * (1 + da), a * db + b, c * (1 + dc), c * dd + d], axis=1)
        warp[:, [0, 2]] = np.clip(warp[:, [0, 2]], 0.6, 1.6)
        warp[:, [1, 3]] = np.clip(warp[:, [1, 3]], -0.3, 0.3)
    return warp.astype(np.float32)


def _axis_weights(side: int, scale: Floats, shift: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Linear interpolation along one axis [P, side, side], and which points lie inside [P, side]."""
    axis = (np.arange(side) + 0.5) / side - 0.5
    place = (scale[:, None] * axis + shift[:, None] + 0.5) * side - 0.5  # in pixels of the moving one
    inside = (place > -0.5) & (place < side - 0.5)
    place = np.clip(place, 0, side - 1)
    weights = np.maximum(0, 1 - np.abs(place[:, :, None] - np.arange(side)))
    return weights.astype(np.float32), inside


def _warped(moving: Floats, warp: Floats) -> tuple[Floats, Floats]:
    """moving(warp(x)) [P, side, side] and the overlap as 0 or 1 of the same shape."""
    rows, rows_inside = _axis_weights(moving.shape[1], warp[:, 2], warp[:, 3])
    columns, columns_inside = _axis_weights(moving.shape[2], warp[:, 0], warp[:, 1])
    moved = np.asarray(rows @ moving @ columns.transpose(0, 2, 1), np.float32)
    inside = rows_inside[:, :, None] & columns_inside[:, None, :]
    return moved, inside.astype(np.float32)


def _compare(moving: Floats, still: Floats, warp: Floats) -> tuple[Floats, Floats, Floats]:
    """Root mean square difference, largest local excess, and the overlap: three times [P].

    The excess is what the difference has above half the local contrast: next to an edge, a shift of
    half a pixel explains as much; in a smooth place nothing does but another content.
    """
    total = np.zeros(still.shape[:3], np.float32)
    excess = np.zeros(still.shape[:3], np.float32)
    for channel in range(3):
        moved, inside = _warped(moving[..., channel], warp)
        difference = np.abs(moved - still[..., channel])
        total += difference**2 / 3
        beyond = np.maximum(0, difference - 0.5 * _local_contrast(still[..., channel]))
        excess += beyond**2 / 3
    area = inside.sum(axis=(1, 2))
    residual = np.sqrt((total * inside).sum(axis=(1, 2)) / np.maximum(area, 1))
    summed = np.pad(excess * inside, ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
    five = summed[:, 5:, 5:] - summed[:, :-5, 5:] - summed[:, 5:, :-5] + summed[:, :-5, :-5]
    local = np.sqrt(np.maximum(five, 0).max(axis=(1, 2)) / 25)
    share_of_still = area / still.shape[1] ** 2
    share_of_moving = np.abs(warp[:, 0] * warp[:, 2]) * share_of_still
    return residual, local, np.minimum(share_of_still, share_of_moving).astype(np.float32)


def _local_contrast(pictures: Floats) -> Floats:
    """Largest minus smallest value of each 3x3 neighbourhood, [P, S, S]."""
    side = pictures.shape[1]
    framed = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = [framed[:, k : k + side] for k in range(3)]
    high, low = np.maximum.reduce(rows), np.minimum.reduce(rows)
    high = np.maximum.reduce([high[:, :, k : k + side] for k in range(3)])
    low = np.minimum.reduce([low[:, :, k : k + side] for k in range(3)])
    return np.asarray(high - low, np.float32)
