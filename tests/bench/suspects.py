"""How much of the harm of wrong captions does `dataset.suspects` undo, and what does it cost a clean set?

    python tests/bench/suspects.py [--presets quickstart quickstart-flux] [--seeds 0 1 2] [--share 0.1] [--report FILE]

64 pictures of the example style, 200 steps of the preset, which hands over its best LoRA; the other 40 held-out
pictures tell its loss. Rows: the clean set, and the set with a share of the captions passed round, each with `report`
and with `weigh`. "Undone" is the share of the way back from the spoiled set's loss to the clean set's; it means
something only where the harm is above the spread of the seeds. "right, wrong": pictures acted on whose captions were
passed round, and others. Each cell is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from heldout import Bench
from planted_defects import sources

from emotrain.config.load import load_preset
from emotrain.dataset.scan import resolve_folder
from emotrain.lora.file import read_lora
from emotrain.runs.start import run

STEPS = 200
ROWS = (("clean", "report"), ("spoiled", "report"), ("spoiled", "weigh"), ("clean", "weigh"))


def lay_out(folder: Path, kind: str, seed: int, share: float) -> set[str]:
    """Write the pictures; the names of those whose captions are (or would be) passed round."""
    folder.mkdir()
    files = sources()
    texts = [path.with_suffix(".txt").read_text("utf-8") for path in files]
    chosen = random.Random(seed).sample(range(len(files)), round(share * len(files)))
    moved = dict(zip(chosen, [texts[k] for k in [*chosen[1:], chosen[0]]], strict=True)) if kind == "spoiled" else {}
    for k, path in enumerate(files):
        shutil.copy(path, folder)
        (folder / f"{path.stem}.txt").write_text(moved.get(k, texts[k]), encoding="utf-8")
    return {files[k].name for k in chosen}


def held_out(folder: Path) -> None:
    """The held-out pictures that are not trained on."""
    folder.mkdir()
    trained = {path.name for path in sources()}
    for path in resolve_folder("builtin:example-heldout").glob("*.png"):
        if path.name not in trained:
            shutil.copy(path, folder)
            shutil.copy(path.with_suffix(".txt"), folder)


def measure(bench: Bench, preset: str, seed: int, share: float, kind: str, mode: str, work: Path) -> dict[str, float]:
    """Train one cell and judge what it hands over."""
    planted = lay_out(work / "pictures", kind, seed, share)
    words = (
        f"dataset.folders=[{{path: {work / 'pictures'}}}]", f"dataset.suspects={mode}", f"train.max_steps={STEPS}",
        f"train.seed={seed}", "stop.mode=off", "sample.every=0", f"save.every={STEPS}", "log.tensorboard=false",
    )  # fmt: skip
    done = run(load_preset(preset, words, "cell"), runs_dir=work / "runs", observers=[])
    assert done.end.stop_reason == "max_steps", "a run that was stopped is no cell"
    if bench.adapter is None:
        bench.load(done.folder.lora_path)
    bench.adapter.load_state(read_lora(done.folder.lora_path).state)
    actions = [one for one in done.folder.info().get("picture_actions") or () if one["undone"] is None]
    acted = {one["id"].rpartition("/")[2] for one in actions if one["kind"] != "seldom"}
    trained = {one.name for one in (work / "pictures").glob("*.png")} & planted
    return {
        "loss": float(bench.losses(draws=4).mean()),
        "step": float(done.end.best_step or 0),
        "hit": float(len(acted & trained)) if kind == "spoiled" else 0.0,
        "false": float(len(acted - planted)) if kind == "spoiled" else float(len(acted)),
        "seldom": float(len(actions) - len(acted)),
    }


def cells(preset: str, seeds: Sequence[int], share: float, kept: Path) -> dict[tuple[str, str], list[dict[str, float]]]:
    """All rows of a preset, one entry a seed; what is kept is not measured again."""
    bench: Bench | None = None
    found: dict[tuple[str, str], list[dict[str, float]]] = {row: [] for row in ROWS}
    for seed in seeds:
        for kind, mode in ROWS:
            path = kept / f"{preset}-{share:g}-{seed}-{kind}-{mode}.json"
            with tempfile.TemporaryDirectory() as work:
                if not path.is_file():
                    if bench is None:
                        held_out(Path(work) / "held")
                        bench = Bench("tiny-flux" if "flux" in preset else "tiny-sd", str(Path(work) / "held"))
                    path.write_text(json.dumps(measure(bench, preset, seed, share, kind, mode, Path(work))), "utf-8")
            found[kind, mode].append(json.loads(path.read_text("utf-8")))
            print(preset, share, seed, kind, mode, found[kind, mode][-1], flush=True)
    return found


def table(found: dict[tuple[str, str], list[dict[str, float]]]) -> list[str]:
    """A line a row, then what the issue asks."""
    losses = {row: np.array([one["loss"] for one in entries]) for row, entries in found.items()}
    clean, spoiled = losses["clean", "report"], losses["spoiled", "report"]
    lines = ["| pictures | suspects | held-out loss | to the clean set | by seed | right, wrong | seldom |"]
    lines.append("|" + " --- |" * 7)
    for row, entries in found.items():
        away = losses[row] / clean - 1
        acted = ", ".join(f"{np.mean([one[key] for one in entries]):.1f}" for key in ("hit", "false"))
        each = " ".join(f"{value:+.2%}" for value in away)
        seldom = np.mean([one["seldom"] for one in entries])
        lines.append(
            f"| {row[0]} | {row[1]} | {losses[row].mean():.4f} | {away.mean():+.2%} | {each} | {acted} | {seldom:.1f} |"
        )
    harm = (spoiled - clean).mean()
    error = (spoiled - clean).std(ddof=1) / np.sqrt(len(clean)) if len(clean) > 1 else float("nan")
    lines += ["", f"Harm: {harm / clean.mean():+.2%} (standard error over seeds {error / clean.mean():.2%})."]
    if harm > 2 * error:
        lines.append(f"Undone: {(spoiled - losses['spoiled', 'weigh']).mean() / harm:.0%}.")
    else:
        lines.append("That is not above the spread of the seeds: there is no harm to undo that could be measured.")
    lines.append(f"Cost to the clean set: {(losses['clean', 'weigh'] / clean - 1).mean():+.2%}.")
    return lines


def main() -> None:
    """Train what is not kept yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["quickstart", "quickstart-flux"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, nargs="+", default=[0.1])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "emotrain-suspects")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread"
    command = "`python tests/bench/suspects.py`"
    lines = ["# Acting on wrong captions", "", command, "", about, "", f"{machine}; seeds {args.seeds}."]
    for share in args.share:
        for preset in args.presets:
            found = cells(preset, args.seeds, share, args.work)
            lines += ["", f"## {preset}, {share:.0%} of the captions passed round", "", *table(found)]
    print("\n".join(lines))
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
