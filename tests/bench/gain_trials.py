"""Is the unit of LR 1.0 right? EmoSens with `train.gain` auto and fixed, beside AdamW and Prodigy.

    python tests/bench/styles.py STYLES
    python tests/bench/gain_trials.py --styles STYLES [--kept FILE.jsonl] [--report docs/benchmarks]

A task is model:style:pictures; micro-batches of 4, rank 8, at most 400 steps, fewer where no validation was better than
the lowest one for 100 steps (EmoSens: where its own stop lies 100 steps back). Its rows:

* gain auto, gain fixed: EmoSens at LR 1.0 as a run has it, with its own stop and a validation as often as a run has one
* adamw RATE, prodigy 1: constant, without an average of the weights; Prodigy with bias correction and safeguard

"handed over" is the held-out loss of the LoRA of the lowest validation (3 pictures that are not trained on), for
EmoSens of those before its own stop, for the others of all steps: they are given the best stop that the validation can
tell. "of the gain" is the distance to the best AdamW row of the task, as a share of what that gained over the base:
above zero is better. "regret" is the distance to the lowest held-out loss of the row's own steps, as a share of
what that gained; "steps" are those of the whole run over the step of that lowest loss. "flipped" rows hear three
flipped training pictures in place of those held out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from heldout import Bench
from longrun import Cell, LongRun, Task
from styles import STYLES, TUNED_ON
from torch import Tensor

from emotrain.pulse.gain import Gain
from emotrain.pulse.stopping import StopRule
from emotrain.runs import build
from emotrain.train.loop import Limits, Parts, fit
from emotrain.train.state import TrainState

STEPS = 400
AFTER = 100  # steps beyond the end, or beyond the lowest validation
UNSEEN = [style for style in STYLES if style not in TUNED_ON]
TASKS = [
    f"{('tiny-sd', 'tiny-flux')[(place + other) % 2]}:{style}:{10 if style in ('poster', 'hatched') else 32}"
    for other in (0, 1)
    for place, style in enumerate(UNSEEN)
]


@dataclass(frozen=True)
class Policy:
    """One row."""

    name: str
    optimizer: str = "emosens"
    lr: float | None = None
    gain: str = "fixed"
    flipped: bool = False
    every: int = 20


POLICIES = (
    Policy("gain auto", gain="auto", every=10),
    Policy("gain fixed"),
    *(Policy(f"adamw {rate:g}", "adamw", rate) for rate in (3e-4, 1e-3, 3e-3)),
    Policy("prodigy 1", "prodigy", 1.0),
    Policy("gain auto, flipped", gain="auto", flipped=True, every=20),
    Policy("gain fixed, flipped", flipped=True, every=30),
)


class Watched(StopRule):
    """The product's rule, which notes where it would end the run and lets it go on for a while."""

    own_stop = True
    ended: tuple[int, int] | None = None  # the step, and the step of the LoRA that is handed over

    def decide(self, step: int) -> str | None:
        """A sentence `AFTER` steps beyond the end."""
        if self.ended is None and super().decide(step):
            self.ended = (step, self.best_step or 0)
        last = self.best_step or 0
        if self.own_stop:
            last = self.ended[0] if self.ended else STEPS
        return "enough was seen" if step >= last + AFTER else None


class Keeping:
    """A validation that keeps the weights it was taken with."""

    def __init__(self, place: Place, state: TrainState, flipped: bool) -> None:
        self.place, self.state = place, state
        self.inner = place.run.validation.flipped if flipped else place.run.validation.held
        self.losses: dict[int, float] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def loss(self, progress: object = None) -> float:
        """Of the pictures."""
        self.weights[self.state.step] = self.place.run.model.adapter.state()
        self.losses[self.state.step] = self.inner.loss()
        return self.losses[self.state.step]

    def drift(self) -> float:
        """Not measured."""
        return 0.0


