"""A recorded run as events again: from metrics.jsonl, and validation.jsonl and run.json beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from emotrain.observers.metrics_log import VALIDATION_FILE
from emotrain.pulse.reading import Reading
from emotrain.train.events import Event, RunStart, SamplesDrawn, Saved, StepEnd, ValidationEnd

_STEP = re.compile(r"step-(\d+)")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a missing file has none, a half last line is left out."""
    rows: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return rows
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            rows.append(json.loads(line))
    return rows


def play_back(metrics: Path, *, start: RunStart | None = None) -> Iterator[Event]:
    """`RunStart`, then every step with its validations, in the order of the run.

    Args:
        metrics: path of a metrics.jsonl.
        start: the head of the run (default: what can be told from the files).
    """
    steps = read_rows(metrics)
    validations = {row["step"]: row for row in read_rows(metrics.with_name(VALIDATION_FILE))}
    yield start if start is not None else _start(metrics, steps)
    for row in steps:
        yield step_event(row)
        if row["step"] in validations:
            yield validation_event(validations[row["step"]])


def read_extras(metrics: Path, shown: Path | None = None, last_step: int | None = None) -> list[SamplesDrawn | Saved]:
    """The last sheet and the last checkpoint of a run folder, up to `last_step`.

    Their paths are told as if the run folder were at `shown`.
    """
    folder = metrics.parent
    place = folder if shown is None else shown
    found: list[SamplesDrawn | Saved] = []
    sheets = sorted((folder / "samples").glob("*sheet*.png"))
    drawn = _last_step_of((folder / "samples").glob("step-*"), last_step)
    if sheets and drawn is not None:
        found.append(SamplesDrawn(drawn[0], (), (), place / sheets[-1].relative_to(folder)))
    saved = _last_step_of((folder / "checkpoints").glob("step-*"), last_step)
    if saved is not None:
        found.append(Saved(saved[0], place / saved[1].relative_to(folder)))
    return found


def _last_step_of(paths: Iterable[Path], last_step: int | None) -> tuple[int, Path] | None:
    """The greatest step among names like `step-00000250...`, with its path."""
    named = [(int(match[1]), path) for path in paths if (match := _STEP.match(path.name))]
    return max((item for item in named if last_step is None or item[0] <= last_step), default=None)


def _start(metrics: Path, steps: list[dict[str, Any]]) -> RunStart:
    folder = metrics.resolve().parent
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        facts = {}
    last = steps[-1]["step"] if steps else 0
    return RunStart(
        name=folder.name,
        run_dir=folder,
        start_step=steps[0]["step"] - 1 if steps else 0,
        max_steps=int(facts.get("max_steps", last) or last),
        steps_per_epoch=0.0,
        optimizer=str(facts.get("optimizer", "")),
        num_images=0,
        num_modules=0,
        num_parameters=0,
        device=str(facts.get("device", "")),
    )


def step_event(row: Mapping[str, Any]) -> StepEnd:
    """The step of a line of metrics.jsonl; what is missing or null becomes NaN."""
    names = ("scalar", "trust", "pulse", "drive", "short", "medium", "long", "noise_est", "d_est")
    reading = Reading(**{name: _float(row, name) for name in names})
    end = row.get("expected_end")
    return StepEnd(
        step=int(row["step"]),
        epoch=_float(row, "epoch"),
        loss=_float(row, "loss"),
        observed_loss=_float(row, "observed_loss") if "observed_loss" in row else _float(row, "loss"),
        reading=reading,
        ready=bool(row.get("ready", False)),
        grad_norm=_float(row, "grad_norm"),
        lr=_float(row, "lr"),
        step_s=_float(row, "step_s"),
        stop_meter=_float(row, "stop_meter", 0.0),
        expected_end=(int(end[0]), int(end[1])) if end else None,
        memory_gib=_float(row, "memory_gib", 0.0),
        skipped=int(row.get("skipped", 0)),
    )


def validation_event(row: Mapping[str, Any]) -> ValidationEnd:
    """The validation of a line of validation.jsonl."""
    drift = row.get("drift")
    return ValidationEnd(
        step=int(row["step"]),
        loss=_float(row, "loss"),
        scalar=_float(row, "scalar"),
        base_loss=_float(row, "base_loss"),
        drift=None if drift is None else float(drift),
        best_step=int(row["best_step"]),
        best_loss=_float(row, "best_loss"),
    )


def _float(row: Mapping[str, Any], name: str, missing: float = math.nan) -> float:
    value = row.get(name)
    return missing if value is None else float(value)
