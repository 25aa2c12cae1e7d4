"""Loss series out of other people's logs: JSON lines, JSON, CSV, TensorBoard event files (no torch)."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emotrain.errors import ConfigError

# Most telling first; a single step's loss before a running mean.
LOSS_NAMES = (
    "observed_loss", "loss", "train_loss", "train/loss", "loss/train", "loss/current", "training_loss", "step_loss",
    "train/loss_step", "loss/observed", "value", "loss/average", "avr_loss",
)  # fmt: skip
STEP_NAMES = ("step", "global_step", "train/global_step", "iteration", "iter", "steps")
_EVENT_FILES = "*tfevents*"


@dataclass(frozen=True)
class LossLog:
    """A series of losses: `column` is where they were found, `left_out` counts values that are not finite.

    `start_loss` is the base's mean loss that a run of ours began its averages at, None in other logs; `gains` are its
    gains on the step length, one a loss, empty in other logs.
    """

    source: Path
    column: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    left_out: int = 0
    start_loss: float | None = None
    gains: tuple[float, ...] = ()


def read_log(path: Path, column: str | None = None) -> LossLog:
    """The losses of a log.

    Args:
        path: a .jsonl, .json, .csv or .tsv file, an event file, or a folder: a run's, or one that holds event files.
        column: name of the key, column or tag; None takes the likeliest.

    Raises:
        ConfigError: there is no such log, it cannot be read, or it holds no losses under that name.
    """
    if path.is_dir():
        if (path / "metrics.jsonl").is_file():
            return read_log(path / "metrics.jsonl", column)
        return _from_events(path, sorted(path.rglob(_EVENT_FILES)), column)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such log", "give a metrics.jsonl, a CSV, or a TensorBoard folder")
    if "tfevents" in path.name:
        return _from_events(path, [path], column)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}", "give a JSON, CSV or event file") from error
    rows = _rows(path, text)
    log = _from_rows(path, rows, column)
    if path.name == "metrics.jsonl" and log.column in ("observed_loss", "loss"):
        gains = {_number(row.get("step")): _number(row.get("gain")) for row in rows}
        found = [gains.get(step, math.nan) for step in log.steps]
        start_loss = _start_loss(path.with_name("run.json"))
        return replace(log, start_loss=start_loss, gains=tuple(x if math.isfinite(x) else 1.0 for x in found))
    return log


def _start_loss(path: Path) -> float | None:
    """What a run's `run.json` says of the loss that its emotion began at."""
    try:
        said = json.loads(path.read_text(encoding="utf-8")).get("start_loss")
    except (OSError, ValueError, AttributeError, RecursionError):  # a log without its run is still a log
        return None
    loss = _number(said)
    return loss if math.isfinite(loss) else None


def _rows(path: Path, text: str) -> list[Mapping[str, Any]]:
    stripped = text.lstrip()
    if path.suffix.lower() in (".jsonl", ".ndjson") or (stripped.startswith("{") and "\n{" in stripped):
        return _json_lines(path, text)
    if path.suffix.lower() == ".json" or stripped.startswith(("[", "{")):
        return _json_rows(path, text)
    return _csv_rows(text)


def _json_lines(path: Path, text: str) -> list[Mapping[str, Any]]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    rows: list[Mapping[str, Any]] = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == lines[-1][0] and rows:
                break  # the half line of a run that is writing, or has crashed
            raise ConfigError(f"{path}:{number}: is not JSON", "each line must be one JSON object") from error
        if isinstance(row, Mapping):
            rows.append(row)
    return rows


