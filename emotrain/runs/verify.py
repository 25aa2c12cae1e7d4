"""Proof that resume is exact: 2n steps straight against n steps, `kill -9`, and n steps more."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from emotrain.config.schema import Preset
from emotrain.errors import CheckpointError
from emotrain.runs.folder import RunFolder

FREE = ("train_s", "resumes")  # wall-clock seconds, and how often the run was resumed


@dataclass(frozen=True)
class Comparison:
    """One thing that was compared, and whether it is equal to the last bit; `apart` is the largest difference."""

    what: str
    equal: bool
    size: str
    apart: float = 0.0


def verify_resume(preset: Preset, steps: int, work: Path, tell: Callable[[str], None]) -> list[Comparison]:
    """Train twice in processes of their own, kill the second one half-way, and compare everything.

    Args:
        preset: samples are left out and checkpoints set to every `steps` steps; `train.deterministic: auto` is true.
        steps: n; the run is 2n steps long.
        work: an empty folder for the two runs.
        tell: gets a line about each stage.

    Raises:
        CheckpointError: a process ended in another way than it should have.
    """
    tell(f"training {2 * steps} steps straight")
    straight = _start(preset, steps, work, "straight")
    _wait(straight, "the straight run")
    tell(f"training again, killed after step {steps}")
    killed = _start(preset, steps, work, "killed")
    _kill_at(killed, steps)
    tell("resuming")
    again = _emotrain("resume", str(work / "runs" / "killed"), "--json")
    _wait(again, "the resumed run")
    return list(compare(RunFolder(work / "runs" / "straight"), RunFolder(work / "runs" / "killed"), 2 * steps))


def compare(one: RunFolder, other: RunFolder, step: int) -> Iterator[Comparison]:
    """Checkpoints of the last step, LoRA weights, and the history of losses."""
    name = f"step-{step:08d}"
    for path in sorted((one.checkpoints_dir / name).glob("*.safetensors")):
        yield _tensors(f"checkpoint: {path.stem}", path, other.checkpoints_dir / name / path.name)
    for path in sorted((one.checkpoints_dir / name).glob("*.json")):
        if path.name not in ("MANIFEST.json", "identity.json"):
            pair = [_document(folder.checkpoints_dir / name / path.name) for folder in (one, other)]
            yield Comparison(f"checkpoint: {path.name}", pair[0] == pair[1], f"{path.stat().st_size} bytes")
    for lora in ("lora.safetensors", "lora-last.safetensors"):
        yield _tensors(lora, one.path / lora, other.path / lora)
    for log in ("metrics.jsonl", "validation.jsonl", "picture_losses.jsonl"):
        rows = [_history(folder.path / log) for folder in (one, other)]
        yield Comparison(log, rows[0] == rows[1], f"{len(rows[0])} lines")


def _start(preset: Preset, steps: int, work: Path, name: str) -> subprocess.Popen[str]:
    values = preset.to_dict()
    values["name"] = name
    values["train"]["max_steps"] = 2 * steps
    values["save"]["every"] = steps
    values["sample"]["every"] = 0
    values["stop"]["mode"] = "off"
    if values["train"]["deterministic"] == "auto":
        values["train"]["deterministic"] = True
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return _emotrain("run", str(path), "--json", "--runs-dir", str(work / "runs"))


def _emotrain(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "emotrain", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait(process: subprocess.Popen[str], what: str) -> None:
    _, err = process.communicate()
    if process.returncode:
        lines = [line for line in err.splitlines() if line.strip()]
        raise CheckpointError(f"{what} ended with exit code {process.returncode}: {' '.join(lines[-3:])}")


def _kill_at(process: subprocess.Popen[str], step: int) -> None:
    """Kill the process at the first step after the checkpoint of `step` is committed."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("event") == "step" and event.get("step", 0) > step:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return
    _, err = process.communicate()
    raise CheckpointError(f"the run to be killed ended before step {step + 1}: {err.strip()[-300:]}")


def _tensors(what: str, one: Path, other: Path) -> Comparison:
    a, b = load_file(one), load_file(other)
    equal = a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
    apart = 0.0
    if not equal and a.keys() == b.keys():
        pairs = [(a[key], b[key]) for key in a if a[key].shape == b[key].shape and a[key].numel()]
        apart = max((float((one.double() - two.double()).abs().max()) for one, two in pairs), default=0.0)
    return Comparison(what, equal, f"{len(a)} tensors, {sum(t.numel() for t in a.values()):,} numbers", apart)


def _document(path: Path) -> Any:
    value = json.loads(path.read_text(encoding="utf-8"))["value"]
    if path.name == "state.json":
        return {key: inner for key, inner in value.items() if key not in FREE}
    return value


def _history(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_s", "memory_gib")} for row in rows]
