"""Checkpoints that lack one item (each has to show in the result), and checkpoints that are damaged."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kill_line import wait
from kill_worker import NAME, Case, Plan, different, finish, in_child, train

from emotrain.train import state as run_state
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.state import TrainState

NOT_PROMISED = ("state.resumes", "state.train_s")  # a count of resumes and a time: they differ by their nature
COMPARED = ("identity",)  # what a resume is checked against, not what it continues with


def items(case: Case, tensors: dict[str, Any], documents: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, way to take it out) of everything in a checkpoint, where a fresh run has something else or nothing."""
    loaded = case.loaded
    fresh_tensors, fresh_documents = run_state.capture(
        TrainState(), loaded.model.adapter, loaded.optimizer, loaded.stop_rule, []
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


def controls(case: Case, base: Path, names: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Resume without one item at a time, half way and from the last checkpoint.

    An item that neither changes the result nor is missed by the resume has not been caught. Half way, what the next
    validation or the next loss sets anew does not show (the best so far, the last reading); at the end it does.
    """
    end = case.work / "end"
    shutil.rmtree(end, ignore_errors=True)
    kill_after_commit(case, end, -1)
    checkpoint = CheckpointStore(base / NAME / "checkpoints").load()[0]
    ways = [("nothing (has to be equal)", None), *items(case, checkpoint.tensors, checkpoint.documents)]
    for name, way in ways:
        if not names(name):
            continue
        shown = [(where, *without(case, folder, way)) for where, folder in (("half way", base), ("at the end", end))]
        caught = [bool(code or differs) for _, code, differs in shown]
        ok = any(caught) if way is not None else not any(caught)
        yield {"key": name, "shown": shown, "ok": ok}
    shutil.rmtree(end)


def without(case: Case, base: Path, way: Any) -> tuple[int, list[str]]:
    """Resume a copy of a run without one item; exit code and what differs."""
    runs_dir = case.work / "one"
    shutil.rmtree(runs_dir, ignore_errors=True)
    shutil.copytree(base, runs_dir)
    case.out.unlink(missing_ok=True)
    code = wait(in_child(lambda: train(case, runs_dir, Plan(left_out=way), resume=True)))
    parts = json.loads(case.out.read_text()) if case.out.exists() else {}
    shutil.rmtree(runs_dir)
    return code, different(case, parts) if not code else []


def kill_after_commit(case: Case, runs_dir: Path, index: int) -> None:
    """A run that is killed right after the commit of its `index`-th checkpoint."""
    commits = sum(name == "committed" for name in case.points)
    count = range(1, commits + 1)[index]
    runs_dir.mkdir()
    code = wait(in_child(lambda: train(case, runs_dir, Plan(kill_after_commits=count), resume=False)))
    assert code == -signal.SIGKILL


def harm(path: Path, older: Path, kind: str) -> bool:
    """Damage one file; False where that would not change it."""
    content = bytearray(path.read_bytes())
    size = len(content)
    if kind == "missing":
        path.unlink()
        return True
    if kind.startswith("flip"):
        places = {"first": 0, "header": 20, "third": size // 3, "two thirds": size * 2 // 3, "last": size - 1}
        content[places[kind[5:]]] ^= 16
    now = {
        "half": content[: size // 2],
        "a byte short": content.rstrip(b"\n")[:-1],  # a line break at the end of JSON means nothing
        "empty": b"",
        "zeros": bytes(size),
        "a byte more": content + b"\0",
        "older": older.read_bytes(),
    }.get(kind, content)
    if bytes(now) == path.read_bytes():
        return False
    path.write_bytes(now)
    return True


KINDS = ("half", "a byte short", "empty", "zeros", "a byte more", "missing", "older")
FLIPS = ("flip first", "flip header", "flip third", "flip two thirds", "flip last")


def damages(case: Case, base: Path, names: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Every file of the newest checkpoint damaged in every way; then resume. `names` says which rows are wanted."""
    store = CheckpointStore(base / NAME / "checkpoints")
    older, newest = (base / NAME / "checkpoints" / f"step-{step:08d}" for step in store.steps()[-2:])
    for name in sorted(path.name for path in newest.iterdir()):
        for kind in (*KINDS, *FLIPS):
            key = f"{name}: {kind}"
            if not names(key):
                continue
            runs_dir = case.work / "one"
            shutil.rmtree(runs_dir, ignore_errors=True)
            shutil.copytree(base, runs_dir)
            if not harm(runs_dir / newest.relative_to(base) / name, older / name, kind):
                continue
            code, parts = finish(case, runs_dir)
            kept = (runs_dir / newest.relative_to(base).parent / f".bad-{newest.name}").is_dir()
            row = {"key": key, "code": code, "differs": different(case, parts), "kept": kept}
            yield row | {"ok": code == 0 and not row["differs"] and kept}
            shutil.rmtree(runs_dir)
