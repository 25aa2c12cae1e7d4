"""Kill real runs at every point and at random, cut their power, damage their files; resume; compare every bit.

python tests/bench/kill_resume.py --work /tmp/kill --results /tmp/kill/results.json [--stride 1] [--kills 200]
python tests/bench/kill_resume.py --results /tmp/kill/results.json --report docs/benchmarks/kill_resume.md

Parts can be run one by one (`--cases`, `--parts`); results of several calls add up in the results file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import diffusers
import kill_report
import torch
from kill_controls import controls, damages, kill_after_commit
from kill_worker import NAME, Case, Plan, different, finish, in_child, last_step, prepare, train, wait
from PIL import Image
from power_cut import after_power_cut

from emotrain.train.checkpoint import CheckpointStore

# 29 training pictures in twos: the last batch of an epoch is ragged. Captions vary, so that their order counts.
PRESET = """
model: {base}
dataset:
  folders: [{{path: "builtin:example"}}]
  trigger: inkmoji
  resolution: 64
  buckets: {{step: 8, min: 64, max: 64}}
  captions: {{shuffle: true, dropout: 0.2, variants: 2}}
network: {{rank: 2, alpha: 2, targets: attn}}
train: {{max_steps: {steps}, gradient_accumulation_steps: {accumulation}, micro_batch_size: {batch}}}
save: {{every: {save}, keep_last: 2}}
validate: {{every: 2, probe_images: 2}}
sample: {{every: {sample}, steps: 1, prompts: ["[trigger], rocket"]}}
stop: {{mode: trusted, min_steps: 3}}
log: {{tensorboard: {tensorboard}}}
"""
CASES: dict[str, dict[str, Any]] = {
    "tiny-sd, accumulation 3": {"base": "builtin:tiny-sd", "accumulation": 3, "batch": 2, "sample": 4},
    "tiny-sd, accumulation 1": {"base": "builtin:tiny-sd", "accumulation": 1, "batch": 4, "sample": 0},
    "tiny-flux, accumulation 3": {"base": "builtin:tiny-flux", "accumulation": 3, "batch": 2, "sample": 0},
    "tiny-flux, accumulation 1": {"base": "builtin:tiny-flux", "accumulation": 1, "batch": 4, "sample": 4},
}
PARTS = ("points", "random", "steps", "controls", "damage", "power")
SHOWN = ("metrics.jsonl", "probe.jsonl", "picture_losses.jsonl", "samples")  # not synced, not needed


def build(name: str, work: Path, steps: int, save: int) -> Case:
    """The case with its uninterrupted run, which is done twice: a run has to equal itself first."""
    words = {"steps": steps, "save": save, "tensorboard": "false", **CASES[name]}
    folder = work / name.replace(" ", "-").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    case = prepare(name, PRESET.format(**words), folder)
    for attempt in range(2):
        began = time.monotonic()
        points = folder / f"points-{attempt}"
        code, parts = fresh(case, folder / f"straight-{attempt}", Plan(points=points if attempt else None))
        assert code == 0, f"{name}: the uninterrupted run ended with {code}"
        if attempt:
            assert not different(case, parts), f"{name}: two equal runs differ in {different(case, parts)}"
            case.points = points.read_text().splitlines()
        case.straight, case.seconds = parts, time.monotonic() - began
    print(f"{name}: {len(case.points)} points, {case.seconds:.1f} s a run", flush=True)
    return case


def fresh(case: Case, runs_dir: Path, plan: Plan) -> tuple[int, dict[str, str]]:
    """A new run in a child."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    case.trail.unlink(missing_ok=True)
    case.session.out.unlink(missing_ok=True)
    code = wait(in_child(lambda: train(case, runs_dir, plan, resume=False)))
    return code, json.loads(case.session.out.read_text()) if case.session.out.exists() else {}


def newest(runs_dir: Path) -> int:
    """Step of the newest checkpoint folder; 0: none."""
    return max(CheckpointStore(runs_dir / NAME / "checkpoints").steps(), default=0)


