"""Forked children that run, die and resume; and the digest of everything that a resume has to bring back."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import power_cut
import torch
from filelock import Timeout
from kill_line import Succession, wait
from torch import Tensor

from emotrain.config.load import load
from emotrain.errors import EmotrainError
from emotrain.lora.file import read_lora
from emotrain.runs import lock, start, training
from emotrain.runs.folder import RunFolder, open_run
from emotrain.runs.loaded import Loaded
from emotrain.runs.loaded import load as load_parts
from emotrain.runs.training import Trained
from emotrain.train import rng
from emotrain.train import state as run_state
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.events import Event, StepEnd
from emotrain.train.loop import Outcome, StopReason

TIMES = ("step_s", "memory_gib")  # of metrics.jsonl: not part of what is promised
NAME = "run"
REFUSED = 5  # exit code


def digest(value: Any) -> str:
    """sha256 of tensors (dtype, shape, bytes) and plain values."""
    sha = hashlib.sha256()

    def walk(inner: Any) -> None:
        if isinstance(inner, Tensor):
            sha.update(f"{inner.dtype}{tuple(inner.shape)}".encode())
            sha.update(inner.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(inner, dict):
            for key in sorted(inner):
                sha.update(f"{key}=".encode())
                walk(inner[key])
        elif isinstance(inner, list | tuple):
            sha.update(f"[{len(inner)}".encode())
            for item in inner:
                walk(item)
        else:
            sha.update(repr(inner).encode())

    walk(value)
    return sha.hexdigest()


class Restless:
    """Draws from every global generator at every step, as dropout in a model would, and notes the step."""

    def __init__(self, trail: Path) -> None:
        self.trail = trail

    def handle(self, event: Event) -> None:
        if isinstance(event, StepEnd):
            torch.rand(3), np.random.standard_normal(3), random.gauss(0, 1), random.random()
            with self.trail.open("a") as file:
                file.write(f"{event.step}\n")

    def close(self) -> None:
        pass


class ForkableLock:
    """The system's lock without filelock's guard against forks: a succession goes on in copies of the process."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path, self.descriptor = path, -1

    def acquire(self) -> None:
        """As `FileLock` does, and its file stays too."""
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Timeout(str(self.path)) from None

    def release(self) -> None:
        """Give it back."""
        os.close(self.descriptor)


def write_digest(out: Path) -> None:
    """From now on a run of this process writes its digest at its end."""
    plain_parts, plain_finish, expected = training.loop_parts, start.finish, []  # type: ignore[attr-defined]

    def loop_parts(loaded: Loaded, state: Any, baseline: Any, *rest: Any) -> Any:
        expected[:] = baseline.expected
        return plain_parts(loaded, state, baseline, *rest)

    def finish(loaded: Loaded, trained: Trained, folder: RunFolder, *rest: Any) -> start.Result:
        states, document = rng.capture()
        result = plain_finish(loaded, trained, folder, *rest)
        tensors, documents = run_state.capture(
            trained.state, loaded.model.adapter, loaded.optimizer, loaded.stop_rule, list(expected)
        )
        tensors["rng"], documents["rng"] = states, document
        out.write_text(json.dumps(end_digest(tensors, documents, trained.outcome, folder.path)))
        return result

    training.loop_parts, start.finish = loop_parts, finish  # type: ignore[attr-defined]


def end_digest(tensors: dict[str, Any], documents: dict[str, Any], outcome: Outcome, folder: Path) -> dict[str, str]:
    """Everything that a resume has to bring back, and what the run hands over."""
    states, document = tensors.pop("rng"), documents.pop("rng")
    documents.pop("identity", None)
    state = {key: value for key, value in documents.pop("state").items() if key not in ("resumes", "train_s")}
    parts = {f"{stem}.tensors": digest(value) for stem, value in tensors.items()}
    parts |= {f"{stem}.json": digest(value) for stem, value in documents.items()}
    parts |= {"state.json": digest(state), "rng": digest([states, document]), "sentence": str(outcome)}
    return parts | files_digest(folder)


def done_digest(run: Path) -> dict[str, str]:
    """The same of a run that had ended when it was killed, from its last checkpoint; {} if it had not ended."""
    info = open_run(run).info()
    if not info["finished"]:
        return {}
    checkpoint, _ = CheckpointStore(run / "checkpoints").load()
    outcome = Outcome(StopReason(info["stop_reason"]), info["stop_sentence"])
    return end_digest(dict(checkpoint.tensors), dict(checkpoint.documents), outcome, run)


def files_digest(folder: Path) -> dict[str, str]:
    """What the run hands over: both LoRAs and the logs, without the times in them."""
    parts = {}
    for name in ("lora.safetensors", "lora-last.safetensors"):
        lora = read_lora(folder / name)
        parts[name] = digest([lora.state, lora.alphas])
    for name in ("metrics.jsonl", "validation.jsonl", "picture_losses.jsonl"):
        text = (folder / name).read_text() if (folder / name).exists() else ""  # a power cut may take a log
        rows = [json.loads(line) for line in text.splitlines()]
        parts[name] = digest([{key: row[key] for key in row if key not in TIMES} for row in rows])
    samples = sorted((folder / "samples").rglob("*.png")) if (folder / "samples").is_dir() else []
    parts["samples"] = digest([[path.name, path.read_bytes().hex()] for path in samples])
    return parts


