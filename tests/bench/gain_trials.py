"""Is the unit of LR 1.0 right? A gain on the emotion's step length, lowered where validations stop improving.

    python tests/bench/styles.py STYLES
    python tests/bench/gain_trials.py --styles STYLES [--kept FILE.jsonl] [--tasks tiny-sd:mosaic:32 ...] [--seeds 0 1]

Rows of a task (model:style:pictures, micro-batches of 4, 400 steps at most unless said):
  emosens 1        as a run has it today, LR 1.0
  adamw RATE       constant rate, no average, lowest validation
  trial g/s        EmoSens begun at `lr` g; where `patience` validations in a row are no better than the best so far,
                   the best weights are put back and the gain is multiplied by s; the second time that this brings less
                   than 0.5 % of the gain over the base, the run ends
The weights of the lowest validation loss (3 pictures that are not trained on) are measured on the held-out pictures.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from heldout import Bench
from longrun import Cell, LongRun, Task

from emotrain.pulse.stopping import StopRule
from emotrain.train.loop import Limits, Parts, train_step
from emotrain.train.state import TrainState

TASKS = (
    "tiny-sd:ink:32", "tiny-flux:ink:32", "tiny-sd:signs:8", "tiny-flux:signs:8", "tiny-sd:mosaic:32",
    "tiny-sd:stained:32", "tiny-sd:duotone:10", "tiny-flux:blueprint:32", "tiny-flux:thermal:10",
)  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """One row; `gain` 0 is a constant rate."""

    name: str
    optimizer: str = "emosens"
    lr: float | None = None
    gain: float = 0.0
    shrink: float = 1.0
    every: int = 20
    patience: int = 1
    max_steps: int = 400


POLICIES = (
    Policy("emosens 1"),
    *(Policy(f"adamw {rate:g}", "adamw", rate) for rate in (3e-4, 1e-3, 3e-3)),
    Policy("trial 3/0.33", gain=3.0, shrink=0.33, every=10, patience=2, max_steps=500),
    Policy("trial 3/0.5", gain=3.0, shrink=0.5, max_steps=600),
    Policy("trial 8/0.33", gain=8.0, shrink=0.33),
)


def task_of(name: str, styles: Path) -> Task:
    """model:style:pictures."""
    model, style, count = name.split(":")
    if style in ("ink", "signs"):
        return Task(model, style, int(count))
    found = Task.of_folders(model, styles / style / "train", styles / style / "heldout")
    return replace(found, pictures=int(count))


class Trial:
    """The gain of one run, and when it has brought all that it can."""

    def __init__(self, policy: Policy, run: LongRun, base: float) -> None:
        self.policy, self.run, self.gain = policy, run, policy.gain
        self.base = self.best = self.mark = base
        self.failed = self.vain = 0
        self._set()

    def _set(self) -> None:
        if self.policy.gain:
            for group in self.run.optimizer.param_groups:
                group["scope"] = self.gain

    def ends(self, loss: float, best_state: dict[str, torch.Tensor]) -> bool:
        """Take in a validation loss; whether the run is done."""
        if loss < self.best:
            self.best, self.failed = loss, 0
            return False
        self.failed += 1
        if not self.policy.gain or self.failed < self.policy.patience:
            return False
        self.failed = 0
        gained = self.mark - self.best > 0.005 * (self.base - self.best)
        self.vain = 0 if gained else self.vain + 1
        self.mark = self.best
        if self.vain == 2:
            return True
        self.gain *= self.policy.shrink
        self._set()
        self.run.model.adapter.load_state(best_state)
        self.run.optimizer.steps, self.run.optimizer._average = 0, []
        return False


def measure(name: str, seed: int, policy: Policy, styles: Path, work: Path) -> dict[str, Any]:
    """Train one cell and measure the weights of its lowest validation loss."""
    task = task_of(name, styles)
    own = policy.optimizer == "emosens"
    cell = Cell(task, micro_batch=4, seed=seed, optimizer=policy.optimizer, lr=policy.lr, ema=own)
    run = LongRun(cell, work)
    run._build()
    state: TrainState = run.state
    parts: Any = Parts(
        family=run.model.family, objective=run.model.objective, adapter=run.model.adapter, optimizer=run.optimizer,
        data=run.data, stop_rule=StopRule("off"), loss_baseline=run.loss_baseline, validation=None,
        notify=lambda event: None, save=lambda state: None, sample=lambda step: None, record=lambda *words: None,
        interrupted=lambda: False,
    )  # fmt: skip
    limits = Limits(policy.max_steps, 1, 1.0, seed, policy.every, 10**9, 0)
    if run.loss_baseline.start is not None:
        run.optimizer.begin(run.loss_baseline.start)

    def validated() -> tuple[float, dict[str, torch.Tensor]]:
        with run.optimizer.eval_mode():
            return run.validation.held.loss(), run.model.adapter.state()

    base, first = validated()
    best, best_state, best_step = base, first, 0
    trial = Trial(policy, run, base)
    while state.step < policy.max_steps and not state.guard.diverged:
        if train_step(parts, limits, state) is None or state.step % policy.every:
            continue
        loss, weights = validated()
        if loss < best:
            best, best_state, best_step = loss, weights, state.step
        if trial.ends(loss, best_state):
            break
    bench = Bench(task.model, task.heldout_folder())
    bench.wear(best_state)
    losses = []
    for weights in (first, best_state):
        bench.adapter.load_state(weights)
        losses.append(float(bench.losses(draws=4).mean()))
    return {
        "task": name, "seed": seed, "policy": policy.name, "base": losses[0], "true": losses[1],
        "best_step": best_step, "steps": state.step,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line per task and policy; "of the gain" is the distance to the best AdamW row of the task."""
    lines = ["| task | policy | held-out loss @ step (steps run) | of the gain |", "| --- | --- | --- | --- |"]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        rivals = [row["true"] for row in own if row["policy"].startswith("adamw")]
        for policy in dict.fromkeys(row["policy"] for row in own):
            same = [row for row in own if row["policy"] == policy]
            shown = ", ".join(f"{row['true']:.4f} @ {row['best_step']} ({row['steps']})" for row in same)
            mean = sum(row["true"] for row in same) / len(same)
            share = f"{(min(rivals) - mean) / (same[0]['base'] - min(rivals)):+.1%}" if rivals else "-"
            lines.append(f"| {task} | {policy} | {shown} | {share} |")
    return lines


def main() -> None:
    """Train what is not kept yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", type=Path, required=True)
    parser.add_argument("--kept", type=Path, default=Path("gain-trials.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("bench-cells"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--policies", nargs="+", default=[policy.name for policy in POLICIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.kept.read_text().splitlines()] if args.kept.exists() else []
    done = {(row["task"], row["seed"], row["policy"]) for row in rows}
    for task in args.tasks:
        for policy in (policy for policy in POLICIES if policy.name in args.policies):
            for seed in args.seeds:
                if (task, seed, policy.name) not in done:
                    rows.append(measure(task, seed, policy, args.styles, args.work / policy.name.replace("/", "-")))
                    with args.kept.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    print("\n".join(table([row for row in rows if row["task"] in args.tasks])))


if __name__ == "__main__":
    main()
