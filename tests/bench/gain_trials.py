"""Is the unit of LR 1.0 right? EmoSens with `train.gain` auto and fixed, beside AdamW, Prodigy and others.

    python tests/bench/styles.py STYLES
    python tests/bench/third_base.py WORK
    python tests/bench/gain_trials.py --styles STYLES --third WORK/third [--kept FILE.jsonl] [--report docs/benchmarks]
    python tests/bench/gain_trials.py --kept-only --report docs/benchmarks      the tables anew, of gain_trials.jsonl

A task is model:style:pictures; micro-batches of 4, rank 8, at most 1,000 steps, fewer where no validation was
better than the lowest one for 100 steps (EmoSens: where its own stop lies 100 steps back). "(cut)" is a row that the
ceiling ended before that. None of the styles was tuned on. The models are the two that are built in and a third,
trained differently (third_base.py); made anew that one is not the same to the last digit, and rows are compared where
the base's loss is within 0.1 %. Rows:

* gain auto, gain fixed: EmoSens at LR 1.0 as a run has it, with its own stop and a validation as often as a run has one
* adamw RATE, prodigy 1, schedulefree, prodigy-plus: constant, without an average of the weights; of 1e-4, 3e-4, 1e-3,
  3e-3 and 1e-2 those from 3e-3 outwards, until one is worse than its neighbour; Prodigy with bias correction and
  safeguard; prodigy-plus-schedule-free 2.0.1 (its package is not among the project's) with its defaults
* adamw, cosine: a schedule over as many steps as the best constant rate took, at that rate: what a user could have who
  knew both
* emocats, emoairy: "gain fixed" is what a run does with them; "gain auto from 1" is a trial with the measured unit,
  begun at the published length
* lokr: a LoKr in place of the LoRA, beside AdamW with a LoKr
* flipped: trials that hear three flipped training pictures in place of those held out

The loss is that of 64 held-out pictures, for the LoRA that is handed over: that of the lowest validation (3 pictures
that are not trained on), for EmoSens of those before its own stop, for the others of all steps: they are given the best
stop that the validation can tell. "of the gain" is the distance to the best AdamW row of the task and seed, as a share
of what that gained over the base: above zero is better. "regret" is the distance to the lowest held-out loss of the
row's own steps, as a share of what that gained; "steps" are those of the whole run over the step of that lowest loss.
"passes" are the forward passes of the whole run, validations counted, over those of the best AdamW up to the LoRA that
is handed over, its rate and number of steps being known. "step lengths" are multiples of the published one. All rows
are kept in gain_trials.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from by_hand import write_report
from gain_rows import (
    AFTER,
    KEPT,
    POLICIES,
    PRODIGYPLUS,
    RULE,
    STEPS,
    Policy,
    kept,
    next_rate,
    rivals_of,
    tables,
    whole,
)
from heldout import Bench
from longrun import Cell, LongRun, Task
from styles import STYLES, TUNED_ON
from third_base import SETS
from torch import Tensor

from emotrain.optim.stock import StockOptimizer
from emotrain.pulse import gain as pulse_gain
from emotrain.pulse.gain import START, Gain
from emotrain.pulse.stopping import StopRule
from emotrain.runs import build
from emotrain.train.events import StepEnd
from emotrain.train.loop import Limits, Parts, fit
from emotrain.train.state import TrainState
from emotrain.train.validation import Validation

UNSEEN = [style for style in STYLES if style not in TUNED_ON]
BUILT_IN = [
    f"{('tiny-sd', 'tiny-flux')[(place + other) % 2]}:{style}:{10 if style in ('poster', 'hatched') else 32}"
    for other in (0, 1)
    for place, style in enumerate(UNSEEN)
]
THIRD = [
    f"third:{kind}-{style}:{10 if style in ('poster', 'hatched') else 32}"
    for kind, style in zip([*SETS, *SETS], UNSEEN, strict=True)
]
TASKS = [*BUILT_IN, *THIRD]
COMMAND = "python tests/bench/gain_trials.py --styles STYLES --third WORK/third --seeds 0 1"
RIVALS_EVERY = 20  # steps between two validations of those that do not end by themselves
DEFAULT = ("adamw", "gain auto", "gain fixed", "adamw, cosine", "prodigy 1", "schedulefree 0.0025")


class Watched(StopRule):
    """The product's rule, which notes where it would end the run and lets it go on for a while."""

    own_stop = True
    ceiling = STEPS
    ended: tuple[int, int] | None = None  # the step, and the step of the LoRA that is handed over

    def decide(self, step: int) -> str | None:
        """A sentence `AFTER` steps beyond the end."""
        if self.ended is None and super().decide(step):
            self.ended = (step, self.best_step or 0)
        last = self.best_step or 0
        if self.own_stop:
            last = self.ended[0] if self.ended else self.ceiling
        return "enough was seen" if step >= last + AFTER else None