def _json_rows(path: Path, text: str) -> list[Mapping[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise ConfigError(f"{path}:{line}: is not JSON", "give a list of losses or of objects") from error
    if isinstance(value, Mapping):
        value = value.get("log_history", [value])
    rows: list[Mapping[str, Any]] = []
    for index, item in enumerate(value if isinstance(value, list) else []):
        if isinstance(item, Mapping):
            rows.append(item)
        elif isinstance(item, list) and len(item) >= 2:  # step, loss, ...; TensorBoard's download: time, step, loss
            step, loss = item[1:3] if len(item) == 3 and _number(item[0]) > 1e8 else item[:2]
            rows.append({"step": step, "loss": loss})
        else:
            rows.append({"step": index + 1, "loss": item})
    return rows


def _csv_rows(text: str) -> list[Mapping[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        return []
    delimiter = max(",;\t", key=lines[0].count)
    table = list(csv.reader(lines, delimiter=delimiter))
    if all(math.isnan(_number(cell)) for cell in table[0]):
        header = [cell.strip() for cell in table[0]]
        return [dict(zip(header, row, strict=False)) for row in table[1:]]
    names = ("loss",) if len(table[0]) == 1 else ("step", "loss")  # no header
    return [dict(zip(names, row, strict=False)) for row in table]


def _from_rows(path: Path, rows: Sequence[Mapping[str, Any]], column: str | None) -> LossLog:
    names = list(dict.fromkeys(key for row in rows for key in row))
    name = _choose(path, names, column)
    step_name = next((key for want in STEP_NAMES for key in names if key.lower() == want), None)
    filled = [row for row in rows if row.get(name) not in (None, "")]
    steps = [_number(row.get(step_name)) if step_name else math.nan for row in filled]
    return _series(path, name, steps, [_number(row[name]) for row in filled])


def _from_events(path: Path, files: Sequence[Path], column: str | None) -> LossLog:
    if not files:
        raise ConfigError(
            f"{path}: holds no metrics.jsonl and no TensorBoard event file", "give the folder of one run's log"
        )
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ConfigError("TensorBoard logs need the package tensorboard", "pip install tensorboard") from error
    scalars: dict[str, dict[int, float]] = {}
    for folder in dict.fromkeys(file if path.is_file() else file.parent for file in files):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                scalars.setdefault(tag, {})[event.step] = event.value
        for tag in events.Tags()["tensors"]:
            for event in events.Tensors(tag):
                if event.tensor_proto.float_val:
                    scalars.setdefault(tag, {})[event.step] = event.tensor_proto.float_val[0]
    name = _choose(path, list(scalars), column)
    steps = sorted(scalars[name])
    return _series(path, name, [float(step) for step in steps], [scalars[name][step] for step in steps])


def _choose(path: Path, names: Sequence[str], column: str | None) -> str:
    if column is not None:
        if column in names:
            return column
        raise ConfigError(f"{path}: has no `{column}`", f"it has: {', '.join(names)}" if names else None)
    for want in LOSS_NAMES:
        for name in names:
            if name.lower() == want:
                return name
    likely = [name for name in names if "loss" in name.lower()]
    if len(likely) == 1:
        return likely[0]
    shown = ", ".join((likely or list(names))[:12])
    raise ConfigError(
        f"{path}: {'several losses to choose from' if likely else 'no loss found'}",
        f"name one with --column: {shown}" if shown else "the log is empty",
    )


def _series(path: Path, name: str, steps: Sequence[float], losses: Sequence[float]) -> LossLog:
    numbered = [
        (int(step) if math.isfinite(step) else index, loss)
        for index, (step, loss) in enumerate(zip(steps, losses, strict=True), 1)
    ]
    finite = [(step, loss) for step, loss in numbered if math.isfinite(loss)]
    if not finite:
        raise ConfigError(f"{path}: `{name}` holds no finite number", "name another column with --column")
    return LossLog(
        source=path,
        column=name,
        steps=tuple(step for step, _ in finite),
        losses=tuple(loss for _, loss in finite),
        left_out=len(numbered) - len(finite),
    )


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def usual_gap(steps: Iterable[int]) -> int:
    """The commonest distance between two logged steps, 1 for a log of every step."""
    sorted_steps = sorted(steps)
    gaps = [b - a for a, b in zip(sorted_steps, sorted_steps[1:], strict=False) if b > a]
    return max(set(gaps), key=gaps.count) if gaps else 1
