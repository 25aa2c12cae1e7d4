"""A recorded run as events again, from its metrics.jsonl and validation.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from emotrain.pulse.signal import Reading
from emotrain.train.events import Event, StepEnd, ValidationEnd


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a missing file has none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def recorded(metrics: Path) -> Iterator[Event]:
    """Every step with its validation, in the order of the run; the base's validation comes first."""
    validations = {row["step"]: ValidationEnd(**row) for row in read_rows(metrics.with_name("validation.jsonl"))}
    if 0 in validations:
        yield validations[0]
    for row in read_rows(metrics):
        known = {key: math.nan if value is None else value for key, value in row.items()}
        known["expected_end"] = tuple(row["expected_end"]) if row.get("expected_end") else None
        known["reading"] = Reading(**{each.name: known[each.name] for each in fields(Reading)})
        yield StepEnd(**{each.name: known[each.name] for each in fields(StepEnd) if each.name in known})
        if row["step"] in validations:
            yield validations[row["step"]]
