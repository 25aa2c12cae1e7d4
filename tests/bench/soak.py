"""Many interrupted runs in one process: every end is the same, and memory does not grow.

python tests/bench/soak.py --work /tmp/soak [--runs 50] [--steps 40] [--minutes 60] [--report docs/benchmarks/soak.md]

A run loads its model, trains and is interrupted up to three times at random steps: by Ctrl-C, by SIGTERM, by an
exception out of an observer (a crash), or it begins in a forked child that is killed (SIGKILL). Each time it is resumed
in this process by the function that `emotrain resume` calls. Afterwards, with the garbage collected, this process's
resident memory, open files, threads and live tensors are noted. A later call goes on where the last one stopped; memory
is compared within one process.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kill_line import wait
from kill_resume import commit, pictures, read
from kill_worker import NAME, done_digest, in_child

from emotrain.config.load import load
from emotrain.config.schema import Preset
from emotrain.errors import ExitCode
from emotrain.runs import start
from emotrain.runs.folder import RunFolder
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.events import Event, StepEnd

PRESET = """
model: builtin:tiny-sd
dataset:
  folders: [{{path: {pictures}}}]
  trigger: inkmoji
  resolution: 64
  buckets: {{step: 16, min: 48, max: 64}}
  captions: {{shuffle: true, dropout: 0.2, variants: 2}}
network: {{rank: 4, alpha: 4, targets: attn}}
train: {{max_steps: {steps}, micro_batch_size: 2}}
save: {{every: 10, keep_last: 2}}
validate: {{every: 10, fraction: 0.1}}
sample: {{every: 20, steps: 1, prompts: ["[trigger], rocket"]}}
stop: {{mode: "off"}}
"""
KINDS = ("ctrl-c", "sigterm", "crash", "kill -9")
WARM = 10  # runs after which libraries have made their caches


class Crash(Exception):
    """What an observer with a bug would raise."""


class Interrupt:
    """Ends a run at a step, in one of the ways."""

    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step = kind, step

    def handle(self, event: Event) -> None:
        if not isinstance(event, StepEnd) or event.step != self.step:
            return
        if self.kind == "crash":
            raise Crash
        numbers = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM, "kill -9": signal.SIGKILL}
        os.kill(os.getpid(), numbers[self.kind])

    def close(self) -> None:
        pass


def session(preset: Preset, runs_dir: Path, observers: tuple[Interrupt, ...]) -> int:
    """A run, or a resume where there is something to resume; its exit code, -1 for a crash."""
    folder = RunFolder(runs_dir / NAME)
    try:
        if CheckpointStore(folder.checkpoints_dir).steps():
            return start.resume(folder, preset, observers=observers).exit_code
        shutil.rmtree(folder.path, ignore_errors=True)
        return start.run(preset, runs_dir=runs_dir, observers=observers).exit_code
    except Crash:
        return -1


def one_run(preset: Preset, runs_dir: Path, plan: list[tuple[str, int]]) -> list[str]:
    """A run with its interruptions, to its end; what has happened, in words."""
    shutil.rmtree(runs_dir, ignore_errors=True)
    runs_dir.mkdir(parents=True)
    happened = []
    codes = {"ctrl-c": ExitCode.INTERRUPTED, "sigterm": ExitCode.TERMINATED, "crash": -1, "kill -9": -signal.SIGKILL}
    for kind, step in plan:
        watch = (Interrupt(kind, step),)
        if kind == "kill -9":
            code = wait(in_child(lambda seen=watch: session(preset, runs_dir, seen)))
        else:
            code = session(preset, runs_dir, watch)
        assert code == codes[kind], f"{kind} at step {step} ended with {code}"
        happened.append(f"{kind} at {step}")
    code = session(preset, runs_dir, ())
    assert code == ExitCode.OK, f"the last part ended with {code}"
    return happened


def plan_of(index: int, steps: int) -> list[tuple[str, int]]:
    """Up to three interruptions at rising steps; none in the first run."""
    chance = random.Random(f"soak/{index}")
    count = chance.randrange(4) if index else 0
    at = sorted(chance.sample(range(1, steps), count))
    return [(chance.choice(KINDS), step) for step in at]


def result_of(run: Path) -> dict[str, str]:
    """Digests of the files and the last checkpoint."""
    parts = done_digest(run)
    for name in ("lora.safetensors", "lora-last.safetensors"):
        parts[f"{name}, bytes"] = hashlib.sha256((run / name).read_bytes()).hexdigest()
    return parts


def memory() -> dict[str, float]:
    """What this process holds, after a collection."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tensors": len(tensors),
        "tensor_mib": sum(t.numel() * t.element_size() for t in tensors) / 2**20,
    }


