"""How well the built-in models have learned their pictures.

For 64 captions of the base set one sample each (20 steps, fixed guidance and seeds): the share whose nearest base
picture, by pixel distance at 64 px after a blur of 2 pixels, is the caption's own; beside it what chance would give.
Writes a sheet to look at: the sample above, the real picture below.

    python tests/bench/base_quality.py [tiny-sd] [tiny-flux] [--sheet DIR]

The base pictures lie in `tests/bench/base_pictures`; `make_assets.py pictures` made them.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from emotrain.families.common import DrawRequest
from emotrain.families.loading import load_family
from emotrain.families.sampling import draw_sample

PICTURES = Path(__file__).parent / "base_pictures"
CAPTIONS = 64
SEED = 1234


def blurred(picture: Image.Image) -> np.ndarray:
    """float32 [64*64*3] in 0..1."""
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(2)), np.float32).ravel() / 255


def read_base() -> tuple[list[str], list[Image.Image]]:
    """Captions and pictures, sorted by file name."""
    paths = sorted(PICTURES.glob("*.png"))
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
    return captions, [Image.open(path).convert("RGB") for path in paths]


def nearest(picture: Image.Image, bank: np.ndarray) -> int:
    """Index of the nearest row of `bank`."""
    return int(np.argmin(((bank - blurred(picture)) ** 2).sum(1)))


def score(name: str, sheet_dir: Path | None) -> float:
    """Draw the samples of one model and print its score."""
    family = load_family(f"builtin:{name}")
    captions, pictures = read_base()
    bank = np.stack([blurred(picture) for picture in pictures])
    chosen = sorted(random.Random(SEED).sample(range(len(captions)), CAPTIONS))
    texts = family.encode_texts([captions[i] for i in chosen])
    negative = family.encode_texts([""])
    hits, wrong, columns = 0, [], []
    for place, index in enumerate(chosen):
        text = {key: value[place : place + 1] for key, value in texts.items()}
        sample = draw_sample(family, DrawRequest(text, negative, 64, 64, SEED + index, steps=20))
        found = nearest(sample, bank)
        hits += found == index
        if found != index:
            wrong.append(f"{captions[index]} -> {captions[found]}")
        columns.append(np.concatenate([np.asarray(sample), np.asarray(pictures[index])]))
    share = hits / len(chosen)
    print(f"{name}: {hits}/{len(chosen)} = {share:.1%} nearest to their own picture (chance {1 / len(captions):.1%})")
    print("  missed: " + ("; ".join(wrong) or "none"))
    if sheet_dir is not None:
        rows = [np.concatenate(columns[i : i + 16], 1) for i in range(0, len(columns), 16)]
        sheet_dir.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(rows)).save(sheet_dir / f"{name}.png")
    return share


def main() -> None:
    """Score the models named on the command line (default: both)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["tiny-sd", "tiny-flux"])
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        score(name, args.sheet)


if __name__ == "__main__":
    main()