@dataclass
class Case:
    """One preset, loaded once, and where its children work."""

    name: str
    work: Path
    loaded: Loaded
    trail: Path
    out: Path
    straight: dict[str, str] = field(default_factory=dict)
    points: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def save_every(self) -> int:
        return int(self.loaded.preset.save.every)


def prepare(name: str, text: str, work: Path) -> Case:
    """Load the preset's model and data; children inherit them."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "preset.yaml"
    path.write_text(text)
    preset = load(str(path), (), NAME).preset
    trail = work / "trail"
    return Case(name, work, load_parts(preset, lambda event: None), trail, work / "digest.json")


def in_child(work: Callable[[], None]) -> int:
    """Fork and do it there; gives the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        torch.set_num_threads(1)
        work()
    except EmotrainError as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode()) if os.environ.get("SHOW") else None
        os._exit(int(error.exit_code))
    except BaseException:  # noqa: BLE001 - a forked child must never return
        traceback.print_exc()
        os._exit(99)
    os._exit(0)


@dataclass
class Plan:
    """What happens to one child: killed at points, or watched; with items left out of its checkpoint."""

    kill_at: int = 0
    kill_after_commits: int = 0
    succession: Succession | None = None
    points: Path | None = None
    journal: Path | None = None
    left_out: Callable[[dict[str, Any], dict[str, Any]], None] | None = None
    save_every: int | None = None
    step: int | None = None
    out: Path | None = None


def train(case: Case, runs_dir: Path, plan: Plan, *, resume: bool) -> None:
    """In a child: a run or a resume, by the same functions as the commands use."""
    count, commits = 0, 0
    sink = os.open(plan.points, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if plan.points else None

    def point(name: str) -> None:
        nonlocal count, commits
        count += 1
        if sink is not None:
            os.write(sink, f"{name}\n".encode())
        commits += name == "committed"
        if count == plan.kill_at or (plan.kill_after_commits and commits == plan.kill_after_commits):
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.succession is not None and count in plan.succession.points:
            plan.succession.die()

    if plan.kill_at or plan.kill_after_commits or plan.journal or plan.points or plan.succession:
        for module in (start, training):
            module.CheckpointStore = partial(CheckpointStore, stage=point)  # type: ignore[attr-defined]
        journal = plan.journal or case.work / "journal" / str(os.getpid())
        power_cut.record(runs_dir, journal, point)
    if plan.left_out is not None:
        start.CheckpointStore = partial(Forgetful, plan.left_out)  # type: ignore[attr-defined]
    preset = case.loaded.preset
    if plan.save_every is not None:
        save = preset.save.model_copy(update={"every": plan.save_every, "keep_last": 10_000})
        preset = preset.model_copy(update={"save": save})
    loaded = replace(case.loaded, preset=preset)
    lock.FileLock = ForkableLock  # type: ignore[attr-defined]
    start.load = lambda *args, **kwargs: loaded  # type: ignore[attr-defined]
    write_digest(plan.out or case.out)
    watching = (Restless(case.trail),)
    rng.seed_all(preset.train.seed)  # what `load` would do here
    if resume:
        start.resume(open_run(runs_dir / NAME), preset, step=plan.step, observers=watching)
    else:
        start.run(preset, runs_dir=runs_dir, observers=watching)


class Forgetful(CheckpointStore):
    """A store whose checkpoints lack something."""

    def __init__(self, leave_out: Callable[..., None], *args: Any, **words: Any) -> None:
        super().__init__(*args, **words)
        self.leave_out = leave_out

    def load(self, step: int | None = None) -> Any:
        checkpoint, notices = super().load(step)
        self.leave_out(checkpoint.tensors, checkpoint.documents)
        return checkpoint, notices


def finish(case: Case, runs_dir: Path, plan: Plan | None = None) -> tuple[int, dict[str, str]]:
    """Resume to the end, or start anew where nothing had been committed; exit code and digest."""
    case.out.unlink(missing_ok=True)
    run = runs_dir / NAME
    resume = bool(CheckpointStore(run / "checkpoints").steps())
    if not resume and run.exists():
        code = wait(in_child(lambda: train(case, runs_dir, Plan(), resume=True)))
        if code != REFUSED:
            return code, {"resume without a checkpoint": "was not refused"}
        run.rename(runs_dir / f"dead-{time.monotonic_ns()}")
    code = wait(in_child(lambda: train(case, runs_dir, plan or Plan(), resume=resume)))
    parts = json.loads(case.out.read_text()) if case.out.exists() else {}
    if code == REFUSED and (done := done_digest(run)):
        return 0, done  # nothing was left to do, and all of it is there
    return code, parts


def different(case: Case, parts: dict[str, str], ignore: tuple[str, ...] = ()) -> list[str]:
    """Which parts are not those of the uninterrupted run."""
    keys = case.straight.keys() | parts.keys()
    return sorted(key for key in keys if key not in ignore and case.straight.get(key) != parts.get(key))


def last_step(case: Case) -> int:
    """The last step that a child has done."""
    lines = case.trail.read_text().split() if case.trail.exists() else []
    return int(lines[-1]) if lines else 0
