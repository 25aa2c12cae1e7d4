"""The parts of the kill bench: each yields a row per run, and leaves out those that are there already."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kill_controls import controls, damages, kill_after_commit
from kill_line import Succession, wait
from kill_worker import NAME, Case, Plan, different, finish, in_child, last_step, train
from power_cut import after_power_cut

from emotrain.train.checkpoint import CheckpointStore

Row = dict[str, Any]
Rows = Iterator[Row]
Wanted = Callable[[str], bool]
REFUSED = 5  # exit code
PARTS = ("points", "chain", "steps", "power", "random", "damage", "controls")


def fresh(case: Case, runs_dir: Path, plan: Plan) -> tuple[int, dict[str, str]]:
    """A new run in a child."""
    pid = begin(case, runs_dir, plan)
    code = wait(pid)
    return code, json.loads(case.out.read_text()) if case.out.exists() else {}


def begin(case: Case, runs_dir: Path, plan: Plan) -> int:
    """Start a new run in a child; its pid."""
    shutil.rmtree(runs_dir, ignore_errors=True)
    runs_dir.mkdir(parents=True)
    case.trail.unlink(missing_ok=True)
    case.out.unlink(missing_ok=True)
    return in_child(lambda: train(case, runs_dir, plan, resume=False))


def newest(runs_dir: Path) -> int:
    """Step of the newest checkpoint folder; 0: none."""
    return max(CheckpointStore(runs_dir / NAME / "checkpoints").steps(), default=0)


def judge(case: Case, runs_dir: Path, row: Row) -> Row:
    """Resume to the end and note what is not as it should be."""
    row["repeated"] = last_step(case) - newest(runs_dir)
    code, parts = finish(case, runs_dir)
    row["code"], row["differs"] = code, different(case, parts)
    row["ok"] = code == 0 and not row["differs"] and not row.get("lost") and row.get("killed", True)
    shutil.rmtree(runs_dir)
    return row


def succession(case: Case, points: set[int], journal: Path | None = None) -> Iterator[tuple[int, Path]]:
    """One run that is killed at each of these points; gives each with the folder as the kill has left it.

    Its last process must end as an uninterrupted run does.
    """
    runs_dir = case.work / "killed"
    line = Succession(points)
    out = case.work / "digest-last.json"
    out.unlink(missing_ok=True)
    first = begin(case, runs_dir, Plan(succession=line, journal=journal, out=out))
    left = sorted(points)
    for code in line.deaths(first):
        if code != -signal.SIGKILL:
            parts = json.loads(out.read_text()) if out.exists() else {}
            assert code == 0, f"{case.name}: the last copy ended with {code}"
            assert not left, f"{case.name}: points {left} were not reached"
            assert not different(case, parts), f"{case.name}: being copied changed {different(case, parts)}"
            break
        trail = case.trail.read_text() if case.trail.exists() else ""
        yield left.pop(0), runs_dir
        case.trail.write_text(trail)
    line.close()


def kill_points(case: Case, wanted: Wanted, options: argparse.Namespace) -> Rows:
    """SIGKILL ahead of or after every stage, rename, removal, creation and fsync of a whole run."""
    points = {number for number in range(1, len(case.points) + 1) if wanted(str(number))}
    seen: dict[str, Row] = {}
    for number, runs_dir in succession(case, points) if points else ():
        row = {"key": str(number), "name": plain(case.points[number - 1]), "killed": True}
        row["lost"] = max(committed_before(case.points[: number - 1]) - newest(runs_dir), 0)
        state = content(runs_dir)
        if state in seen and not row["lost"]:  # a resume would be given the very same bytes
            first = seen[state]
            repeated = last_step(case) - newest(runs_dir)
            yield row | {key: first[key] for key in ("code", "differs", "ok")} | {
                "same_as": first["key"], "repeated": repeated
            }  # fmt: skip
            continue
        after = case.work / "after"
        shutil.rmtree(after, ignore_errors=True)
        shutil.copytree(runs_dir, after)
        seen[state] = judge(case, after, row)
        yield seen[state]


def content(folder: Path) -> str:
    """sha256 over the names and bytes of everything in a folder."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b"folder"
        sha.update(f"{path.relative_to(folder)} {len(data)} ".encode() + data)
    return sha.hexdigest()


def power_cuts(case: Case, wanted: Wanted, options: argparse.Namespace) -> Rows:
    """Kill at some points; keep of the folder what a disk may hold, resume."""
    chance = random.Random(options.seed)
    every = sorted(chance.sample(range(1, len(case.points) + 1), min(options.cuts, len(case.points))))
    points = {number for number in every if wanted(str(number))}
    synced = [number for number, name in enumerate(case.points, 1) if name == "committed"]
    saved = [int(name.split("-")[2]) for name in case.points if name.startswith("rename .tmp-step-")]
    shutil.rmtree(journal := case.work / "journal", ignore_errors=True)
    for number, runs_dir in succession(case, points, journal) if points else ():
        after = case.work / "after"
        shutil.rmtree(after, ignore_errors=True)
        after_power_cut(runs_dir, journal, after, seed=number)
        sure = sum(point < number for point in synced)
        row = {"key": str(number), "name": plain(case.points[number - 1])}
        row["lost"] = max((saved[sure - 1] if sure else 0) - newest(after), 0)
        yield judge(case, after, row)