def judge(case: Case, runs_dir: Path, row: dict[str, Any], ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    """Resume to the end and note what is not as it should be."""
    row["repeated"] = last_step(case) - newest(runs_dir)
    code, parts = finish(case, runs_dir)
    row["code"], row["differs"] = code, different(case, parts, ignore)
    row["ok"] = code == 0 and not row["differs"]
    shutil.rmtree(runs_dir)
    if not row["ok"]:
        print("FAILED", case.name, row, flush=True)
    return row


def kill_points(case: Case, stride: int, offset: int) -> list[dict[str, Any]]:
    """SIGKILL ahead of or after every stage, rename, removal, creation and fsync of a whole run."""
    rows = []
    for number in range(1 + offset, len(case.points) + 1, stride):
        runs_dir = case.work / "killed"
        code, _ = fresh(case, runs_dir, Plan(kill_at=number))
        committed = committed_before(case.points[: number - 1])
        row = {"point": number, "name": plain(case.points[number - 1]), "killed": code == -signal.SIGKILL}
        row["lost"] = max(committed - newest(runs_dir), 0)
        rows.append(judge(case, runs_dir, row))
    return rows


def committed_before(points: list[str]) -> int:
    """Step of the last checkpoint whose rename was done."""
    folders = [name for name in points if name.startswith("rename .tmp-step-")]
    if points and folders and points[-1] == folders[-1]:
        folders.pop()  # the kill came ahead of it
    return int(folders[-1].split("-")[2]) if folders else 0


def plain(name: str) -> str:
    """A point's name without the process's number."""
    return " ".join(word.rstrip("0123456789").rstrip("-") if "-" in word else word for word in name.split())


def random_kills(case: Case, count: int, seed: int) -> list[dict[str, Any]]:
    """SIGKILL from outside at a random time; half of the resumes are killed again, up to three times."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        runs_dir = case.work / "killed"
        runs_dir.mkdir()
        case.trail.unlink(missing_ok=True)
        row: dict[str, Any] = {"kills": 0, "chain": 0, "killed": True, "lost": 0}
        before = 0
        for attempt in range(chance.choice((1, 1, 2, 3))):
            resume = newest(runs_dir) > 0
            if attempt and not resume:
                break
            pid = in_child(lambda place=runs_dir, go_on=resume: train(case, place, Plan(), resume=go_on))
            time.sleep(chance.uniform(0.1, 1.0) * case.seconds)
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            row["lost"] = max(row["lost"], before - newest(runs_dir))
            before = newest(runs_dir)
            if code != -signal.SIGKILL:  # it was done already
                break
            row["kills"] += 1
        if row["kills"] == 0 and code == 0:  # nothing was interrupted: an uninterrupted run once more
            row["ok"], row["differs"], row["repeated"], row["code"] = True, [], 0, code
            shutil.rmtree(runs_dir)
            continue
        if code == 0:
            parts = json.loads(case.session.out.read_text())
            row |= {"differs": different(case, parts), "code": 0, "repeated": 0}
            row["ok"] = not row["differs"]
            shutil.rmtree(runs_dir)
        else:
            judge(case, runs_dir, row)
        rows.append(row)
    return rows


def every_step(case: Case) -> list[dict[str, Any]]:
    """A checkpoint after every step; resume from each, as `--checkpoint STEP` does."""
    base = case.work / "every"
    code, parts = fresh(case, base, Plan(save_every=1))
    assert code == 0
    assert not different(case, parts), f"saving more often changed {different(case, parts)}"
    rows = []
    for step in CheckpointStore(base / NAME / "checkpoints").steps()[:-1]:
        runs_dir = case.work / "one"
        shutil.copytree(base, runs_dir)
        row: dict[str, Any] = {"step": step}
        code, parts = finish(case, runs_dir, Plan(step=step))
        row |= {"code": code, "differs": different(case, parts), "ok": code == 0 and not different(case, parts)}
        rows.append(row)
        shutil.rmtree(runs_dir)
    shutil.rmtree(base)
    return rows


def power_cuts(case: Case, count: int, seed: int) -> list[dict[str, Any]]:
    """Kill at a random point, keep of the folder what a disk may hold, resume."""
    chance, rows = random.Random(seed), []
    synced = [n for n, name in enumerate(case.points, 1) if name == "committed"]
    for index in range(count):
        number = chance.randrange(1, len(case.points) + 1)
        shutil.rmtree(journal := case.work / "journal", ignore_errors=True)
        fresh(case, case.work / "killed", Plan(kill_at=number, journal=journal))
        runs_dir = case.work / "after"
        after_power_cut(case.work / "killed", journal, runs_dir, seed=index)
        shutil.rmtree(case.work / "killed")
        sure = sum(point < number for point in synced)
        steps = saved_steps(case)
        row = {"point": number, "name": plain(case.points[number - 1])}
        row["lost"] = max((steps[sure - 1] if sure else 0) - newest(runs_dir), 0)
        rows.append(judge(case, runs_dir, row, SHOWN))
    return rows


def saved_steps(case: Case) -> list[int]:
    """Steps whose checkpoints the uninterrupted run committed, in order."""
    return [int(name.split("-")[2]) for name in case.points if name.startswith("rename .tmp-step-")]


def run_part(part: str, case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One part for one case."""
    if part == "points":
        return kill_points(case, options.stride, options.offset)
    if part == "random":
        return random_kills(case, options.kills, options.seed)
    if part == "steps":
        return every_step(case)
    if part == "power":
        return power_cuts(case, options.cuts, options.seed)
    base = case.work / "half"
    kill_after_commit(case, base, 1)
    rows = (controls if part == "controls" else damages)(case, base)
    shutil.rmtree(base)
    return rows


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
    parser.add_argument("--stride", type=int, default=1, help="every n-th kill point")
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50, help="random kills per case")
    parser.add_argument("--cuts", type=int, default=40, help="power cuts per case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--note", action="append", default=[], help="a line about what was not run")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else []
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(kill_report.page(results, options.note))
        return
    torch.set_num_threads(1)
    Image.init()
    assert diffusers.StableDiffusionPipeline
    assert diffusers.FluxPipeline  # imported once, ahead of all forks
    for name in options.cases:
        case = build(name, options.work, options.steps, options.save)
        for part in options.parts:
            began = time.monotonic()
            rows = run_part(part, case, options)
            facts = {"case": name, "part": part, "points": len(case.points), "seconds": time.monotonic() - began}
            facts |= {"steps": options.steps, "save": options.save, "stride": options.stride, "rows": rows}
            results.append(facts)
            options.results.write_text(json.dumps(results))
            print(f"{name}: {part}: {sum(row['ok'] for row in rows)} of {len(rows)} as they should be", flush=True)


if __name__ == "__main__":
    main()
