"""Is the unit of LR 1.0 right? EmoSens with `train.gain` auto and fixed, beside AdamW, Prodigy and others.

    python tests/bench/styles.py STYLES
    python tests/bench/third_base.py WORK
    python tests/bench/gain_trials.py --styles STYLES --third WORK/third [--kept FILE.jsonl] [--report docs/benchmarks]

A task is model:style:pictures; micro-batches of 4, rank 8, at most 400 steps, fewer where no validation was better than
the lowest one for 100 steps (EmoSens: where its own stop lies 100 steps back). None of the styles was tuned on. The
models are the two that are built in and a third, trained differently (third_base.py). Rows:

* gain auto, gain fixed: EmoSens at LR 1.0 as a run has it, with its own stop and a validation as often as a run has one
* adamw RATE, prodigy 1, schedulefree: constant, without an average of the weights; of 1e-4, 3e-4, 1e-3, 3e-3 and 1e-2
  those from 3e-3 outwards, until one is worse than its neighbour; Prodigy with bias correction and safeguard
* adamw, cosine: a schedule over as many steps as the best constant rate took, at that rate: what a user could have who
  knew both
* emocats, emoairy: "gain fixed" is what a run does with them; "gain auto from 1" is a trial with the measured unit,
  begun at the published length
* lokr: a LoKr in place of the LoRA, beside AdamW with a LoKr

"handed over" is the held-out loss of the LoRA of the lowest validation (3 pictures that are not trained on), for
EmoSens of those before its own stop, for the others of all steps: they are given the best stop that the validation can
tell. "of the gain" is the distance to the best AdamW row of the task and seed, as a share of what that gained over the
base: above zero is better. "regret" is the distance to the lowest held-out loss of the row's own steps, as a share of
what that gained; "steps" are those of the whole run over the step of that lowest loss. "flipped" rows hear three
flipped training pictures in place of those held out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from heldout import Bench
from longrun import Cell, LongRun, Task
from safetensors.torch import save_file
from styles import STYLES, TUNED_ON
from third_base import SETS
from torch import Tensor

from emotrain.pulse.gain import START, Gain
from emotrain.pulse.stopping import StopRule
from emotrain.runs import build
from emotrain.train.events import StepEnd
from emotrain.train.loop import Limits, Parts, fit
from emotrain.train.state import TrainState
from emotrain.train.validation import Validation

STEPS = 400
AFTER = 100  # steps beyond the end, or beyond the lowest validation
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
COMMAND = "python tests/bench/gain_trials.py --styles STYLES --third WORK/third"
SAID = "## What it says"  # from here on the report is written by hand
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Policy:
    """One row."""

    name: str
    optimizer: str = "emosens"
    lr: float | None = None
    gain: str = "fixed"
    flipped: bool = False
    every: int = 20
    network: str = "lora"
    cosine: bool = False  # over the steps of the best constant rate's lowest validation, at that rate

    @property
    def own(self) -> bool:
        """Whether it ends by itself."""
        return self.optimizer.startswith("emo")


ADAMW = tuple(Policy(f"adamw {rate:g}", "adamw", rate) for rate in RATES)
POLICIES = (
    Policy("gain auto", gain="auto", every=10),
    Policy("gain fixed"),
    *ADAMW,
    Policy("adamw, cosine", "adamw", cosine=True),
    Policy("prodigy 1", "prodigy", 1.0),
    Policy("schedulefree 0.0025", "schedulefree", 2.5e-3),
    Policy("emocats, gain fixed", "emocats"),
    Policy("emoairy, gain fixed", "emoairy"),
    Policy("emocats, gain auto from 1", "emocats", lr=1.0 / START, gain="auto", every=10),
    Policy("emoairy, gain auto from 1", "emoairy", lr=1.0 / START, gain="auto", every=10),
    Policy("lokr, gain auto", gain="auto", every=10, network="lokr"),
    Policy("lokr, gain fixed", network="lokr"),
    *(replace(policy, name=f"lokr, {policy.name}", network="lokr") for policy in ADAMW),
    Policy("gain auto, flipped", gain="auto", flipped=True, every=20),
    Policy("gain fixed, flipped", flipped=True, every=30),
)


DEFAULT = ("adamw", "gain auto", "gain fixed", "adamw, cosine", "prodigy 1", "schedulefree 0.0025")


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
    """A validation that keeps its single losses and the weights it was taken with."""

    def __init__(self, place: Place, state: TrainState, inner: Validation) -> None:
        self.place, self.state, self.inner = place, state, inner
        self.losses: dict[int, float] = {}
        self.items: dict[int, list[float]] = {}  # losses of single pictures and draws
        self.weights: dict[int, dict[str, Tensor]] = {}

    def pictures(self, progress: object = None) -> list[float]:
        """Their losses."""
        step = self.state.step
        self.weights[step] = self.place.run.model.adapter.state()
        items = self.inner.losses()
        self.items[step] = [round(float(value), 7) for value in items]
        self.losses[step] = float(items.mean())
        return items.double().view(-1, self.inner.draws).mean(dim=1).tolist()

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

    def measure(self, policy: Policy, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Train and judge one row; `rows` has those of AdamW where the policy needs them."""
        run, own, limit, rate, started = self.run, policy.own, STEPS, policy.lr, time.process_time()
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
        state = TrainState()
        rule = Watched(held_out=not policy.flipped, gain=Gain() if policy.gain == "auto" else None)
        rule.own_stop = own
        validation = Keeping(self, state, run.validation.flipped if policy.flipped else run.validation.held)
        plain = Keeping(self, state, run.plain_validation) if policy.flipped and run.plain_validation else None

        def turn(event: Any) -> None:
            if policy.cosine and isinstance(event, StepEnd):
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * min(event.step / limit, 1.0)))

        parts = Parts(
            family=run.model.family, objective=run.model.objective, adapter=run.model.adapter, optimizer=optimizer,
            data=run.data, stop_rule=rule, loss_baseline=run.loss_baseline, validation=validation,  # type: ignore[arg-type]
            notify=turn, save=lambda state: None, sample=lambda step: None, record=lambda *row: None,
            interrupted=lambda: False, plain_validation=plain,  # type: ignore[arg-type]
        )  # fmt: skip
        fit(parts, Limits(limit, 1, 1.0, self.seed, policy.every, 10**9, 0), state)
        row: dict[str, Any] = {"task": self.name, "seed": self.seed, "policy": policy.name, "base": self.base}
        if not own:
            chosen = min(validation.losses, key=validation.losses.__getitem__)
            row |= {"chosen": chosen, "true": self.true(validation.weights[chosen])}
            return {**row, "items": validation.items, "cpu_s": time.process_time() - started}
        stopped, chosen = rule.ended or (STEPS, rule.best_step or 0)
        true = self.true(validation.weights[chosen])
        oracle, lowest, seen = self.lowest(validation.weights, chosen)
        if lowest > true:  # with more draws
            oracle, lowest = chosen, true
        row |= {"chosen": chosen, "true": true, "stopped": stopped}
        row |= {"ended": rule.ended is not None, "oracle": oracle, "lowest": lowest, "seen": seen}
        if rule.gain is not None:
            row |= {"gain": rule.gain.summary()}
        row |= {"items": validation.items, "plain": plain.items if plain else {}}
        self.keep(row, validation.weights)
        return {**row, "cpu_s": time.process_time() - started}

    def keep(self, row: dict[str, Any], weights: dict[int, dict[str, Tensor]]) -> None:
        """Write the weights that some stop could hand over: those of validations with a new lowest loss."""
        least, found = math.inf, {}
        for step, items in row["items"].items():
            if sum(items) < least or row["plain"]:
                least = min(least, sum(items))
                found |= {f"{step}/{name}": value for name, value in weights[step].items()}
        save_file(found, self.run.folder / f"{row['policy'].replace(' ', '-')}.safetensors")

    def lowest(self, weights: dict[int, dict[str, Tensor]], also: int) -> tuple[int, float, dict[int, float]]:
        """Step and value of the lowest held-out loss, by halving around the lowest of seven (and `also`); all seen."""
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
        return best, self.true(weights[best]), known