def committed_before(points: list[str]) -> int:
    """Step of the last checkpoint whose rename was done."""
    folders = [name for name in points if name.startswith("rename .tmp-step-")]
    if points and folders and points[-1] == folders[-1]:
        folders.pop()  # the kill came ahead of it
    return int(folders[-1].split("-")[2]) if folders else 0


def plain(name: str) -> str:
    """A point's name without the process's number."""
    return " ".join(word.rstrip("0123456789").rstrip("-") if "-" in word else word for word in name.split())


def random_kills(case: Case, wanted: Wanted, options: argparse.Namespace) -> Rows:
    """SIGKILL from outside at a random time; half of the resumes are killed again, up to three times."""
    for index in range(options.kills):
        chance = random.Random(f"{options.seed}/{case.name}/{index}")
        while wanted(str(index)):
            row = random_kill(case, chance)
            if row["kills"]:
                yield {"key": str(index), **row}
                break  # else it had ended before the kill: that is no row


def random_kill(case: Case, chance: random.Random) -> Row:
    """One run with its kills."""
    runs_dir = case.work / "killed"
    row: Row = {"kills": 0, "killed": True, "lost": 0}
    code, before = 0, 0
    for attempt in range(chance.choice((1, 1, 2, 3))):
        resume = attempt > 0 and newest(runs_dir) > 0
        if attempt and not resume:
            break
        case.out.unlink(missing_ok=True)
        pid = in_child(lambda: train(case, runs_dir, Plan(), resume=True)) if resume else begin(case, runs_dir, Plan())
        time.sleep(chance.uniform(0.05, 1.0) * case.seconds)
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        row["lost"] = max(row["lost"], before - newest(runs_dir))
        before = newest(runs_dir)
        if code != -signal.SIGKILL:  # it was done already
            break
        row["kills"] += 1
    if code not in (-signal.SIGKILL, REFUSED):  # a resume is refused where the kill came after the hand-over
        parts = json.loads(case.out.read_text()) if case.out.exists() else {}
        row |= {"differs": different(case, parts), "code": code, "repeated": 0}
        return row | {"ok": code == 0 and not row["differs"]}
    return judge(case, runs_dir, row)


def chain(case: Case, wanted: Wanted, options: argparse.Namespace) -> Rows:
    """A checkpoint after each step, killed right after each: resume of a resume of a resume and so on."""
    if not wanted("chain"):
        return
    runs_dir = case.work / "killed"
    plan = Plan(kill_after_commits=1, save_every=1)
    row: Row = {"key": "chain", "kills": 0, "lost": 0}
    killed = fresh(case, runs_dir, plan)[0] == -signal.SIGKILL
    while killed:
        row["kills"] += 1
        step = newest(runs_dir)
        row["lost"] = max(row["lost"], row["kills"] - step)
        if step >= options.steps:
            break
        killed = wait(in_child(lambda: train(case, runs_dir, plan, resume=True))) == -signal.SIGKILL
    row["killed"] = row["kills"] == options.steps
    yield judge(case, runs_dir, row)


def every_step(case: Case, wanted: Wanted, options: argparse.Namespace) -> Rows:
    """A checkpoint after every step; resume from each, as `--checkpoint STEP` does."""
    steps = [step for step in range(1, options.steps) if wanted(str(step))]
    if not steps:
        return
    base = case.work / "every"
    code, parts = fresh(case, base, Plan(save_every=1))
    assert code == 0
    assert not different(case, parts), f"saving more often changed {different(case, parts)}"
    for step in steps:
        runs_dir = case.work / "one"
        shutil.rmtree(runs_dir, ignore_errors=True)
        shutil.copytree(base, runs_dir)
        code, parts = finish(case, runs_dir, Plan(step=step))
        yield {"key": str(step), "code": code, "differs": (d := different(case, parts)), "ok": code == 0 and not d}
        shutil.rmtree(runs_dir)
    shutil.rmtree(base)


def half_way(case: Case, wanted: Wanted, part: str) -> Rows:
    """The parts that start from a run killed after its second checkpoint."""
    base = case.work / "half"
    shutil.rmtree(base, ignore_errors=True)
    kill_after_commit(case, base, 1)
    yield from (controls if part == "controls" else damages)(case, base, wanted)
    shutil.rmtree(base)


def run_part(part: str, case: Case, wanted: Wanted, options: argparse.Namespace) -> Rows:
    """One part for one case."""
    if part in ("damage", "controls"):
        return half_way(case, wanted, part)
    parts = {"points": kill_points, "random": random_kills, "chain": chain, "steps": every_step, "power": power_cuts}
    return parts[part](case, wanted, options)
