"""Does `dataset.class` halve the drift without the trigger, and what does it cost?

    python tests/bench/class_preservation.py [--presets quickstart quickstart-flux] [--seeds 0 1 2] [--report FILE]

Each preset as it is shipped, 200 steps, with and without a class; of the LoRA that is handed over: the loss of the 72
held-out pictures with the trigger, and the mean squared change of the prediction for their captions without it, at
fixed noise. Each cell is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from heldout import Bench

from emotrain.config.load import load_preset
from emotrain.lora.file import read_lora
from emotrain.runs.start import run

STEPS = 200
WORD = "picture"


def measure(bench: Bench, preset: str, seed: int, word: str | None) -> dict[str, float]:
    """Train one cell and judge what it hands over."""
    with tempfile.TemporaryDirectory() as work:
        words = (
            f"dataset.class={word or 'null'}", f"train.max_steps={STEPS}", f"train.seed={seed}", "stop.mode=off",
            "sample.every=0", f"save.every={STEPS}", "log.tensorboard=false",
        )  # fmt: skip
        done = run(load_preset(preset, words, "cell"), runs_dir=Path(work), observers=[])
        assert done.end.stop_reason == "max_steps", "a run that was stopped is no cell"
        if bench.adapter is None:
            bench.load(done.folder.lora_path)
        bench.adapter.load_state(read_lora(done.folder.lora_path).state)
    return {"loss": float(bench.losses(draws=4).mean()), "drift": bench.drift(), "step": float(done.end.best_step or 0)}


def table(rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """Means over the seeds, and what the class changes, seed by seed."""
    lines = ["| class | held-out loss | drift without the trigger | best step |", "| --- | --- | --- | --- |"]
    for name, entries in rows.items():
        loss, drift, step = (np.mean([one[key] for one in entries]) for key in ("loss", "drift", "step"))
        lines.append(f"| {name} | {loss:.4f} | {drift:.5f} | {step:.0f} |")
    without, kept = rows.values()
    for key, word in (("loss", "Held-out loss"), ("drift", "Drift")):
        before, after = (np.array([one[key] for one in entries]) for entries in (without, kept))
        each = ", ".join(f"{value:+.1%}" for value in after / before - 1)
        lines += ["", f"{word} with the class: {after.mean() / before.mean() - 1:+.1%} (by seed {each})."]
    return lines


def cells(preset: str, seeds: Sequence[int], kept: Path) -> dict[str, list[dict[str, float]]]:
    """Both rows of a preset, one entry a seed; what is kept is not measured again."""
    bench: Bench | None = None
    rows: dict[str, list[dict[str, float]]] = {"none": [], f"`{WORD}`": []}
    for seed in seeds:
        for name, word in zip(rows, (None, WORD), strict=True):
            path = kept / f"{preset}-{seed}-{word}.json"
            if not path.is_file():
                bench = bench or Bench("tiny-flux" if "flux" in preset else "tiny-sd")
                path.write_text(json.dumps(measure(bench, preset, seed, word)), "utf-8")
            rows[name].append(json.loads(path.read_text("utf-8")))
            print(preset, seed, word, rows[name][-1], flush=True)
    return rows


def main() -> None:
    """Train what is not kept yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["quickstart", "quickstart-flux"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "emotrain-class")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread; seeds {args.seeds}."
    lines = [
        "# Preserving a class without pictures",
        "",
        "`python tests/bench/class_preservation.py`",
        "",
        about,
        "",
        machine,
    ]
    for preset in args.presets:
        lines += ["", f"## {preset}", "", *table(cells(preset, args.seeds, args.work))]
    print("\n".join(lines))
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