class Keeping:
    """A validation that keeps its losses and the weights it was taken with."""

    def __init__(self, place: Place, state: TrainState, inner: Validation) -> None:
        self.place, self.state, self.inner = place, state, inner
        self.losses: dict[int, float] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def pictures(self, progress: object = None) -> list[float]:
        """Their losses."""
        step, losses = self.state.step, self.inner.pictures()
        self.losses[step], self.weights[step] = fmean(losses), self.place.run.model.adapter.state()
        return losses

    def drift(self) -> float:
        """Not measured."""
        return 0.0


class Place:
    """One task with one seed: the model, its pictures and the LoRA to begin with, built once for all rows."""

    def __init__(self, name: str, seed: int, network: str, args: argparse.Namespace) -> None:
        self.name, self.seed = name, seed
        model, style, count = name.split(":")
        if style in ("ink", "signs"):
            task = Task(model, style, int(count))
        else:
            base = str(args.third) if model == "third" else model
            found = Task.of_folders(base, args.styles / style / "train", args.styles / style / "heldout")
            task = replace(found, pictures=int(count))
        self.cell = Cell(task, seed=seed, network=network)
        self.run = LongRun(self.cell, args.work)
        self.run._build()
        self.first = self.run.model.adapter.state()
        self.bench = Bench(task.model, task.heldout_folder(), self.run.model.family)
        self.base = self.true(self.first)

    def true(self, weights: dict[str, Tensor], draws: int = 4) -> float:
        """Held-out loss, all pictures."""
        self.run.model.adapter.load_state(weights)
        return float(self.bench.losses(draws=draws).mean())

    def measure(self, policy: Policy, rows: Sequence[dict[str, Any]], ceiling: int = STEPS) -> dict[str, Any]:
        """Train and judge one row; `rows` has those of AdamW where the policy needs them."""
        run, own, limit, rate, started = self.run, policy.own, ceiling, policy.lr, time.process_time()
        if policy.cosine:
            rivals = rivals_of(self.name, self.seed, rows)
            rate = min(rivals, key=lambda rate: float(rivals[rate]["true"]))
            limit = rivals[rate]["chosen"]
        # START times the length; a run of emosens does that itself
        scaled = policy.gain == "auto" and policy.optimizer != "emosens"
        cell = replace(self.cell, optimizer=policy.optimizer, lr=(rate or 1.0) * START if scaled else rate, ema=own)
        cell = replace(cell, gain=policy.gain)
        preset = cell.preset(run.folder / "train", run.folder / "validation")
        run.model.adapter.load_state(self.first)
        optimizer = build.build_optimizer_of(preset, run.model.adapter.parameters())
        if policy.name == PRODIGYPLUS:
            package = importlib.import_module("prodigyplus.prodigy_plus_schedulefree")
            optimizer = StockOptimizer(PRODIGYPLUS, package.ProdigyPlusScheduleFree(run.model.adapter.parameters()))
        state = TrainState()
        gain = Gain() if policy.gain == "auto" else None
        rule = Watched(held_out=not policy.flipped, gain=gain)
        rule.own_stop, rule.ceiling = own, ceiling
        every = self.every(policy) if own else RIVALS_EVERY
        validation = Keeping(self, state, run.validation.flipped if policy.flipped else run.validation.held)
        plain = Keeping(self, state, run.plain_validation) if policy.flipped and run.plain_validation else None

        def turn(event: Any) -> None:
            if policy.cosine and isinstance(event, StepEnd):
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * min(event.step / limit, 1.0)))

        parts = Parts(
            family=run.model.family, objective=run.model.objective, adapter=run.model.adapter, optimizer=optimizer,
            data=run.data, stop_rule=rule, loss_baseline=run.loss_baseline, validation=validation,  # type: ignore[arg-type]
            notify=turn, save=lambda state: None, sample=lambda step: None,
            interrupted=lambda: False, plain_validation=plain,  # type: ignore[arg-type]
        )  # fmt: skip
        with patch.object(pulse_gain, "SURE", policy.sure):
            fit(parts, Limits(limit, 1, 1.0, self.seed, every, 10**9, 0), state)
        row: dict[str, Any] = {"task": self.name, "seed": self.seed, "policy": policy.name, "base": self.base}
        row |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "ceiling": ceiling, "every": every, "steps": state.step}
        chosen = (rule.ended[1] if rule.ended else rule.best_step or 0) if own else best_of(validation.losses)
        row |= {"chosen": chosen, "true": self.true(validation.weights[chosen])}
        if own:
            oracle, lowest = self.lowest(validation.weights, chosen)
            if lowest > row["true"]:  # with more draws
                oracle, lowest = chosen, row["true"]
            row |= {"stopped": rule.ended[0] if rule.ended else state.step, "ended": rule.ended is not None}
            row |= {"oracle": oracle, "lowest": lowest, "reached": reached(validation.losses, row["stopped"])}
        if rule.gain is not None:
            row |= {"rule": RULE, "changes": rule.gain.changes}
        rounded = {key: round(value, 7) if isinstance(value, float) else value for key, value in row.items()}
        return {**rounded, "cpu_s": round(time.process_time() - started)}

    def every(self, policy: Policy) -> int:
        """Steps between two validations, as a run of EmoSens has them."""
        cell = replace(self.cell, gain=policy.gain)
        preset = cell.preset(self.run.folder / "train", self.run.folder / "validation", every="auto")
        return build.validate_every(preset, 0 if policy.flipped else 3)

    def lowest(self, weights: dict[int, dict[str, Tensor]], also: int) -> tuple[int, float]:
        """Step and value of the lowest held-out loss, by halving around the lowest of seven (and `also`)."""
        steps = sorted(weights)
        known: dict[int, float] = {}
        around = sorted({also, *(steps[round(i * (len(steps) - 1) / 6)] for i in range(7))})
        while around:
            known |= {step: self.true(weights[step], draws=1) for step in around if step not in known}
            best, seen = min(known, key=known.__getitem__), sorted(known)
            place = seen.index(best)
            left = [s for s in steps if (seen[place - 1] if place else best) < s < best]
            right = [s for s in steps if best < s < (seen[place + 1] if place + 1 < len(seen) else best)]
            around = [side[len(side) // 2] for side in (left, right) if side]
        return best, self.true(weights[best])


def reached(losses: dict[int, float], stopped: int) -> int:
    """The first step whose validation is within 1 % of what the validation gained in all, up to the run's end."""
    means = {step: loss for step, loss in losses.items() if step <= stopped}
    least = min(means.values())
    return min(step for step, loss in means.items() if loss <= least + 0.01 * (means[0] - least))


def best_of(losses: dict[int, float]) -> int:
    """The step of the lowest validation."""
    return min(losses, key=losses.__getitem__)


def next_policy(
    task: str, seed: int, network: str, rows: Sequence[dict[str, Any]], wanted: Sequence[str]
) -> Policy | None:
    """The row to train next, None when there are all: AdamW's rates first, since others are compared with them."""
    done = [row["policy"] for row in rows if (row["task"], row["seed"]) == (task, seed)]
    rest = [p for p in POLICIES if p.name in wanted and p.network == network and p.name not in done]
    if "adamw" in wanted and (rest or network == "lora"):
        rate = next_rate(rivals_of(task, seed, rows, network))
        rest += [p for p in POLICIES if p.optimizer == "adamw" and p.network == network and p.lr == rate and rate]
    rest.sort(key=lambda policy: policy.optimizer != "adamw" or policy.cosine)
    return rest[0] if rest else None


def main() -> None:
    """Train what is not kept yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", type=Path, default=Path("styles"), help="the folder that styles.py made")
    parser.add_argument("--third", type=Path, default=Path("third"), help="the folder that third_base.py made")
    parser.add_argument("--kept", type=Path, default=KEPT)
    parser.add_argument("--work", type=Path, default=Path("bench-cells"))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--policies", nargs="+", default=DEFAULT, help="adamw: its rates, as many as are needed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="the ceiling")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--kept-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = kept(args.kept)
    networks = list(dict.fromkeys(policy.network for policy in POLICIES))
    places = [(task, seed, network) for task in args.tasks for seed in args.seeds for network in networks]
    for task, seed, network in [] if args.kept_only else places:
        place = None
        while policy := next_policy(task, seed, network, whole(found.values(), args.steps), args.policies):
            place = place or Place(task, seed, network, args)
            row = place.measure(policy, list(found.values()), args.steps)
            found[task, seed, policy.name] = row
            with args.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(task, seed, policy.name, f"{row['true']:.4f}", f"{row['cpu_s']} s", flush=True)
    rows = list(found.values())
    print("\n".join(tables([row for row in rows if row["task"] in args.tasks])))
    if args.report:
        write_report(args.report / "gain_trials.md", [*head(), *tables(rows)])


def head() -> list[str]:
    """What stands above the report's tables."""
    about = (__doc__ or "").split("\n\n", 2)[2].splitlines()
    return ["# The unit of LR 1.0, measured", "", f"`{COMMAND}`", "", *about, ""]


if __name__ == "__main__":
    main()
