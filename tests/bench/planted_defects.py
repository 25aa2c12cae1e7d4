"""Planted defects: are swapped captions found, by the losses of a run or by the contrast of captions?

    python tests/bench/planted_defects.py [--base builtin:tiny-sd] [--seeds 0 1 2 3 4] [--steps 100]

64 pictures of the example style; the captions of 6 of them (10%) are passed round. Each seed: the contrast of the
base before training, a run without an end of its own, and the contrast with the adapter on. Printed is the ROC AUC
of the swapped pictures under each score, and first how well the base hears captions at all: the mean share by which
a wrong caption raises the loss of a picture whose own is right.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from emotrain.config.schema import Preset
from emotrain.dataset.contrasts import PictureContrast, contrast_scores
from emotrain.dataset.ranking import parse_losses, rank
from emotrain.dataset.scan import resolve_folder
from emotrain.lora.file import read_lora
from emotrain.runs import build
from emotrain.runs.start import run
from emotrain.train.contrast import contrastive_losses

PICTURES, SWAPPED = 64, 6


def plant(folder: Path, seed: int) -> set[str]:
    """Write the pictures; names of those whose caption is another's."""
    files = sorted(resolve_folder("builtin:example").glob("*.png"))
    files += sorted(resolve_folder("builtin:example-heldout").glob("*.png"))
    files = files[:PICTURES]
    captions = [path.with_suffix(".txt").read_text("utf-8") for path in files]
    chosen = random.Random(seed).sample(range(PICTURES), SWAPPED)
    texts = list(captions)
    for one, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        texts[one] = captions[other]
    for path, text in zip(files, texts, strict=True):
        shutil.copy(path, folder)
        (folder / f"{path.stem}.txt").write_text(text, encoding="utf-8")
    return {files[k].name for k in chosen}


def preset_of(base: str, folder: Path, seed: int, steps: int) -> Preset:
    """An ordinary run on all pictures that ends at its ceiling."""
    words = {
        "name": f"planted-{seed}",
        "model": {"base": base},
        "dataset": {"trigger": "inkmoji", "folders": ({"path": str(folder)},)},
        "network": {"rank": 8, "alpha": 8.0, "targets": "all"},
        "train": {"micro_batch_size": 8, "max_steps": steps, "seed": seed},
        "validate": {"fraction": 0.0, "every": steps},
        "sample": {"every": 0},
        "save": {"every": steps},
        "stop": {"mode": "off"},
        "log": {"tensorboard": False},
    }
    return Preset.model_validate(words)


def auc(scores: Mapping[str, float], planted: Set[str]) -> float:
    """Share of (swapped, other) pairs in which the swapped one has the higher score; ties count half."""
    high = np.array([score for name, score in scores.items() if name.rpartition("/")[2] in planted])
    low = np.array([score for name, score in scores.items() if name.rpartition("/")[2] not in planted])
    above = (high[:, None] > low[None, :]) + 0.5 * (high[:, None] == low[None, :])
    return float(above.mean())


def gap(contrasts: Sequence[PictureContrast], planted: Set[str]) -> float:
    right = [one for one in contrasts if one.id.rpartition("/")[2] not in planted]
    return float(np.mean([np.mean([np.mean(row) for _, row in one.others]) / np.mean(one.own) - 1 for one in right]))


def measure(base: str, seed: int, steps: int, others: int, draws: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        folder.mkdir()
        planted = plant(folder, seed)
        preset = preset_of(base, folder, seed, steps)
        pictures = build.read_pictures(preset)
        model = build.load_model(preset, lambda event: None)
        settings = build.loader_settings(preset, build.sniffed(preset))
        data = build.prepare_data(preset, model, pictures, settings, lambda event: None)
        batches = data.train.fixed(example.id for example in pictures.train)
        result: dict[str, float] = {}

        def contrast(key: str) -> list[PictureContrast]:
            off = model.adapter.off() if key == "base" else contextlib.nullcontext()
            with off:
                found = contrastive_losses(
                    model.family, model.objective, batches, others=others, draws=draws, seed=seed
                )
            result[f"contrast, {key}"] = auc(contrast_scores(found), planted)
            return found

        result["gap of the base"] = gap(contrast("base"), planted)
        done = run(preset, runs_dir=Path(name) / "runs", observers=())
        lines = (done.folder.path / "picture_losses.jsonl").read_text("utf-8").split("\n")
        scores = rank(parse_losses(lines))
        result["loss, early"] = auc({score.id: score.z_early for score in scores}, planted)
        result["loss, late"] = auc({score.id: score.z_late for score in scores}, planted)
        result["loss, least fallen"] = auc({score.id: score.z_fall for score in scores}, planted)
        model.adapter.load_state(read_lora(done.folder.lora_last_path).state)
        contrast("trained")
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="builtin:tiny-sd")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--others", type=int, default=63)
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        start = time.perf_counter()
        results.append(measure(options.base, seed, options.steps, options.others, options.draws))
        shown = ", ".join(f"{key} {value:.3f}" for key, value in results[-1].items())
        print(f"seed {seed}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
    for key in results[0]:
        values = [result[key] for result in results]
        print(f"{key:<20} mean {np.mean(values):.3f}, lowest {min(values):.3f}")


if __name__ == "__main__":
    main()
