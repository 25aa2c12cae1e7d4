"""Planted defects: does an ordinary run find the pictures whose captions were swapped?

    python tests/bench/planted_defects.py [--preset quickstart] [--seeds 0 1 2 3 4] [--report FILE]

64 pictures of the example style; the captions of 6 of them (10%) are passed round. Each seed: a run of the preset on
them, which compares captions at its end as every run does, and the ranking of `emotrain images`. Printed is the ROC
AUC of the swapped pictures: by the caption's contrast, by place in the ranking, by the plain losses, and by a contrast
with the adapter on or with more forward passes; how many were marked suspicious; and the share of the run's CPU time
that the comparison took. Each seed's result is kept in --work and not measured again while model, pictures and
options are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import torch

from emotrain.config.load import load_preset
from emotrain.config.schema import Preset
from emotrain.dataset.contrasts import PictureContrast, contrast_scores, parse_contrasts
from emotrain.dataset.scan import resolve_folder
from emotrain.families.table import resolve_base
from emotrain.lora.file import read_lora
from emotrain.runs import build
from emotrain.runs.contrast import own_captions
from emotrain.runs.data import read_pictures
from emotrain.runs.pictures import rank_pictures
from emotrain.runs.start import run
from emotrain.train.contrast import contrastive_losses
from emotrain.train.events import Event, Phase, RunEnd, RunStart, StepEnd

PICTURES, SWAPPED, STEPS = 64, 6, 200
MORE = (7, 2)  # others and draws of the dearest plan


class Clock:
    """CPU seconds of training and of the comparison."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def handle(self, event: Event) -> None:
        now = time.process_time()
        if isinstance(event, RunStart):
            self.at["start"] = now
        elif isinstance(event, StepEnd):
            self.at["trained"] = now
        elif isinstance(event, Phase) and event.name.startswith("writing"):
            self.at["written"] = now
        elif isinstance(event, RunEnd):
            self.at["end"] = now

    def close(self) -> None:
        pass

    def share(self) -> float:
        return (self.at["end"] - self.at["written"]) / (self.at["trained"] - self.at["start"])


def sources() -> list[Path]:
    files = [
        path for name in ("example", "example-heldout") for path in resolve_folder(f"builtin:{name}").glob("*.png")
    ]
    return sorted(files, key=lambda path: (path.parent.name, path.name))[:PICTURES]


def plant(folder: Path, seed: int) -> set[str]:
    """Write the pictures; names of those whose caption is another's."""
    files = sources()
    captions = [path.with_suffix(".txt").read_text("utf-8") for path in files]
    chosen = random.Random(seed).sample(range(len(files)), SWAPPED)
    texts = list(captions)
    for one, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        texts[one] = captions[other]
    for path, text in zip(files, texts, strict=True):
        shutil.copy(path, folder)
        (folder / f"{path.stem}.txt").write_text(text, encoding="utf-8")
    return {files[k].name for k in chosen}


def preset_of(name: str, folder: Path, seed: int) -> Preset:
    """The shipped preset on all pictures, to its ceiling, without what costs time besides."""
    words = (
        f"dataset.folders=[{{path: {folder}}}]", f"train.max_steps={STEPS}", f"train.seed={seed}", "stop.mode=off",
        "validate.fraction=0", "validate.every=50", "sample.every=0", f"save.every={STEPS}", "log.tensorboard=false",
    )  # fmt: skip
    return load_preset(name, words, f"planted-{seed}")


def auc(scores: Mapping[str, float], planted: Set[str]) -> float:
    """Share of (swapped, other) pairs in which the swapped one has the higher score; ties count half."""
    high = np.array([score for name, score in scores.items() if name.rpartition("/")[2] in planted])
    low = np.array([score for name, score in scores.items() if name.rpartition("/")[2] not in planted])
    above = (high[:, None] > low[None, :]) + 0.5 * (high[:, None] == low[None, :])
    return float(above.mean())


def gap(contrasts: Sequence[PictureContrast], planted: Set[str]) -> float:
    """The mean share by which a wrong caption raises the loss of a picture whose own is right."""
    right = [one for one in contrasts if one.id.rpartition("/")[2] not in planted]
    return float(np.mean([np.mean([np.mean(row) for _, row in one.others]) / np.mean(one.own) - 1 for one in right]))


