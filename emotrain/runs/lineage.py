"""Which run builds on which, what became of each, and how two of them differ (no torch)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.config.source import parse
from emotrain.errors import CheckpointError, ConfigError, EmotrainError
from emotrain.files import is_regular, read_regular, sha256_of
from emotrain.runs.changes import flat
from emotrain.runs.folder import RunFolder, list_runs
from emotrain.runs.lock import is_held

RESULTS = (
    "status", "steps", "best_step", "best_loss", "base_loss", "train_s", "seed", "device",
    "emotrain", "base_sha256", "dataset_sha256",
)  # fmt: skip
LOSSES = ("best_loss", "base_loss")
VALIDATED = (  # keys of the preset that a validation loss depends on, the run's weights apart
    "validate.folder", "validate.fraction", "validate.probe_images", "dataset.resolution", "dataset.buckets.",
    "dataset.captions.", "dataset.trigger", "dataset.background", "model.clip_skip", "train.seed", "train.loss.",
)  # fmt: skip
TAIL = 8192  # bytes of a log's end that hold its last line
_VERBS = {"continue": "continues", "stack": "on top of"}


@dataclass(frozen=True)
class Run:
    """A run's folder with what its `run.json` says; `info` is empty where that is damaged."""

    folder: RunFolder
    info: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        """In a word: running, done, interrupted, diverged, out of memory, crashed, damaged."""
        if not self.info:
            return "damaged"
        if is_held(self.folder.path / ".lock"):
            return "running"
        reason = self.info.get("stop_reason")
        if reason is None:
            return "crashed"
        return str(reason) if reason in ("interrupted", "diverged", "out of memory") else "done"

    def results(self) -> dict[str, Any]:
        """What `runs list` and `runs compare` look at."""
        found = {"status": self.status, **{key: self.info.get(key) for key in RESULTS[1:]}}
        if found["status"] in ("running", "crashed"):  # run.json counts the steps at the end alone
            found["steps"] = last_step(self.folder) or found["steps"]
        return found


def last_step(folder: RunFolder) -> int | None:
    """The last step that metrics.jsonl tells of; None where it tells of none."""
    if not is_regular(folder.metrics_path):
        return None
    try:
        with folder.metrics_path.open("rb") as file:
            file.seek(max(folder.metrics_path.stat().st_size - TAIL, 0))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError, RecursionError):  # the half line of a run that is writing
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    return int(row["step"])
    except OSError:
        return None
    return None


def read_run(folder: RunFolder) -> Run:
    """The run with its description."""
    try:
        return Run(folder, folder.info())
    except CheckpointError:
        return Run(folder, {})


def read_runs(runs_dir: Path) -> list[Run]:
    """All runs in `runs_dir`, the earliest first."""
    return [read_run(folder) for folder in list_runs(runs_dir)]


class Family:
    """The runs of one folder and who descends from whom, by the sha256 of the LoRA files."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self._by_digest: dict[str, Run] = {}
        for run in self.runs:
            for path in (run.folder.lora_last_path, run.folder.lora_path):
                digest = file_digest(path)
                if digest is not None:
                    self._by_digest[digest] = run
        self._by_name = {run.name: run for run in self.runs}

    def parents(self, run: Run) -> list[tuple[dict[str, Any], Run | None]]:
        """The entries of `parents` with the runs that they are, where these are known.

        A LoRA file that a later resume has overwritten is still found by its run's name.
        """
        entries = [dict(entry) for entry in run.info.get("parents") or ()]
        return [
            (entry, self._by_digest.get(str(entry.get("sha256"))) or self._by_name.get(str(entry.get("run"))))
            for entry in entries
        ]

    def children(self, run: Run) -> list[Run]:
        """Runs that build on this one directly."""
        return [
            other
            for other in self.runs
            if any(known is not None and known.name == run.name for _, known in self.parents(other))
        ]

    def tree(self, run: Run) -> Iterator[str]:
        """The line of descent, a line of text per ancestor, the run itself first."""
        yield describe(run)
        yield from self._branches(run, "", {run.name})

    def _branches(self, run: Run, indent: str, seen: set[str]) -> Iterator[str]:
        parents = self.parents(run)
        for index, (entry, known) in enumerate(parents):
            last = index == len(parents) - 1
            yield f"{indent}{'└─' if last else '├─'} {describe_parent(entry, known)}"
            if known is not None and known.name not in seen:
                deeper = indent + ("   " if last else "│  ")
                yield from self._branches(known, deeper, seen | {known.name})


def describe(run: Run) -> str:
    """A run in one line."""
    started = str(run.info.get("started") or "")[:10]
    words = [run.name, started, run.status, f"{run.info.get('steps') or 0} steps"]
    if isinstance(best := run.info.get("best_loss"), float):
        words.append(f"best {best:.4f} at {run.info.get('best_step')}")
    return "  ".join(word for word in words if word)


def describe_parent(entry: Mapping[str, Any], known: Run | None) -> str:
    """What a run builds on, in one line."""
    kind = str(entry.get("kind"))
    verb = _VERBS.get(kind, kind)
    if kind == "stack":
        verb += f" {entry.get('weight', 1.0)} x"
    if known is not None:
        return f"{verb} {describe(known)}"
    name = entry.get("run") or entry.get("file") or "a LoRA file"
    return f"{verb} {name}  sha256 {str(entry.get('sha256'))[:12]}  (not among these runs)"


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Preset keys in which the runs are not all alike: (dotted key, the value of each run).

    Raises:
        ConfigError: a run's preset cannot be read.
    """
    presets = [dict(flat(_preset(run))) for run in runs]
    keys = list(dict.fromkeys(key for preset in presets for key in preset))
    rows = [(key, [preset.get(key) for preset in presets]) for key in keys if key != "name"]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def validated_apart(runs: Sequence[Run], changed: Sequence[tuple[str, list[Any]]]) -> list[str]:
    """In what the runs' validations differ; their losses cannot be compared where it is anything.

    Args:
        runs: the runs.
        changed: their `differences`.
    """
    held_out = [run.info.get("held_out") or [] for run in runs]
    facts = {"base_sha256": [run.info.get("base_sha256") for run in runs], "held_out": held_out}
    if not all(held_out):  # training pictures were validated on
        facts["dataset_sha256"] = [run.info.get("dataset_sha256") for run in runs]
    found = [name for name, values in facts.items() if any(value != values[0] for value in values)]
    return found + [key for key, _ in changed if key.startswith(VALIDATED)]


def file_digest(path: Path) -> str | None:
    """sha256 of a file in hex, None where there is none."""
    try:
        return sha256_of(path) if is_regular(path) else None
    except OSError:
        return None


def _preset(run: Run) -> Any:
    path = run.folder.preset_path
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        return parse(text, str(path))[0].plain()
    except EmotrainError as error:
        raise ConfigError(f"{path} is not a preset: {error.message}") from error
