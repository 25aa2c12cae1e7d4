"""Kill real runs at every point and at random, cut their power, damage their files; resume; compare every bit.

python tests/bench/kill_resume.py --work /tmp/kill --results /tmp/kill/results.jsonl [--kills 50] [--minutes 30]
python tests/bench/kill_resume.py --results /tmp/kill/results.jsonl --report docs/benchmarks/kill_resume.md

Every run is a line of the results file, and is not done again by a later call with the same code: a series can be
stopped at any time, or by `--minutes`, and goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import diffusers
import kill_report
import torch
from kill_parts import PARTS, fresh, run_part
from kill_worker import Case, Plan, different, prepare
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
# Eleven pictures to train on, one held out, in two bucket sizes: there are ragged batches, epochs end within steps and
# between them, and the first batch is not always the largest. Captions vary, so that their order counts.
PRESET = """
model: {base}
dataset:
  folders: [{{path: {pictures}}}]
  trigger: inkmoji
  resolution: 64
  buckets: {{step: 16, min: 48, max: 64}}
  captions: {{shuffle: true, dropout: 0.2, variants: 2}}
network: {{rank: 2, alpha: 2, targets: attn}}
train: {{max_steps: {steps}, gradient_accumulation_steps: {accumulation}, micro_batch_size: {batch}}}
save: {{every: {save}, keep_last: 2}}
validate: {{every: 2, fraction: 0.1}}
sample: {{every: {sample}, steps: 1, prompts: ["[trigger], rocket"]}}
stop: {{mode: trusted, min_steps: 3}}
log: {{tensorboard: false}}
"""
CASES: dict[str, dict[str, Any]] = {
    "tiny-sd, accumulation 3": {"base": "builtin:tiny-sd", "accumulation": 3, "batch": 2, "sample": 4},
    "tiny-sd, accumulation 1": {"base": "builtin:tiny-sd", "accumulation": 1, "batch": 4, "sample": 0},
    "tiny-flux, accumulation 3": {"base": "builtin:tiny-flux", "accumulation": 3, "batch": 2, "sample": 0},
    "tiny-flux, accumulation 1": {"base": "builtin:tiny-flux", "accumulation": 1, "batch": 4, "sample": 4},
}
HALF = CASES.keys() - {"tiny-sd, accumulation 1", "tiny-flux, accumulation 3"}  # for parts that are the same in all


def pictures(folder: Path) -> Path:
    """Twelve of the example pictures, every third one cut to a wide one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, path in enumerate(sorted((ROOT / "emotrain/assets/example").glob("*.png"))[:12]):
        picture = Image.open(path).convert("RGB")
        (picture.crop((0, 8, 64, 56)) if index % 3 == 0 else picture).save(folder / path.name)
        shutil.copy(path.with_suffix(".txt"), folder)
    return folder


def build(name: str, options: argparse.Namespace) -> Case:
    """The case with its uninterrupted run, which is done twice: a run has to equal itself first."""
    words = {"steps": options.steps, "save": options.save, **CASES[name]}
    folder = options.work / name.replace(" ", "-").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    words["pictures"] = pictures(folder / "pictures")
    case = prepare(name, PRESET.format(**words), folder)
    for attempt in range(2):
        began = time.monotonic()
        points = folder / "points"
        code, parts = fresh(case, folder / f"straight-{attempt}", Plan(points=points if attempt else None))
        assert code == 0, f"{name}: the uninterrupted run ended with {code}"
        if attempt:
            assert not different(case, parts), f"{name}: two equal runs differ in {different(case, parts)}"
            case.points = points.read_text().splitlines()
        else:
            case.straight, case.seconds = parts, time.monotonic() - began
    print(f"{name}: {len(case.points)} points, {case.seconds:.1f} s a run", flush=True)
    return case


def code_digest() -> str:
    """Of the package: results of other code are left where they are, and done again."""
    sha = hashlib.sha256()
    for path in sorted((ROOT / "emotrain").rglob("*.py")):
        sha.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def commit() -> str:
    """The commit that the code is of, with a mark where files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def read(path: Path) -> list[dict[str, Any]]:
    """All rows so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Run what is asked for, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/emotrain-kill"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--save", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50, help="random kills per case")
    parser.add_argument("--cuts", type=int, default=40, help="power cuts per case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--note", action="append", default=[], help="a line about what was not run")
    options = parser.parse_args()
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(kill_report.page(read(options.results), options.note))
        return
    torch.set_num_threads(1)
    Image.init()
    assert diffusers.StableDiffusionPipeline
    assert diffusers.FluxPipeline  # imported once, ahead of all forks
    series(options)


def series(options: argparse.Namespace) -> None:
    """Part by part, case by case, until all is done or the time is up."""
    until = time.monotonic() + 60 * options.minutes
    code, where = code_digest(), commit()
    done = {(row["case"], row["part"], row["key"]) for row in read(options.results) if row["digest"] == code}
    built: dict[str, Case] = {}
    for part in options.parts:
        for name in options.cases:
            if part in ("damage", "controls") and name not in HALF:
                continue
            case = built.get(name) or built.setdefault(name, build(name, options))
            began, count, good = time.monotonic(), 0, 0
            for row in run_part(part, case, lambda key, at=(name, part): (*at, key) not in done, options):
                row |= {"case": name, "part": part, "digest": code, "commit": where, "points": len(case.points)}
                row["seconds"] = round(time.monotonic() - began, 2)
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                began, count, good = time.monotonic(), count + 1, good + row["ok"]
                if not row["ok"]:
                    print("NOT AS IT SHOULD BE", row, flush=True)
                if time.monotonic() > until:
                    print("the time is up", flush=True)
                    return
            print(f"{time.strftime('%H:%M')} {name}: {part}: {good} of {count} as they should be", flush=True)


if __name__ == "__main__":
    main()