class Place:
    """One task with one seed: the model, its pictures and the LoRA to begin with, built once for all rows."""

    def __init__(self, name: str, seed: int, styles: Path, work: Path) -> None:
        self.name, self.seed = name, seed
        model, style, count = name.split(":")
        if style in ("ink", "signs"):
            task = Task(model, style, int(count))
        else:
            found = Task.of_folders(model, styles / style / "train", styles / style / "heldout")
            task = replace(found, pictures=int(count))
        self.cell = Cell(task, seed=seed)
        self.run = LongRun(self.cell, work)
        self.run._build()
        self.first = self.run.model.adapter.state()
        self.bench = Bench(model, task.heldout_folder())
        self.bench.wear(self.first)
        self.base = self.true(self.first)

    def true(self, weights: dict[str, Tensor], draws: int = 4) -> float:
        """Held-out loss, all pictures."""
        self.bench.adapter.load_state(weights)
        return float(self.bench.losses(draws=draws).mean())

    def measure(self, policy: Policy) -> dict[str, Any]:
        """Train and judge one row."""
        run, own = self.run, policy.optimizer == "emosens"
        cell = replace(self.cell, optimizer=policy.optimizer, lr=policy.lr, ema=own, gain=policy.gain)
        preset = cell.preset(run.folder / "train", run.folder / "validation")
        run.model.adapter.load_state(self.first)
        optimizer = build.build_optimizer_of(preset, run.model.adapter.parameters())
        state = TrainState()
        rule = Watched(held_out=not policy.flipped, gain=Gain() if policy.gain == "auto" else None)
        rule.own_stop = own
        validation: Any = Keeping(self, state, policy.flipped)

        parts = Parts(
            family=run.model.family, objective=run.model.objective, adapter=run.model.adapter, optimizer=optimizer,
            data=run.data, stop_rule=rule, loss_baseline=run.loss_baseline, validation=validation,
            notify=lambda event: None, save=lambda state: None, sample=lambda step: None, record=lambda *row: None,
            interrupted=lambda: False, plain_validation=run.plain_validation if policy.flipped else None,
        )  # fmt: skip
        fit(parts, Limits(STEPS, 1, 1.0, self.seed, policy.every, 10**9, 0), state)
        row: dict[str, Any] = {"task": self.name, "seed": self.seed, "policy": policy.name, "base": self.base}
        if not own:
            chosen = min(validation.losses, key=validation.losses.__getitem__)
            return {**row, "chosen": chosen, "true": self.true(validation.weights[chosen])}
        stopped, chosen = rule.ended or (STEPS, rule.best_step or 0)
        true = self.true(validation.weights[chosen])
        oracle, lowest = self.lowest(validation.weights, chosen)
        if lowest > true:  # with more draws
            oracle, lowest = chosen, true
        row |= {"chosen": chosen, "true": true, "stopped": stopped}
        row |= {"ended": rule.ended is not None, "oracle": oracle, "lowest": lowest}
        if rule.gain is not None:
            row |= {"gain": rule.gain.summary()}
        return row

    def lowest(self, weights: dict[int, dict[str, Tensor]], also: int) -> tuple[int, float]:
        """Step and value of the lowest held-out loss, by halving around the lowest of seven (and `also`)."""
        steps = sorted(weights)
        known: dict[int, float] = {}
        around = sorted({also, *(steps[round(i * (len(steps) - 1) / 6)] for i in range(7))})
        while around:
            known |= {step: self.true(weights[step], draws=2) for step in around if step not in known}
            best, seen = min(known, key=known.__getitem__), sorted(known)
            place = seen.index(best)
            left = [s for s in steps if (seen[place - 1] if place else best) < s < best]
            right = [s for s in steps if best < s < (seen[place + 1] if place + 1 < len(seen) else best)]
            around = [side[len(side) // 2] for side in (left, right) if side]
        return best, self.true(weights[best])


def share_of(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """Distance to the best AdamW of the row's task and seed, as a share of that one's gain."""
    rivals = [r for r in rows if (r["task"], r["seed"]) == (row["task"], row["seed"])]
    losses = [r["true"] for r in rivals if r["policy"].startswith("adamw")]
    return (min(losses) - row["true"]) / (row["base"] - min(losses)) if losses else None


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per task and policy."""
    lines = ["| task | row | handed over @ step | of the gain | ended | lowest @ step | regret | steps |"]
    lines.append("|" + " --- |" * 8)
    for row in rows:
        share = share_of(row, rows)
        words = f"| {row['task']} | {row['policy']} | {row['true']:.4f} @ {row['chosen']} |"
        words += f" {share:+.1%} |" if share is not None else " - |"
        if "stopped" in row:
            regret = (row["true"] - row["lowest"]) / (row["base"] - row["lowest"])
            ended = row["stopped"] if row["ended"] else "-"
            steps = f"{row['stopped'] / max(row['oracle'], 1):.2f}"
            words += f" {ended} | {row['lowest']:.4f} @ {row['oracle']} | {regret:.1%} | {steps} |"
        else:
            words += " - | - | - | - |"
        lines.append(words)
    return lines


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per policy."""
    heads = "row | tasks | of the gain: mean | worst | best | regret: median | worst | steps: median | run's steps"
    lines = [f"| {heads} |", "|" + " --- |" * 9]
    for policy in POLICIES:
        own = [row for row in rows if row["policy"] == policy.name]
        shares = [share for row in own if (share := share_of(row, rows)) is not None]
        if not shares:
            continue
        line = (
            f"| {policy.name} | {len(own)} | {statistics.mean(shares):+.1%} | {min(shares):+.1%} | {max(shares):+.1%} |"
        )
        if "stopped" in own[0]:
            regrets = [(row["true"] - row["lowest"]) / (row["base"] - row["lowest"]) for row in own]
            ratios = [row["stopped"] / max(row["oracle"], 1) for row in own]
            used = [row["stopped"] for row in own]
            line += f" {statistics.median(regrets):.1%} | {max(regrets):.1%} | {statistics.median(ratios):.2f} |"
            line += f" {statistics.median(used):.0f} ({min(used)} to {max(used)}) |"
        else:
            line += f" - | - | - | {STEPS} |"
        lines.append(line)
    return lines


def main() -> None:
    """Train what is not kept yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", type=Path, required=True)
    parser.add_argument("--kept", type=Path, default=Path("gain-trials.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("bench-cells"))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--policies", nargs="+", default=[policy.name for policy in POLICIES[:6]])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--report", type=Path)
    parser.add_argument("--kept-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.kept.read_text().splitlines()] if args.kept.exists() else []
    done = {(row["task"], row["seed"], row["policy"]) for row in rows}
    for task, seed in ((task, seed) for task in args.tasks for seed in args.seeds if not args.kept_only):
        wanted = [p for p in POLICIES if p.name in args.policies and (task, seed, p.name) not in done]
        place = Place(task, seed, args.styles, args.work) if wanted else None
        for policy in wanted:
            assert place is not None
            rows.append(place.measure(policy))
            with args.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    order = {policy.name: place for place, policy in enumerate(POLICIES)}
    rows = [row for row in rows if row["task"] in args.tasks and row["policy"] in order]
    rows.sort(key=lambda row: (args.tasks.index(row["task"]), row["seed"], order[row["policy"]]))
    lines = [*summary(rows), "", *table(rows)]
    print("\n".join(lines))
    if args.report:
        about = (__doc__ or "").split("\n\n", 2)[2].splitlines()
        head = [
            "# The unit of LR 1.0, measured",
            "",
            "`python tests/bench/gain_trials.py --styles STYLES`",
            "",
            *about,
            "",
        ]
        (args.report / "gain_trials.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
