"""Recall and precision of near duplicates among 1,000 pictures: rescaled, recompressed and slightly cropped copies.

    python tests/bench/near_duplicates.py [--seeds 0 1 2]

The set: coloured clouds (1/f^a spectra) with shapes on them, a third of them followed by a picture of the same
series (the same background with one shape replaced, in at least 3% of its pixels by at least 32 levels); the
built-in pictures, which look much alike; and 150 copies, each rescaled (0.35 to 1.8 times), recompressed (JPEG or
WebP, quality 40 to 90), cropped (up to 6% a side), or two or three of these. Counted are pairs: copies of one
picture are all pairs of each other.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from emotrain.dataset.duplicates import grouped, look_of, near_duplicates
from emotrain.dataset.scan import resolve_folder

TOTAL = 1000
COPIES = 150
Shape = tuple[str, tuple[float, float, float, float], tuple[int, int, int]]


def clouds(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    numbers = np.random.default_rng(rng.randrange(2**32))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128))) + 1 / 128
    spectra = np.fft.fft2(numbers.normal(size=(3, 128, 128))) / frequency ** rng.uniform(1.0, 1.8)
    field = np.moveaxis(np.real(np.fft.ifft2(spectra)), 0, 2) @ (np.eye(3) + numbers.random((3, 3)))
    field = (field - field.mean((0, 1))) / field.std((0, 1)) * rng.uniform(20, 50) + 128 + numbers.normal(0, 30, 3)
    return Image.fromarray(field.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def shape(rng: random.Random) -> Shape:
    x, y, w, h = rng.uniform(-0.1, 0.9), rng.uniform(-0.1, 0.9), rng.uniform(0.06, 0.5), rng.uniform(0.06, 0.5)
    return (
        rng.choice(("ellipse", "rectangle", "line")),
        (x, y, x + w, y + h),
        tuple(rng.randrange(256) for _ in range(3)),
    )


def drawn(background: Image.Image, shapes: Sequence[Shape]) -> Image.Image:
    image = background.copy()
    pen = ImageDraw.Draw(image)
    for kind, box, colour in shapes:
        place = tuple(share * side for share, side in zip(box, image.size * 2, strict=True))
        width = {"width": max(2, image.width // 60)} if kind == "line" else {}
        getattr(pen, kind)(place, fill=colour, **width)
    return image


def series(rng: random.Random) -> list[Image.Image]:
    """One picture, or two of a series that differ visibly."""
    background = clouds(rng, (rng.choice((256, 320, 384)), rng.choice((256, 320, 384))))
    shapes = [shape(rng) for _ in range(rng.randrange(2, 9))]
    first = drawn(background, shapes)
    for _ in range(50 if rng.random() < 1 / 3 else 0):
        changed = list(shapes)
        changed[rng.randrange(len(changed))] = shape(rng)
        second = drawn(background, changed)
        away = np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).max(axis=2)
        if (away >= 32).mean() >= 0.03:
            return [first, second]
    return [first]


def rescaled(image: Image.Image, rng: random.Random) -> Image.Image:
    factor = rng.uniform(0.35, 1.8)
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    return image.resize((round(image.width * factor), round(image.height * factor)), rng.choice(filters))


def recompressed(image: Image.Image, rng: random.Random) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, rng.choice(("JPEG", "WEBP")), quality=rng.randrange(40, 91))
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def cropped(image: Image.Image, rng: random.Random) -> Image.Image:
    left, top, right, bottom = (rng.uniform(0, 0.06) for _ in range(4))
    w, h = image.size
    return image.crop((round(left * w), round(top * h), round((1 - right) * w), round((1 - bottom) * h)))


def builtin() -> list[Image.Image]:
    paths = [
        path for name in ("example", "example-heldout") for path in resolve_folder(f"builtin:{name}").glob("*.png")
    ]
    return [Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC) for path in sorted(paths)]


def collection(seed: int) -> tuple[list[Image.Image], list[int], dict[int, str]]:
    """Pictures, for each the original it shows, and how each copy was made."""
    rng = random.Random(seed)
    pictures = builtin()
    while len(pictures) < TOTAL - COPIES:
        pictures += series(rng)
    pictures = pictures[: TOTAL - COPIES]
    shows = list(range(len(pictures)))
    ways: tuple[Callable[[Image.Image, random.Random], Image.Image], ...] = (rescaled, recompressed, cropped)
    made: dict[int, str] = {}
    for _ in range(COPIES):
        source = rng.randrange(TOTAL - COPIES)
        image, chosen = pictures[source], rng.sample(ways, rng.randrange(1, 4))
        for way in chosen:
            image = way(image, rng)
        made[len(pictures)] = " + ".join(sorted(way.__name__ for way in chosen))
        pictures.append(image)
        shows.append(source)
    return pictures, shows, made


def pairs(groups: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
    return {(a, b) for group in groups for k, a in enumerate(group) for b in group[k + 1 :]}


def measure(seed: int) -> tuple[int, int, int, dict[str, list[bool]], float, float]:
    pictures, shows, made = collection(seed)
    start = time.process_time()
    looks = [look_of(picture) for picture in pictures]
    looked = time.process_time() - start
    start = time.process_time()
    found = pairs(grouped(near_duplicates(looks)))
    searched = time.process_time() - start
    wanted = pairs([[k for k, source in enumerate(shows) if source == original] for original in set(shows)])
    by_way: dict[str, list[bool]] = {}
    for copy, way in made.items():
        by_way.setdefault(way, []).append((shows[copy], copy) in found)
    return len(found & wanted), len(found), len(wanted), by_way, looked, searched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    right = found = wanted = 0
    ways: dict[str, list[bool]] = {}
    for seed in parser.parse_args().seeds:
        one_right, one_found, one_wanted, by_way, looked, searched = measure(seed)
        right, found, wanted = right + one_right, found + one_found, wanted + one_wanted
        for way, hits in by_way.items():
            ways.setdefault(way, []).extend(hits)
        print(
            f"seed {seed}: recall {one_right / one_wanted:.4f}, precision {one_right / max(one_found, 1):.4f} "
            f"({one_wanted} pairs; looks {looked:.1f} s, search {searched:.1f} s of CPU)",
            flush=True,
        )
    for way, hits in sorted(ways.items()):
        print(f"  {way:<34} {sum(hits)} of {len(hits)}")
    print(f"all: recall {right / wanted:.4f}, precision {right / max(found, 1):.4f}, {wanted} pairs")


if __name__ == "__main__":
    main()
