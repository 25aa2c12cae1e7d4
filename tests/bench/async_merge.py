"""Two machines train a half of the data each and never talk; their LoRAs are merged. What that gives, and when.

python tests/bench/async_merge.py --work /tmp/merge [--seeds 2] [--lengths 50 150] [--report FILE.md]

For each seed three lines of training: `dataset.shard` 1/2, 2/2 and the whole, on tiny-sd's example style. The loss on
the held-out pictures is measured at N steps of each half and of the whole, at 2 N of the whole, and of the halves
merged. What has been trained or measured lies in the work folder and is not done again.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(Path(__file__).parent))

from heldout import Bench  # noqa: E402

from emotrain.cli.app import main as emotrain  # noqa: E402
from emotrain.config.load import load  # noqa: E402
from emotrain.config.schema import Preset  # noqa: E402
from emotrain.runs import start  # noqa: E402
from emotrain.runs.build import sniffed  # noqa: E402
from emotrain.runs.folder import RunFolder  # noqa: E402

LINES = {"half 1": "1/2", "half 2": "2/2", "whole": "null"}
MERGES = {
    "0.5 + 0.5": (0.5, 0.5, None),
    "0.7 + 0.7": (0.7, 0.7, None),
    "1.0 + 1.0": (1.0, 1.0, None),
    "0.5 + 0.5, cut to rank 8": (0.5, 0.5, 8),
}
QUIET = ("stop.mode=off", "sample.every=0", "log.tensorboard=false", "validate.every=1000", "save.keep_last=2")


class Lines:
    """The lines of training of one seed, each taken as far as it is needed."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed

    def lora(self, line: str, steps: int) -> Path:
        """The LoRA of a line after so many steps; trained from the last point that was asked for."""
        kept = self.work / f"{line.replace(' ', '-')}-{self.seed}-{steps}.safetensors"
        if kept.exists():
            return kept
        name = f"{line.replace(' ', '-')}-{self.seed}"
        words = (*QUIET, f"train.seed={self.seed}", f"dataset.shard={LINES[line]}", f"train.max_steps={steps}")
        preset = load(str(ROOT / "presets" / "quickstart.yaml"), (*words, f"save.every={steps}"), name).preset
        folder = RunFolder(self.work / "runs" / name)
        if folder.path.exists() and folder.info().get("finished") and folder.info()["steps"] < steps:
            result = start.resume(folder, preset, observers=())
        else:
            shutil.rmtree(folder.path, ignore_errors=True)
            result = start.run(preset, runs_dir=folder.path.parent, observers=())
        assert result.end.step == steps
        shutil.copy(result.folder.lora_last_path, kept)
        return kept

    def merged(self, how: str, steps: int) -> Path:
        """Both halves after so many steps as one file, by the command that users have."""
        first, second, rank = MERGES[how]
        parts = [f"{self.lora(line, steps)}:{weight}" for line, weight in (("half 1", first), ("half 2", second))]
        out = self.work / f"merged-{self.seed}-{steps}-{list(MERGES).index(how)}.safetensors"
        words = ["lora", "merge", *parts, "-o", str(out), "--yes", *(["--rank", str(rank)] if rank else [])]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            code = emotrain(words)
        assert code == 0, said.getvalue()
        return out


def measure(lora: Path | None) -> float:
    """Held-out loss with a LoRA file, or of the base."""
    bench = Bench("tiny-sd")
    if lora is not None:
        bench.load(lora)
    return float(bench.losses().mean())


def rows(lines: Lines, length: int) -> dict[str, Any]:
    """What is compared at one length: name -> way to the file."""
    found: dict[str, Any] = {
        "a half alone (1/2), N steps": lambda: lines.lora("half 1", length),
        "a half alone (2/2), N steps": lambda: lines.lora("half 2", length),
        "all pictures, N steps": lambda: lines.lora("whole", length),
        "all pictures, 2 N steps": lambda: lines.lora("whole", 2 * length),
    }
    for how in MERGES:
        found[f"both halves merged, {how}"] = lambda how=how: lines.merged(how, length)
    return found


def main() -> None:
    """Train, merge, measure; print and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="*", default=[50, 150])
    parser.add_argument("--report", type=Path, help="write what is there so far")
    options = parser.parse_args()
    torch.set_num_threads(1)
    identity = base_identity(load("quickstart", (), "x").preset)
    work = options.work / identity
    work.mkdir(parents=True, exist_ok=True)
    cells_path = work / "cells.json"
    cells = json.loads(cells_path.read_text()) if cells_path.exists() else {}
    if "base" not in cells:
        cells["base"] = measure(None)
    for length in sorted(options.lengths):
        for seed in range(42, 42 + options.seeds):
            for name, way in rows(Lines(work, seed), length).items():
                key = f"{length} / {name} / {seed}"
                if key not in cells:
                    cells[key] = measure(way())
                    cells_path.write_text(json.dumps(cells, indent=1))
                    print(f"{time.strftime('%H:%M')} {key}: {cells[key]:.4f}", flush=True)
                    if options.report:
                        options.report.write_text(page(cells, options, rows(Lines(work, 0), 0)))


def base_identity(preset: Preset) -> str:
    """Short digest of the model's and the pictures' files: other ones get a work folder of their own."""
    import hashlib

    sha = hashlib.sha256()
    folders = [Path(str(sniffed(preset).path)), *(ROOT / "emotrain/assets").glob("example*")]
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def page(cells: dict[str, float], options: argparse.Namespace, names: dict[str, Any]) -> str:
    """A table for each length, of what is there."""
    base = cells["base"]
    lines = [HEAD.strip(), "", f"The base model's held-out loss is {base:.4f}; each seed's figure is in brackets.", ""]
    for length in sorted(options.lengths):
        lines += [f"## N = {length}", "", "| | held-out loss | fall from the base |", "|---|---|---:|"]
        for name in names:
            keys = [f"{length} / {name} / {seed}" for seed in range(42, 42 + options.seeds)]
            found = [cells[key] for key in keys if key in cells]
            if found:
                mean = sum(found) / len(found)
                each = ", ".join(f"{one:.4f}" for one in found)
                lines.append(f"| {name} | {mean:.4f} ({each}) | {1 - mean / base:.1%} |")
        lines.append("")
    lines.append(f"torch {torch.__version__}, Python {platform.python_version()}, CPU, one thread.")
    return "\n".join(lines) + "\n"


HEAD = """
# Training halves apart and merging

`python tests/bench/async_merge.py --work DIR --report docs/benchmarks/async_merge.md`

Two machines train the quickstart's LoRA (rank 8, EmoSens) on `dataset.shard` `1/2` and `2/2` for N steps each, with no
word between them; `emotrain lora merge A:w B:w` makes one file. That is compared with one machine on all pictures for
as long (N steps, the same wall time) and for as much work (2 N steps, twice the wall time). The loss is that on
pictures that no one trained on, with the weights of the last step; the stop rule is off.
"""

if __name__ == "__main__":
    main()
