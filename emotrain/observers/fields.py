"""Events as plain JSON rows: one schema for metrics.jsonl, validation.jsonl and `--json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from emotrain.train.events import (
    Event,
    Notice,
    Phase,
    RunEnd,
    RunStart,
    SamplesDrawn,
    Saved,
    StepEnd,
    ValidationEnd,
)

SCHEMA_VERSION = 1


def finite(value: float | None) -> float | None:
    """The number, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def step_row(event: StepEnd) -> dict[str, Any]:
    """The line of metrics.jsonl that belongs to one optimizer step."""
    reading = event.reading
    end = event.expected_end
    return {
        "step": event.step,
        "epoch": finite(event.epoch),
        "loss": finite(event.loss),
        "observed_loss": finite(event.observed_loss),
        "scalar": finite(reading.scalar),
        "trust": finite(reading.trust),
        "pulse": finite(reading.pulse),
        "drive": finite(reading.drive),
        "short": finite(reading.short),
        "medium": finite(reading.medium),
        "long": finite(reading.long),
        "noise_est": finite(reading.noise_est),
        "d_est": finite(reading.d_est),
        "ready": event.ready,
        "grad_norm": finite(event.grad_norm),
        "lr": finite(event.lr),
        "step_s": finite(event.step_s),
        "stop_meter": finite(event.stop_meter),
        "expected_end": list(end) if end is not None else None,
        "memory_gib": finite(event.memory_gib),
        "skipped": event.skipped,
        "gain": event.gain,
    }


def validation_row(event: ValidationEnd) -> dict[str, Any]:
    """The line of validation.jsonl that belongs to one validation."""
    return {
        "step": event.step,
        "loss": finite(event.loss),
        "scalar": finite(event.scalar),
        "base_loss": finite(event.base_loss),
        "drift": finite(event.drift),
        "best_step": event.best_step,
        "best_loss": finite(event.best_loss),
    }


def event_row(event: Event) -> dict[str, Any]:
    """Any event as a JSON object; its kind is the first key, `event`."""
    match event:
        case StepEnd():
            return {"event": "step", **step_row(event)}
        case ValidationEnd():
            return {"event": "validation", **validation_row(event)}
        case RunStart():
            return _start_row(event)
        case SamplesDrawn():
            return {
                "event": "samples",
                "step": event.step,
                "paths": [_path(path) for path in event.paths],
                "prompts": list(event.prompts),
                "sheet": _path(event.sheet),
            }
        case Saved():
            path = _path(event.path)
            return {"event": "saved", "step": event.step, "path": path, "best": event.best}
        case Phase():
            return {
                "event": "phase",
                "name": event.name,
                "done": event.done,
                "total": event.total,
            }
        case Notice():
            return {"event": "notice", "level": event.level, "message": event.message}
        case RunEnd():
            return _end_row(event)


def _start_row(event: RunStart) -> dict[str, Any]:
    return {
        "event": "run_start",
        "schema_version": SCHEMA_VERSION,
        "name": event.name,
        "run_dir": _path(event.run_dir),
        "start_step": event.start_step,
        "max_steps": event.max_steps,
        "steps_per_epoch": finite(event.steps_per_epoch),
        "optimizer": event.optimizer,
        "num_images": event.num_images,
        "num_modules": event.num_modules,
        "num_parameters": event.num_parameters,
        "device": event.device,
        "facts": [list(fact) for fact in event.facts],
    }


def _end_row(event: RunEnd) -> dict[str, Any]:
    return {
        "event": "run_end",
        "step": event.step,
        "stop_reason": event.stop_reason,
        "sentence": event.sentence,
        "lora": _path(event.lora),
        "best_step": event.best_step,
        "best_loss": finite(event.best_loss),
        "seconds": finite(event.seconds),
        "resume_command": event.resume_command,
        "all_command": event.all_command,
        "metrics": {name: finite(value) for name, value in event.metrics.items()},
    }


def _path(path: Path | None) -> str | None:
    """The path as text; bytes that are no UTF-8 become question marks."""
    if path is None:
        return None
    return str(path).encode("utf-8", errors="replace").decode("utf-8")


def to_line(row: dict[str, Any]) -> str:
    """One line of strict JSON with its line break. Lone surrogates are escaped, NaN is refused."""
    return json.dumps(row, ensure_ascii=True, allow_nan=False, separators=(", ", ": ")) + "\n"
