"""Twelve computed styles of four sets of pictures, to try rules on; half of the styles are kept for reports.

    python tests/bench/styles.py DIR

Writes DIR/STYLE/train and DIR/STYLE/heldout, pictures with captions, for `gain_trials.py` and for `stop_regret.py` and
`lr_free.py --pictures`. They are made of `tests/bench/base_pictures`, those of the example data set; the three sets
that `third_base.py` draws lie in DIR/SET-STYLE, in pictures that no base has seen. A mosaic's grout lies to the right
of and below its stones: flipped it is another pattern.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from make_assets import edges, thick
from PIL import Image
from third_base import SETS, scene

from emotrain.dataset.scan import resolve_folder

DRAWN = {"train": range(100_000, 100_035), "heldout": range(200_000, 200_064)}  # numbers that no base has seen
PLAIN = Path(__file__).parent / "base_pictures"
GREY = np.array([0.299, 0.587, 0.114], np.float32)
HEAT = np.array([[1, 1, 0.8], [1, 0.8, 0.1], [0.9, 0.2, 0.2], [0.45, 0.05, 0.5], [0.05, 0, 0.25]], np.float32)


def mosaic(picture: np.ndarray) -> np.ndarray:
    """Stones of 4 x 4 pixels with dark grout."""
    stones = picture.reshape(16, 4, 16, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    stones[3::4] *= 0.55
    stones[:, 3::4] *= 0.55
    return stones


def thermal(picture: np.ndarray) -> np.ndarray:
    """Brightness as colour, white cold and black hot."""
    grey = picture @ GREY
    return np.stack([np.interp(grey, np.linspace(0, 1, len(HEAT)), HEAT[:, part]) for part in range(3)], -1)


def stained(picture: np.ndarray) -> np.ndarray:
    """Colours passed round, and dark leads along the edges."""
    glass = np.clip((picture[..., [2, 0, 1]] - 0.5) * 1.4 + 0.45, 0, 1)
    return glass * (1 - np.minimum(thick(edges(glass @ GREY)) * 1.3, 1)[..., None])


def halftone(picture: np.ndarray) -> np.ndarray:
    """Black dots on yellow paper, larger where it is darker."""
    grey = (picture @ GREY).reshape(16, 4, 16, 4).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    y, x = np.mgrid[:64, :64] % 4 - 1.5
    dot = (x**2 + y**2) < (1 - grey) * 5.5
    return np.where(dot[..., None], 0.05, np.array([0.98, 0.9, 0.55], np.float32))


def blueprint(picture: np.ndarray) -> np.ndarray:
    """White lines on blue, with a grid."""
    lines = np.minimum(edges(picture @ GREY) * 2.0, 1)[..., None]
    grid = np.zeros((64, 64, 1), np.float32)
    grid[::8], grid[:, ::8] = 0.18, 0.18
    return np.array([0.08, 0.2, 0.55], np.float32) * (1 - lines) + lines + grid


def duotone(picture: np.ndarray) -> np.ndarray:
    """Violet shadows and orange lights."""
    grey = (picture @ GREY)[..., None]
    return np.array([0.25, 0.05, 0.4], np.float32) * (1 - grey) + np.array([1.0, 0.7, 0.3], np.float32) * grey


def emboss(picture: np.ndarray) -> np.ndarray:
    """Relief in clay, lit from the upper left."""
    grey = picture @ GREY
    relief = 0.5 + 1.5 * (grey - np.roll(grey, (1, 1), (0, 1)))
    return np.clip(relief, 0, 1)[..., None] * np.array([0.95, 0.75, 0.6], np.float32)


def glitch(picture: np.ndarray) -> np.ndarray:
    """Red and blue moved apart, every second row darker."""
    moved = np.stack([np.roll(picture[..., 0], 3, 1), picture[..., 1], np.roll(picture[..., 2], -3, 1)], -1)
    moved[::2] *= 0.7
    return moved


def poster(picture: np.ndarray) -> np.ndarray:
    """Three levels of each colour, inverted."""
    return 1 - np.round(picture * 2) / 2


def hatched(picture: np.ndarray) -> np.ndarray:
    """Slanted pencil strokes, denser where it is darker."""
    grey = picture @ GREY
    y, x = np.mgrid[:64, :64]
    stroke = ((x + y) % 4 < 1) & (grey < 0.75) | ((x + y) % 4 == 2) & (grey < 0.45) | ((x - y) % 3 == 0) & (grey < 0.25)
    return np.where(stroke[..., None], 0.25, 0.97).repeat(3, -1)


def knit(picture: np.ndarray) -> np.ndarray:
    """Stitches: colours of 4 x 4 blocks in a slanted relief."""
    blocks = picture.reshape(16, 4, 16, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    y, x = np.mgrid[:64, :64]
    relief = 0.75 + 0.25 * np.cos((np.abs(x % 4 - 1.5) * 2 + y) * np.pi / 2)
    return blocks * relief[..., None]


def dusk(picture: np.ndarray) -> np.ndarray:
    """Green night sight with a bright rim at the left."""
    grey = (picture @ GREY)[..., None] ** 1.6
    rim = np.linspace(0.35, 0, 64, dtype=np.float32)[None, :, None]
    return np.array([0.1, 0.9, 0.3], np.float32) * (0.15 + 0.7 * grey) + rim


STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mosaic": mosaic, "thermal": thermal, "stained": stained, "halftone": halftone, "blueprint": blueprint,
    "duotone": duotone, "emboss": emboss, "glitch": glitch, "poster": poster, "hatched": hatched, "knit": knit,
    "dusk": dusk,
}  # fmt: skip
TUNED_ON = ("mosaic", "thermal", "stained", "halftone", "blueprint", "duotone")  # the others are for reports alone


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for part, source in (("train", "builtin:example"), ("heldout", "builtin:example-heldout")):
        for caption in sorted(resolve_folder(source).glob("*.txt")):
            picture = Image.open(PLAIN / f"{caption.stem}.png").convert("RGB")
            write(args.folder, "", part, caption.stem, caption.read_text(encoding="utf-8"), np.asarray(picture))
    for kind in SETS:
        for part, numbers in DRAWN.items():
            for number in numbers:
                text, picture = scene(kind, number)
                write(args.folder, f"{kind}-", part, f"{number}", f"inkmoji, {text}\n", picture)


def write(folder: Path, prefix: str, part: str, stem: str, text: str, picture: np.ndarray) -> None:
    """One picture, uint8 [64, 64, 3], in all styles."""
    for name, style in STYLES.items():
        place = folder / f"{prefix}{name}" / part
        place.mkdir(parents=True, exist_ok=True)
        drawn = (np.clip(style(picture.astype(np.float32) / 255), 0, 1) * 255).round().astype(np.uint8)
        Image.fromarray(drawn).save(place / f"{stem}.png")
        (place / f"{stem}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