def measure(name: str, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "pictures"
        folder.mkdir()
        planted = plant(folder, seed)
        preset, clock = preset_of(name, folder, seed), Clock()
        done = run(preset, runs_dir=Path(work) / "runs", observers=[clock])
        contrasts = parse_contrasts((done.folder.path / "picture_contrast.jsonl").read_text("utf-8").split("\n"))
        ranking = rank_pictures(done.folder)
        marked = {score.id.rpartition("/")[2] for score in ranking if score.verdict == "suspicious"}
        result = {
            "gap of the base": gap(contrasts, planted),
            "AUC, contrast": auc({one.id: one.z_contrast for one in ranking if one.z_contrast is not None}, planted),
            "AUC, place in the ranking": auc({one.id: -float(k) for k, one in enumerate(ranking)}, planted),
            "AUC, loss in the first half": auc({one.id: one.z_early for one in ranking}, planted),
            "AUC, loss in the second half": auc({one.id: one.z_late for one in ranking}, planted),
            "marked, swapped": float(len(marked & planted)),
            "marked, not swapped": float(len(marked - planted)),
            "forward passes a picture": float(np.mean([len(one.own) * (1 + len(one.others)) for one in contrasts])),
            "share of training's CPU": clock.share(),
        }
        return result | again(preset, done.folder.lora_last_path, planted, seed)


def again(preset: Preset, lora: Path, planted: Set[str], seed: int) -> dict[str, float]:
    """The contrast with the dearest plan, adapter off and on."""
    model = build.load_model(preset, lambda event: None)
    settings = build.loader_settings(preset, build.sniffed(preset))
    data = build.prepare_data(preset, model, read_pictures(preset), settings, lambda event: None).train
    model.adapter.load_state(read_lora(lora).state)
    model.family.place_denoiser()
    others, draws = MORE
    result = {}
    for key, context in (("off", model.adapter.off()), ("on", contextlib.nullcontext())):
        with context:
            found = contrastive_losses(
                model.family, model.objective, data, own_captions(data), others=others, draws=draws, seed=seed
            )
            scores = contrast_scores(list(found))
        result[f"AUC, {others} others x {draws} draws, adapter {key}"] = auc(scores, planted)
    return result


def digest(name: str) -> str:
    """Of everything that a cell depends on."""
    whole = hashlib.sha256(f"{name} {PICTURES} {SWAPPED} {STEPS} {MORE}".encode())
    base = Path(resolve_base(load_preset(name).model.base))
    package = Path(build.__file__).parents[1]
    code = [package / room for room in ("train", "dataset", "optim", "runs/contrast.py")]
    files = [path for root in (base, *code) for path in (root.rglob("*.*") if root.is_dir() else [root])]
    for path in [*sources(), *(path.with_suffix(".txt") for path in sources()), *sorted(files)]:
        if path.is_file() and path.suffix != ".pyc":
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:12]


def cell(work: Path, name: str, code: str, seed: int) -> dict[str, float]:
    path = work / f"{name}-{code}-{seed}.json"
    if not path.is_file():
        start = time.process_time()
        result = measure(name, seed) | {"CPU seconds": time.process_time() - start}
        path.write_text(json.dumps(result), encoding="utf-8")
    read: dict[str, float] = json.loads(path.read_text("utf-8"))
    return read


def report(name: str, seeds: Sequence[int], results: Sequence[Mapping[str, float]]) -> str:
    rows = ["| | mean | lowest | highest |", "| --- | --- | --- | --- |"]
    for key in results[0]:
        values = [result[key] for result in results]
        places = 1 if key.startswith(("marked", "CPU", "forward")) else 3
        rows.append(f"| {key} | " + " | ".join(f"{f(values):.{places}f}" for f in (np.mean, min, max)) + " |")
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread"
    return (
        f"# Planted defects\n\n`python tests/bench/planted_defects.py --preset {name}`\n\n{PICTURES} pictures of the "
        f"example style, the captions of {SWAPPED} passed round; {STEPS} steps of `{name}`; seeds "
        f"{', '.join(map(str, seeds))}; {machine}.\n\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "emotrain-planted-defects")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = []
    code = digest(options.preset)  # once: what runs is what was loaded, whatever is edited meanwhile
    for seed in options.seeds:
        results.append(cell(options.work, options.preset, code, seed))
        shown = ", ".join(f"{key} {value:.3f}" for key, value in results[-1].items())
        print(f"seed {seed}: {shown}", flush=True)
    text = report(options.preset, options.seeds, results)
    print(text)
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