def rivals_of(
    task: str, seed: int, rows: Sequence[dict[str, Any]], network: str = "lora"
) -> dict[float, dict[str, Any]]:
    """AdamW's rows of a task and seed by their constant rates."""
    names = {policy.name: policy.lr for policy in POLICIES if policy.optimizer == "adamw" and policy.network == network}
    found = [row for row in rows if (row["task"], row["seed"]) == (task, seed) and names.get(row["policy"])]
    return {names[row["policy"]]: row for row in found}  # type: ignore[misc]


def next_rate(rivals: dict[float, dict[str, Any]]) -> float | None:
    """The rate of AdamW to try next: 3e-3, then the best one's neighbours, the larger first; None: they are worse."""
    if not rivals:
        return 3e-3
    place = RATES.index(min(rivals, key=lambda rate: float(rivals[rate]["true"])))
    return next((rate for rate in reversed(RATES[max(place - 1, 0) : place + 2]) if rate not in rivals), None)


def best_rival(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best AdamW row of a row's task, seed and network; None before enough rates were tried."""
    network = "lokr" if row["policy"].startswith("lokr") else "lora"
    rivals = rivals_of(row["task"], row["seed"], rows, network)
    return None if next_rate(rivals) else min(rivals.values(), key=lambda rival: float(rival["true"]))


def share_of(row: dict[str, Any], rival: dict[str, Any]) -> float:
    """Distance to another row of the task and seed, as a share of that one's gain."""
    return (rival["true"] - row["true"]) / (row["base"] - rival["true"])


def regret_of(row: dict[str, Any]) -> float:
    """Distance to the lowest loss of the row's own steps, as a share of what that gained."""
    return (row["true"] - row["lowest"]) / (row["base"] - row["lowest"])


def passes(row: dict[str, Any], every: int) -> float:
    """Forward passes of single samples that a run of EmoSens takes; a backward pass counts as two."""
    return 12.0 * row["stopped"] + 12.0 * (row["stopped"] // every + 1) + 32.0


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per task, seed and policy."""
    lines = ["| task, seed | row | handed over @ step | of the gain | ended | lowest @ step | regret | steps |"]
    lines.append("|" + " --- |" * 8)
    for row in rows:
        rival = best_rival(row, rows)
        words = f"| {row['task']}, {row['seed']} | {row['policy']} | {row['true']:.4f} @ {row['chosen']} |"
        words += f" {share_of(row, rival):+.1%} |" if rival else " - |"
        if "stopped" in row:
            ended = row["stopped"] if row["ended"] else "-"
            steps = f"{row['stopped'] / max(row['oracle'], 1):.2f}"
            words += f" {ended} | {row['lowest']:.4f} @ {row['oracle']} | {regret_of(row):.1%} | {steps} |"
        else:
            words += " - | - | - | - |"
        lines.append(words)
    return lines


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per policy."""
    heads = "row | runs | of the gain: mean | worst | best | regret: median | worst | steps: median | run's steps"
    lines = [f"| {heads} |", "|" + " --- |" * 9]
    for policy in POLICIES:
        own = [row for row in rows if row["policy"] == policy.name]
        shares = [share_of(row, rival) for row in own if (rival := best_rival(row, rows))]
        if not shares:
            continue
        line = f"| {policy.name} | {len(shares)} | {statistics.mean(shares):+.1%} |"
        line += f" {min(shares):+.1%} | {max(shares):+.1%} |"
        if policy.own:
            regrets, used = [regret_of(row) for row in own], [row["stopped"] for row in own]
            ratios = [row["stopped"] / max(row["oracle"], 1) for row in own]
            line += f" {statistics.median(regrets):.1%} | {max(regrets):.1%} | {statistics.median(ratios):.2f} |"
            line += f" {statistics.median(used):.0f} ({min(used)} to {max(used)}) |"
        else:
            line += " - | - | - | - |"
        lines.append(line)
    return lines


def targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a run promises, against what it does on styles that nothing was tuned on."""
    own = [row for row in rows if row["policy"] == "gain auto"]
    beside = [(row, rival) for row in own if (rival := best_rival(row, rows))]
    prodigy = {(row["task"], row["seed"]): row for row in rows if row["policy"] == "prodigy 1"}
    shares = [share_of(row, rival) for row, rival in beside]
    others = [share_of(row, prodigy[row["task"], row["seed"]]) for row in own if (row["task"], row["seed"]) in prodigy]
    quick = [reached(row) / rival["chosen"] for row, rival in beside if row["items"]]
    cost = [passes(row, 10) / (12.0 * rival["chosen"]) for row, rival in beside]
    ratios = [row["stopped"] / row["oracle"] for row in own]
    early = [ratio for row, ratio in zip(own, ratios, strict=True) if row["ended"]]
    regrets = [regret_of(row) for row in own if row["ended"]]
    flipped = [regret_of(row) for row in rows if row["policy"] == "gain auto, flipped"]
    median = statistics.median
    found = [
        ("of the gain, to the best AdamW: mean", "at least 0 %", f"{statistics.mean(shares):+.1%}", len(shares)),
        ("the same: worst", "at least -1.5 %", f"{min(shares):+.1%}", len(shares)),
        ("of the gain, to Prodigy: mean", "at least 0 %", f"{statistics.mean(others):+.1%}", len(others)),
        ("within 1 % of its lowest, over the best AdamW's steps: median, most", "at most 1.3",
         f"{median(quick):.2f}, {max(quick):.2f}" if quick else "-", len(quick)),
        ("regret of the runs that ended: median, worst", "at most 1 %, 4 %",
         f"{median(regrets):.1%}, {max(regrets):.1%}", len(regrets)),
        ("regret, flipped (a trial, no run has it): median, worst", "at most 2.5 %, 8 %",
         f"{median(flipped):.1%}, {max(flipped):.1%}" if flipped else "-", len(flipped)),
        ("steps over the oracle's: median", "at most 1.4", f"{median(ratios):.2f}", len(ratios)),
        ("the same, runs that ended: least", "at least 0.8", f"{min(early):.2f}", len(early)),
        ("forward passes over those of the best AdamW with a known number of steps: median, most", "at most 1",
         f"{median(cost):.2f}, {max(cost):.2f}", len(cost)),
    ]  # fmt: skip
    lines = ["| measure | target | here | runs |", "| --- | --- | --- | --- |"]
    return lines + [f"| {' | '.join(str(word) for word in line)} |" for line in found]


def reached(row: dict[str, Any]) -> int:
    """The first step whose validation is within 1 % of what the validation gained in all, up to the run's end."""
    means = {int(step): statistics.mean(items) for step, items in row["items"].items() if int(step) <= row["stopped"]}
    least = min(means.values())
    return min(step for step, mean in means.items() if mean <= least + 0.01 * (means[0] - least))


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
    parser.add_argument("--styles", type=Path, required=True)
    parser.add_argument("--third", type=Path, default=Path("third"), help="the folder that third_base.py made")
    parser.add_argument("--kept", type=Path, default=Path("gain-trials.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("bench-cells"))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--policies", nargs="+", default=DEFAULT, help="adamw: its rates, as many as are needed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--report", type=Path)
    parser.add_argument("--kept-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.kept.read_text().splitlines()] if args.kept.exists() else []
    networks = list(dict.fromkeys(policy.network for policy in POLICIES))
    places = [(task, seed, network) for task in args.tasks for seed in args.seeds for network in networks]
    for task, seed, network in [] if args.kept_only else places:
        place = None
        while policy := next_policy(task, seed, network, rows, args.policies):
            place = place or Place(task, seed, network, args)
            rows.append(place.measure(policy, rows))
            with args.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(task, seed, policy.name, f"{rows[-1]['true']:.4f}", f"{rows[-1]['cpu_s']:.0f} s", flush=True)
    order = {policy.name: place for place, policy in enumerate(POLICIES)}
    rows = [row for row in rows if row["task"] in args.tasks and row["policy"] in order]
    rows.sort(key=lambda row: (args.tasks.index(row["task"]), row["seed"], order[row["policy"]]))
    lines = [*targets(rows), "", *summary(rows), "", *table(rows)]
    print("\n".join(lines))
    if args.report:
        about = (__doc__ or "").split("\n\n", 2)[2].splitlines()
        head = ["# The unit of LR 1.0, measured", "", f"`{COMMAND}`", "", *about, ""]
        report = args.report / "gain_trials.md"
        said = report.read_text(encoding="utf-8").partition(SAID)[2] if report.exists() else ""
        report.write_text("\n".join([*head, *lines, "", SAID]) + said, encoding="utf-8")


if __name__ == "__main__":
    main()
