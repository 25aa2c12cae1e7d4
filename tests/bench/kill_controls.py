"""Checkpoints that lack one item (each has to show in the result), and checkpoints that are damaged."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kill_worker import NAME, Case, Plan, different, finish, in_child, train, wait

from emotrain.train import remember
from emotrain.train.checkpoint import CheckpointStore

NOT_PROMISED = ("state.resumes", "state.train_s")  # a count of resumes and a time: they differ by their nature
COMPARED = ("identity",)  # what a resume is checked against, not what it continues with


def items(case: Case, tensors: dict[str, Any], documents: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, way to take it out) of everything in a checkpoint, where a fresh run has something else or nothing."""
    session = case.session
    fresh_tensors, fresh_documents = remember.capture(
        session.state, session.model.adapter, session.optimizer, session.stop_rule, session.expected
    )
    for stem, named in tensors.items():
        yield f"{stem}.safetensors", lambda t, d, s=stem: put(t, s, fresh_tensors.get(s, {}))
        slots = {name.rpartition("|")[2] if "|" in name else name for name in named} if stem != "adapter" else set()
        for slot in sorted(slots if stem in ("optimizer", "rng") else ()):
            first = next(name for name in named if name == slot or name.endswith(f"|{slot}"))
            if first in fresh_tensors.get(stem, {}):
                yield f"{stem}: {slot}", lambda t, d, s=stem, n=first: put(t[s], n, fresh_tensors[s][n])
            else:
                yield f"{stem}: {slot} of one parameter", lambda t, d, s=stem, n=first: t[s].pop(n)
    for stem, value in documents.items():
        if stem not in COMPARED:
            yield from leaves(stem, value, fresh_documents[stem], (stem,))


def leaves(name: str, value: Any, fresh: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """The leaves of a document that are not what a fresh run would have."""
    if isinstance(value, dict) and isinstance(fresh, dict) and value:
        for key, inner in value.items():
            yield from leaves(f"{name}.{key}", inner, fresh.get(key), (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict) and isinstance(fresh, list):
        for index, inner in enumerate(value):
            yield from leaves(f"{name}[{index}]", inner, fresh[index], (*path, index))
    elif json.dumps(value) != json.dumps(fresh) and name not in NOT_PROMISED:

        def take_out(tensors: Any, documents: Any) -> None:
            place = documents
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = fresh

        yield name, take_out


def put(place: dict[str, Any], key: str, value: Any) -> None:
    """Assignment, for lambdas."""
    place[key] = value


def controls(case: Case, base: Path) -> list[dict[str, Any]]:
    """Resume without one item at a time, half way and from the last checkpoint.

    An item that neither changes the result nor is missed by the resume has not been caught. Half way, what the next
    probe or the next loss sets anew does not show (the best so far, the last reading); at the end it does.
    """
    end = case.work / "end"
    kill_after_commit(case, end, -1)
    checkpoint = CheckpointStore(base / NAME / "checkpoints").load()[0]
    ways = [("nothing (has to be equal)", None), *items(case, checkpoint.tensors, checkpoint.documents)]
    rows = []
    for name, way in ways:
        shown = [(where, *without(case, folder, way)) for where, folder in (("half way", base), ("at the end", end))]
        caught = [bool(code or differs) for _, code, differs in shown]
        ok = any(caught) if way is not None else not any(caught)
        rows.append({"item": name, "shown": shown, "ok": ok})
        if not ok:
            print("NOT AS IT SHOULD BE", case.name, name, flush=True)
    shutil.rmtree(end)
    return rows


def without(case: Case, base: Path, way: Any) -> tuple[int, list[str]]:
    """Resume a copy of a run without one item; exit code and what differs."""
    runs_dir = case.work / "one"
    shutil.copytree(base, runs_dir)
    case.session.out.unlink(missing_ok=True)
    code = wait(in_child(lambda: train(case, runs_dir, Plan(left_out=way), resume=True)))
    parts = json.loads(case.session.out.read_text()) if case.session.out.exists() else {}
    shutil.rmtree(runs_dir)
    return code, different(case, parts) if not code else []


def kill_after_commit(case: Case, runs_dir: Path, index: int) -> None:
    """A run that is killed right after the commit of its `index`-th checkpoint."""
    commits = [number for number, name in enumerate(case.points, 1) if name == "committed"]
    code = wait(in_child(lambda: train(case, runs_dir, Plan(kill_at=commits[index]), resume=False)))
    assert code == -signal.SIGKILL


def damages(case: Case, base: Path) -> list[dict[str, Any]]:
    """Every file of the newest checkpoint cut, with a flipped bit, missing, or an older one's; then resume."""
    store = CheckpointStore(base / NAME / "checkpoints")
    older, newest = (base / NAME / "checkpoints" / f"step-{step:08d}" for step in store.steps()[-2:])
    rows = []
    for name in sorted(path.name for path in newest.iterdir()):
        for kind in ("cut", "flip", "missing", "older"):
            runs_dir = case.work / "one"
            shutil.copytree(base, runs_dir)
            path = runs_dir / newest.relative_to(base) / name
            content = bytearray(path.read_bytes())
            if kind == "cut":
                path.write_bytes(content[: len(content) // 2])
            elif kind == "flip":
                content[len(content) * 2 // 3] ^= 16
                path.write_bytes(content)
            elif kind == "missing":
                path.unlink()
            elif (older / name).read_bytes() == content:
                shutil.rmtree(runs_dir)
                continue
            else:
                shutil.copy(older / name, path)
            code, parts = finish(case, runs_dir)
            kept = (runs_dir / newest.relative_to(base).parent / f".bad-{newest.name}").is_dir()
            row = {"file": name, "kind": kind, "code": code, "differs": different(case, parts), "kept": kept}
            row["ok"] = code == 0 and not row["differs"] and kept
            rows.append(row)
            shutil.rmtree(runs_dir)
    return rows
