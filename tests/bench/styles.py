"""Styles that nothing was tuned on: the pictures of the example data set as mosaic, thermal image and stained glass.

    python tests/bench/styles.py DIR

Writes DIR/STYLE/train and DIR/STYLE/heldout, pictures with captions, for `stop_regret.py` and `lr_free.py --pictures`.
They are drawn from the Noto Color Emoji font, which has to be installed. A mosaic's grout lies to the right of and
below its stones: mirrored it is another pattern.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from emotrain.assets.make_assets import draw_noto, edges, thick
from emotrain.dataset.scan import resolve_folder

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
BLOCKS = ((0x1F300, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1F9FF), (0x1FA70, 0x1FAFF), (0x2600, 0x27BF))
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


STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mosaic": mosaic, "thermal": thermal, "stained": stained}


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    font = ImageFont.truetype(str(FONT), size=109)
    names = {
        unicodedata.name(chr(code), "").lower().replace("-", " "): f"{code:X}"
        for first, last in BLOCKS
        for code in range(first, last + 1)
    }
    for part, source in (("train", "builtin:example"), ("heldout", "builtin:example-heldout")):
        for caption in sorted(resolve_folder(source).glob("*.txt")):
            text = caption.read_text(encoding="utf-8")
            code = names.get(text.removeprefix("inkmoji, ").strip())
            if code is None:  # not in the font's blocks
                continue
            picture = np.asarray(draw_noto(code, font), np.float32) / 255
            for name, style in STYLES.items():
                folder = args.folder / name / part
                folder.mkdir(parents=True, exist_ok=True)
                drawn = (np.clip(style(picture), 0, 1) * 255).round().astype(np.uint8)
                Image.fromarray(drawn).save(folder / f"{caption.stem}.png")
                (folder / caption.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