def slope(values: list[float]) -> tuple[float, float]:
    """Least-squares growth per run, and twice its standard error."""
    x = np.arange(len(values), dtype=float)
    x -= x.mean()
    y = np.asarray(values) - np.mean(values)
    growth = float((x * y).sum() / (x * x).sum())
    rest = y - growth * x
    return growth, 2 * float(np.sqrt((rest @ rest) / (len(values) - 2) / (x @ x)))


def page(rows: list[dict[str, Any]], steps: int, notes: list[str]) -> str:
    """The report."""
    process = max({row["process"] for row in rows}, key=lambda p: sum(row["process"] == p for row in rows))
    own = [row for row in rows if row["process"] == process]
    late = own[WARM:]
    kinds = {kind: sum(word.startswith(kind) for row in rows for word in row["happened"]) for kind in KINDS}
    lines = [HEAD.strip().format(runs=len(rows), steps=steps), ""]
    same = sum(row["same"] for row in rows)
    words = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    calm = sum(not row["happened"] for row in rows)
    lines.append(f"- **{same} of {len(rows)} runs ended with the same files.** {words}; {calm} were not interrupted.")
    for key, name, unit in (("rss_mib", "resident memory", " MiB"), ("tensors", "live tensors", ""),
                            ("files", "open files", ""), ("threads", "threads", "")):  # fmt: skip
        values = [row[key] for row in late]
        growth, error = slope(values)
        lines.append(
            f"- {name}: {values[0]:.0f}{unit} after run {WARM + 1}, {values[-1]:.0f}{unit} after run {len(own)}; "
            f"growth {growth:+.3f} ± {error:.3f}{unit} a run"
        )
    lines += [
        "",
        f"Memory is that of the {len(own)} runs of one process; the first {WARM}, in which libraries fill their",
        "caches, are left out of the growth.",
        *notes,
        "",
        "| run | interrupted by | resident MiB | tensors | files | same end |",
        "|---:|---|---:|---:|---:|---|",
    ]
    for row in rows:
        words = ", ".join(row["happened"]) or "-"
        end = "yes" if row["same"] else f"NO: {', '.join(row['differs'])}"
        lines.append(
            f"| {row['run'] + 1} | {words} | {row['rss_mib']:.0f} | {row['tensors']} | {row['files']} | {end} |"
        )
    versions = sorted({row["commit"] for row in rows})
    lines += ["", f"torch {torch.__version__}, Linux, CPU, one thread; commit {', '.join(versions)}."]
    return "\n".join(lines) + "\n"


HEAD = """
# A soak

`tests/bench/soak.py`: {runs} runs of {steps} steps each of tiny-sd in one process, each interrupted up to three times
at random steps and resumed. "The same files" means: both LoRA files to the byte, the last checkpoint (adapter, best
adapter, optimizer and emotion, stop rule, counters, random states), the logs without their times, and the sample
pictures equal those of the first run, which is not interrupted. Memory is what the system counts as resident (VmRSS),
read after each run when the garbage has been collected; nothing else is done to give memory back.
"""


def main() -> None:
    """Run what is missing, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--note", action="append", default=[], help="a line for the report")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would runs
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.jsonl"
    rows = read(results)
    source = options.work / "pictures"
    pictures(source) if not source.exists() else None
    path = options.work / "preset.yaml"
    path.write_text(PRESET.format(pictures=source, steps=options.steps))
    preset = load(str(path), (), NAME).preset
    until = time.monotonic() + 60 * options.minutes
    for index in range(len(rows), options.runs):
        if time.monotonic() > until:
            break
        runs_dir = options.work / f"run-{index}"
        happened = one_run(preset, runs_dir, plan_of(index, options.steps))
        result = result_of(runs_dir / NAME)
        first = rows[0]["result"] if rows else result
        differs = sorted(key for key in result.keys() | first.keys() if result.get(key) != first.get(key))
        row = {"run": index, "process": os.getpid(), "happened": happened, "same": not differs, "differs": differs}
        row |= {"result": result, "commit": commit(), **memory()}
        rows.append(row)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{time.strftime('%H:%M')} run {index + 1}: {row['rss_mib']:.0f} MiB, {happened}, same {row['same']}",
            flush=True,
        )
        shutil.rmtree(runs_dir)
    if options.report and len(rows) > WARM + 2:
        options.report.write_text(page(rows, options.steps, options.note))


if __name__ == "__main__":
    main()
