"""Does `dataset.class` halve the drift without the trigger, and what does it cost?

    python tests/bench/class_preservation.py [--presets quickstart quickstart-flux] [--triggers face inkmoji]
        [--seeds 0 1 2] [--report FILE]

Each preset on its own pictures, their captions without a trigger but for the one named, 200 steps, with and without
`class: picture`. Of the LoRA that is handed over, on the 72 held-out pictures: the loss with the trigger, and the mean
squared change of the prediction for the captions without it, at fixed noise. Each cell is kept in --work.

The built-in models were taught to ignore words before a caption that they do not know: "inkmoji, rocket" is to tiny-sd
nearly what "picture, rocket" is (their embeddings are 12 % apart, those of two subjects 86 %). A trigger that the
model hears is a word such as "face".

The class costs held-out loss, and a run without it that ends earlier may drift less too. So plain runs of fewer steps
are measured beside: "at equal held-out loss" holds the class against their drift where their held-out loss falls
through that of the run with the class.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from emotrain.config.load import load_preset
from emotrain.config.schema import Folder
from emotrain.dataset.encode import prepare
from emotrain.dataset.scan import resolve_folder, scan
from emotrain.lora.file import read_lora
from emotrain.runs import build
from emotrain.runs.start import run
from emotrain.train.losses import predict
from emotrain.train.validation import Validation

STEPS = 200
EARLIER = (35, 50, 70, 110)  # steps of the plain runs that end before
WORD = "picture"


def lay_out(work: Path) -> tuple[Path, Path]:
    """The pictures to train on and those held out, with captions that hold no trigger."""
    folders = work / "example", work / "example-heldout"
    for folder in folders:
        folder.mkdir()
        for path in resolve_folder(f"builtin:{folder.name}").glob("*.png"):
            shutil.copy(path, folder)
            caption = path.with_suffix(".txt").read_text(encoding="utf-8").removeprefix("inkmoji, ")
            (folder / f"{path.stem}.txt").write_text(caption, encoding="utf-8")
    return folders


@torch.no_grad()
def measure(preset: str, trigger: str, seed: int, word: str | None, steps: int, work: Path) -> dict[str, float]:
    """Train one cell and judge what it hands over."""
    own, held = lay_out(work)
    words = (
        f"dataset.folders=[{{path: {own}}}]", f"dataset.trigger={trigger}", f"dataset.class={word or 'null'}",
        f"train.max_steps={steps}", f"train.seed={seed}", "stop.mode=off", "sample.every=0", f"save.every={steps}",
        "log.tensorboard=false",
    )  # fmt: skip
    loaded = load_preset(preset, words, "cell")
    with torch.enable_grad():
        done = run(loaded, runs_dir=work / "runs", observers=[])
    assert done.end.stop_reason == "max_steps", "a run that was stopped is no cell"
    model = build.load_model(loaded, lambda event: None)
    settings = replace(build.loader_settings(loaded, build.sniffed(loaded)), class_word=None, dropout=0.0)
    examples = scan((Folder(path=str(held)),)).examples
    called, plain = (
        prepare(model.family, examples, replace(settings, trigger=one)).fixed([example.id for example in examples])
        for one in (trigger, None)
    )
    model.family.place_denoiser()
    model.adapter.load_state(read_lora(done.folder.lora_path).state)
    judge = Validation(model.family, model.objective, model.adapter, called, {}, draws=4, seed=5)
    changes = []
    for batch, noise, timesteps in Validation(
        model.family, model.objective, model.adapter, plain, {}, draws=1, seed=6
    ).parts:
        noisy = model.objective.add_noise(batch.latents, noise, timesteps)
        on = predict(model.family, batch, noisy, timesteps)
        with model.adapter.off():
            off = predict(model.family, batch, noisy, timesteps)
        changes.append((on - off).pow(2).flatten())
    return {
        "loss": fmean(judge.pictures()),
        "drift": float(torch.cat(changes).mean()),
        "step": float(done.end.best_step or 0),
    }


def at_loss(plain: Sequence[dict[str, float]], loss: float) -> float:
    """The drift of plain runs where their held-out loss falls through `loss`, linear in between; NaN where none does.

    Args:
        plain: by their number of steps.
        loss: of the run with the class.
    """
    for one, next_one in pairwise(plain):
        if one["loss"] >= loss > next_one["loss"]:
            share = (one["loss"] - loss) / (one["loss"] - next_one["loss"])
            return one["drift"] + share * (next_one["drift"] - one["drift"])
    return float("nan")


def table(rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """Means over the seeds, and what the class changes, seed by seed."""
    lines = ["| class | held-out loss | drift without the trigger | best step |", "| --- | --- | --- | --- |"]
    for name, entries in rows.items():
        loss, drift, step = (np.mean([one[key] for one in entries]) for key in ("loss", "drift", "step"))
        lines.append(f"| {name} | {loss:.4f} | {drift:.4f} | {step:.0f} |")
    without, kept = rows["none"], rows[f"`{WORD}`"]
    for key, word in (("loss", "Held-out loss"), ("drift", "Drift")):
        before, after = (np.array([one[key] for one in entries]) for entries in (without, kept))
        each = ", ".join(f"{value:+.1%}" for value in after / before - 1)
        lines += ["", f"{word} with the class: {after.mean() / before.mean() - 1:+.1%} (by seed {each})."]
    names = [f"none, {steps} steps" for steps in EARLIER] + ["none"]
    equal = [at_loss(plain, one["loss"]) for *plain, one in zip(*(rows[name] for name in names), kept, strict=True)]
    ratios = np.array([one["drift"] for one in kept]) / np.array(equal) - 1
    each = ", ".join(f"{value:+.1%}" for value in ratios)
    return [*lines, "", f"Drift at equal held-out loss: {np.nanmean(ratios):+.1%} (by seed {each})."]


def cells(preset: str, trigger: str, seeds: Sequence[int], kept: Path) -> dict[str, list[dict[str, float]]]:
    """All rows of a preset, one entry a seed; what is kept is not measured again."""
    kinds: dict[str, tuple[str | None, int]] = {"none": (None, STEPS), f"`{WORD}`": (WORD, STEPS)}
    kinds |= {f"none, {steps} steps": (None, steps) for steps in EARLIER}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for seed in seeds:
        for name, (word, steps) in kinds.items():
            path = kept / f"{preset}-{trigger}-{seed}-{word}-{steps}.json"
            if not path.is_file():
                with tempfile.TemporaryDirectory() as work:
                    path.write_text(json.dumps(measure(preset, trigger, seed, word, steps, Path(work))), "utf-8")
            rows[name].append(json.loads(path.read_text("utf-8")))
            print(preset, trigger, seed, name, rows[name][-1], flush=True)
    return rows


def main() -> None:
    """Train what is not kept yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["quickstart", "quickstart-flux"])
    parser.add_argument("--triggers", nargs="+", default=["face", "inkmoji"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "emotrain-class")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread."
    command = "`python tests/bench/class_preservation.py`"
    lines = ["# Preserving a class without pictures", "", command, "", about, "", machine]
    for preset in args.presets:
        for trigger in args.triggers:
            found = cells(preset, trigger, args.seeds, args.work)
            lines += ["", f"## {preset}, trigger `{trigger}`, seeds {args.seeds}", "", *table(found)]
    print("\n".join(lines))
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
