"""Copies are found however they were made, and pictures of one series are not taken for copies."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from emotrain.dataset.duplicates import LOOK_SIDE, Pair, grouped, look_of, near_duplicates, same_bytes


def scene(seed: int, width: int = 320, height: int = 288) -> Image.Image:
    """Coloured clouds with shapes on them."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64))) + 1 / 64
    clouds = np.real(np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, 64, 64))) / frequency**1.4))
    clouds = np.moveaxis(clouds / clouds.std() * 40 + 128, 0, 2).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, w, h = rng.uniform(0, 0.8), rng.uniform(0, 0.8), *rng.uniform(0.1, 0.4, 2)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        draw.ellipse((x * width, y * height, (x + w) * width, (y + h) * height), fill=colour)
    return image


def recompressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    w, h = image.size
    return image.crop((int(0.06 * w), int(0.03 * h), int(0.95 * w), int(0.98 * h)))


COPIES = {
    "smaller": lambda image: image.resize((image.width * 2 // 5, image.height * 2 // 5), Image.Resampling.LANCZOS),
    "larger": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "recompressed": recompressed,
    "cropped": cropped,
    "all three": lambda image: recompressed(cropped(image).resize((200, 180), Image.Resampling.BILINEAR)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_found_among_other_pictures(how: str) -> None:
    pictures = [scene(seed) for seed in range(12)]
    for k in (0, 5, 9):
        looks = [look_of(picture) for picture in (*pictures, COPIES[how](pictures[k]))]
        assert [(pair.first, pair.second) for pair in near_duplicates(looks)] == [(k, 12)]


def test_the_overlap_says_how_much_both_show() -> None:
    picture = scene(3)
    (pair,) = near_duplicates([look_of(picture), look_of(cropped(picture))])
    assert pair.overlap == pytest.approx(0.89 * 0.95, abs=0.03)
    assert pair.residual < 0.03


def test_pictures_of_a_series_are_no_copies() -> None:
    first = scene(3)
    second = first.copy()
    ImageDraw.Draw(second).ellipse((120, 100, 170, 150), fill="red")
    assert near_duplicates([look_of(first), look_of(second)]) == []


def test_a_recoloured_or_mirrored_picture_is_no_copy() -> None:
    first = scene(4)
    other = Image.merge("RGB", first.split()[::-1])
    flipped = first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert near_duplicates([look_of(image) for image in (first, other, flipped)]) == []


def test_blank_pictures_are_no_copies_of_each_other() -> None:
    looks = [look_of(Image.new("RGB", (200, 100), colour)) for colour in ("white", "#fdfdfd", "#fbfcfb")]
    assert near_duplicates(looks) == []


def test_the_builtin_pictures_hold_no_copies() -> None:
    from emotrain.dataset.scan import resolve_folder

    paths = [
        path for name in ("example", "example-heldout") for path in resolve_folder(f"builtin:{name}").glob("*.png")
    ]
    assert len(paths) > 90
    assert near_duplicates([look_of(Image.open(path).convert("RGB")) for path in paths]) == []


def test_few_looks_and_wrong_ones() -> None:
    assert near_duplicates([]) == []
    assert near_duplicates([bytes(LOOK_SIDE**2 * 3)]) == []
    with pytest.raises(ValueError, match="a look has 12288 bytes"):
        near_duplicates([b"short", b"short"])


def test_pairs_join_into_groups() -> None:
    pairs = [Pair(4, 7, 0, 1), Pair(0, 2, 0, 1), Pair(2, 9, 0, 1), Pair(7, 5, 0, 1)]
    assert grouped(pairs) == [(0, 2, 9), (4, 5, 7)]
    shuffled = random.Random(1).sample(pairs, len(pairs))
    assert sorted(grouped(shuffled)) == [(0, 2, 9), (4, 5, 7)]


def test_equal_digests_are_grouped() -> None:
    assert same_bytes(["a", "b", "a", "c", "b", "a"]) == [(0, 2, 5), (1, 4)]
