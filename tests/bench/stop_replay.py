"""A stop with statistics, replayed beside the rule that waits: tuned on one half of the tasks, reported on the other.

    python tests/bench/styles.py STYLES
    python tests/bench/third_base.py WORK
    python tests/bench/stop_replay.py --styles STYLES --third WORK/third [--kept FILE.jsonl]

A task is model:style:pictures; micro-batches of 4, rank 8, at most 400 steps, fewer where the lowest validation lies
100 steps back (with a measured step length: the end of the rule that waits). Each run is recorded once, with the loss
of every single picture: 3 held out, at 4 draws and at 4 others, and, where the run has the published step length, 3
flipped training pictures with the same unflipped. Every rule is then tried on the records, and hears what was known at
each step, as often as a run has a validation. A run that measures its step length goes on 100 steps beyond its own end
without changing its steps again, and never raises them; a rule can end it earlier or later, but not train it
otherwise.

"by waiting" is the rule without statistics: two step lengths that bring nothing, or two validations without a fall that
counts and four tenths of the best step. The others end at a validation after the best one where an improvement of 0.5 %
of the gain has a chance below so many percent (emotrain/pulse/paired.py), for the last validation or for the mean of
all since the best; with a measured step length after a shorter length has brought nothing. "not while falling": not
where the last 4 validations fall, with 90 % confidence. "more draws": 4 more a picture where the chance is not below
the limit and not above a half, within 5 % of the run's forward passes; their share is the last column. "or by
waiting": whichever comes first.

Regret is (loss of the LoRA that is handed over - lowest) / (base - lowest), on 64 held-out pictures at one draw; steps
are the run's over those of the lowest loss, or the recorded ones where the rule did not end it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import torch
from gain_trials import Place, Watched
from torch import Tensor

from emotrain.pulse import gain as pulse_gain
from emotrain.pulse.gain import NEGLIGIBLE, Gain
from emotrain.pulse.paired import Paired
from emotrain.pulse.stopping import SHARED, StopRule
from emotrain.runs import build
from emotrain.train.events import StepEnd
from emotrain.train.loop import Limits, Parts, fit
from emotrain.train.state import TrainState
from emotrain.train.validation import Validation, rows_of

TUNING = ("tiny-flux:poster:10", "third:flower-poster:10", "tiny-sd:poster:10", "tiny-flux:dusk:32")
REPORTED = ("tiny-flux:hatched:10", "third:shapes-hatched:10", "tiny-sd:hatched:10", "tiny-flux:knit:32")
TASKS = [task for pair in zip(TUNING, REPORTED, strict=True) for task in pair]
KINDS = ("measured", "fixed")  # the run's step length: held-out rule; published length: held-out and flipped rule
STEPS = 400
GRID = {"measured": {"held": 10, "more": 10}, "fixed": {"held": 20, "more": 20, "flipped": 30, "plain": 30}}
LEVELS = (0.1, 0.2, 0.3)
VARIANTS: dict[str, dict[str, Any]] = {
    "last validation": {"pool": False, "falling": 1.0},
    "all since the best": {"falling": 1.0},
    "all since the best, not while falling": {},
    "all since the best, not while falling, more draws": {"more": True},
}
CHOSEN = (  # on the tuning half; and the whole of what was planned
    ": by waiting",
    "below 10%, last validation",
    "below 10%, all since the best, not while falling, more draws",
    "below 10%, all since the best, not while falling",  # flipped
)
FALLING = 4  # validations that a slope is taken over
BUDGET = 0.05  # of the run's forward passes, for further draws
WORDS = {"held": "held out", "flipped": "flipped", "measured": "measured length", "fixed": "published length"}
MORE_DRAWS = 4  # per held-out picture, at other noise: what a rule could ask for where it is not sure


class Recording:
    """A validation that keeps the losses of single pictures, by what they are of, and the weights."""

    def __init__(self, place: Place, kind: str, state: TrainState) -> None:
        run, self.state, self.grid = place.run, state, GRID[kind]
        batches = [part for part, _, _ in run.validation.held.parts]
        single = [build_single(batch, run.validation.held.draws) for batch in batches]
        more = Validation(
            run.model.family, run.model.objective, run.model.adapter, single, run.validation.held.empty_text,
            draws=MORE_DRAWS, seed=place.seed + 1,
        )  # fmt: skip
        self.of = {"held": run.validation.held, "more": more}
        if kind == "fixed":
            assert run.plain_validation is not None
            self.of |= {"flipped": run.validation.flipped, "plain": run.plain_validation}
        self.adapter = run.model.adapter
        self.pictures_at: dict[str, dict[int, list[float]]] = {name: {} for name in self.of}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def pictures(self, progress: object = None) -> list[float]:
        """Of the held-out ones as they are due; the last ones where others are."""
        step = self.state.step
        for name, validation in self.of.items():
            if step % self.grid[name] == 0:
                self.pictures_at[name][step] = validation.pictures()
                self.weights[step] = self.adapter.state()
        return self.pictures_at["held"][max(self.pictures_at["held"])]

    def drift(self) -> float:
        """Not measured."""
        return 0.0


def build_single(batch: Any, draws: int) -> Any:
    """The pictures of a batch that has each of them `draws` times."""
    return rows_of(batch, range(0, len(batch.ids), draws))


def record(place: Place, kind: str) -> dict[str, Any]:
    """Train one run beyond its end and note what every rule could hear, and the true loss of what it could choose."""
    run, started = place.run, time.process_time()
    cell = replace(place.cell, gain="auto" if kind == "measured" else "fixed", ema=True)
    preset = cell.preset(run.folder / "train", run.folder / "validation")
    run.model.adapter.load_state(place.first)
    optimizer = build.build_optimizer_of(preset, run.model.adapter.parameters())
    state, lit = TrainState(), []
    rule = Watched(gain=Gain() if kind == "measured" else None)
    rule.own_stop = kind == "measured"
    validation = Recording(place, kind, state)
    parts = Parts(
        family=run.model.family, objective=run.model.objective, adapter=run.model.adapter, optimizer=optimizer,
        data=run.data, stop_rule=rule, loss_baseline=run.loss_baseline, validation=validation,  # type: ignore[arg-type]
        notify=lambda event: lit.append(event.ready) if isinstance(event, StepEnd) else None,
        save=lambda state: None, sample=lambda step: None, interrupted=lambda: False,
    )  # fmt: skip
    with patch.object(pulse_gain, "SURE", math.inf):  # no rises: none were known
        fit(parts, Limits(STEPS, 1, 1.0, place.seed, 10, 10**9, 0), state)
    row: dict[str, Any] = {"task": place.name, "seed": place.seed, "kind": kind, "base": place.base}
    row |= {"steps": state.step, "lit": lit, "ended": rule.ended, "pictures": validation.pictures_at}
    row["reductions"] = rule.gain.changes if rule.gain else []
    least, chosen = float("inf"), []
    for step, losses in validation.pictures_at["held"].items():
        if fmean(losses) < least or step % 40 == 0:
            least = min(least, fmean(losses))
            chosen.append(step)
    chosen = sorted({*chosen, *validation.pictures_at.get("flipped", {})})
    row["true"] = {step: place.true(validation.weights[step], draws=1) for step in chosen}
    return {**row, "cpu_s": time.process_time() - started}


@dataclass
class Statistical(StopRule):
    """Ends by the differences of single pictures to the best validation, and by nothing else.

    Args:
        level: end where the chance of an improvement of 0.5 % of the gain is below this.
        falling: do not end where the last FALLING validations fall, for the pictures at hand, with this confidence.
        measured: the run measures its step length: end where a shorter one, too, has brought nothing.
        more: where it is not sure ask for as many draws again, within 5 % of the run's forward passes.
    """

    level: float = 0.1
    falling: float = 0.9
    more: bool = False
    measured: bool = False
    pool: bool = True  # the validations since the best one; else the last one
    shortened: int | None = None  # the step of the last change of the step length
    mark: float = math.inf  # the lowest loss then
    history: list[tuple[int, list[float], list[float]]] = field(default_factory=list)  # step, pictures, further draws
    since: int = 0  # the step that validations are pooled from: of the best, or of a change of the step length
    asked: set[int] = field(default_factory=set)  # steps with further draws
    was_unfair: bool = False
    passes: float = 0.0  # forward passes of single samples, the further draws left out

    def add(self, step: int, pictures: list[float], more: list[float], anew: bool, cost: float) -> None:
        """Note a validation that `update_validation` has had; `anew`: pool from here on."""
        if self.unfair and not self.was_unfair:
            self.history.clear()  # of flipped pictures
        self.was_unfair = self.unfair
        self.history.append((step, pictures, more))
        self.passes += cost
        if anew:
            self.since = step

    def decide(self, step: int) -> str | None:
        """A sentence where it is done."""
        last, _, _ = self.history[-1]
        if last != step or step < self.min_steps or self.best_step in (None, 0, step):
            return None
        if self.measured and (self.shortened in (None, step) or self.brought()):
            return None
        chance = self.pooled(False)
        if self.more and chance is not None and self.level <= chance < 0.5 and self.can_ask():
            chance = self.pooled(True)
        if chance is None or chance >= self.level or self.is_falling():
            return None
        return f"the chance is {chance:.0%}"

    def brought(self) -> bool:
        """Whether the step length of now has brought what counts."""
        assert self.base_loss is not None
        assert self.best_loss is not None
        return self.mark - self.best_loss > NEGLIGIBLE * (self.base_loss - self.best_loss)

    def window(self) -> list[tuple[int, list[float], list[float]]]:
        """The best validation, then those since it or since the step length changed."""
        best = [row for row in self.history if row[0] == self.best_step]
        later = [row for row in self.history if row[0] > max(self.since, self.best_step or 0)]
        return best + (later if self.pool else later[-1:])

    def can_ask(self) -> bool:
        """Whether the further draws are within the budget; notes them."""
        wanted = self.asked | {row[0] for row in self.window()}
        pictures = len(self.history[0][1])
        if not self.history[0][2] or len(wanted) * pictures * MORE_DRAWS > BUDGET * self.passes:
            return False
        self.asked = wanted
        return True

    def pooled(self, more: bool) -> float | None:
        """Chance of an improvement that counts, of the mean over the validations since the best one."""
        rows = [
            [(one + other) / 2 for one, other in zip(own, further, strict=True)] if more else own
            for _, own, further in self.window()
        ]
        if len(rows) < 2 or self.base_loss is None or self.best_loss is None:
            return None
        means = [fmean(column) for column in zip(*rows[1:], strict=True)]
        facts = {"step": self.history[-1][0], "best_step": self.best_step, "base_loss": self.base_loss}
        facts |= {"gained": self.base_loss - self.best_loss, "negligible": NEGLIGIBLE}
        return Paired.of(means, rows[0], **facts).chance

    def is_falling(self) -> bool:
        """Whether the last validations fall steadily: the mean of the pictures' slopes is below zero, surely."""
        rows = self.history[-FALLING:]
        if len(rows) < FALLING or self.falling >= 1.0:
            return False
        centre = (len(rows) - 1) / 2
        slopes = [
            sum((at - centre) * value for at, value in enumerate(column))
            for column in zip(*(pictures for _, pictures, _ in rows), strict=True)
        ]
        fall = Paired.of(slopes, [0.0] * len(slopes), step=1, best_step=1, gained=1.0, base_loss=1.0, negligible=0.0)
        return fall.chance is not None and fall.chance > self.falling


@dataclass(frozen=True)
class Ended:
    """What a rule did with one run."""

    task: str
    stopped: int | None  # None: not within the recorded steps
    chosen: int
    regret: float
    ratio: float  # steps of the run, or of the recording, over those of the lowest true loss
    asked: float = 0.0  # further draws, as a share of the run's forward passes


def ended(row: dict[str, Any], stopped: int | None, chosen: int, asked: float = 0.0) -> Ended:
    """With regret and ratio."""
    true = {int(step): loss for step, loss in row["true"].items()}
    oracle = min(true, key=true.__getitem__)
    regret = (true[chosen] - true[oracle]) / (true[0] - true[oracle])
    return Ended(row["task"], stopped, chosen, regret, (stopped or row["steps"]) / max(oracle, 1), asked)


def used(rule: StopRule, own: list[float], plain: list[float]) -> list[float]:
    """Losses whose differences count: of flipped pictures without the part that memorising explains."""
    if not plain:
        return own
    return plain if rule.unfair else [one - SHARED * other for one, other in zip(own, plain, strict=True)]


def play(row: dict[str, Any], rule: StopRule, heard: str, every: int) -> Ended:
    """A rule on a recorded run: "held" or "flipped" pictures, as often as a run has a validation."""
    pictures = {int(step): losses for step, losses in row["pictures"][heard].items()}
    plain = {int(step): losses for step, losses in row["pictures"].get("plain", {}).items()}
    more = {int(step): losses for step, losses in row["pictures"]["more"].items()} if heard == "held" else {}
    reductions = dict(row["reductions"])
    for step in range(row["steps"] + 1):
        if step:
            rule.update_step(row["lit"][step - 1])
        if step % every == 0:
            own, as_is = pictures[step], plain[step] if heard == "flipped" else []
            is_best = rule.update_validation(step, fmean(own), fmean(as_is) if as_is else None, own, as_is)
            if isinstance(rule, Statistical):
                cost = 12.0 * every * (step > 0) + 4.0 * (len(own) + len(as_is))
                rule.add(step, used(rule, own, as_is), more.get(step, []), is_best or step in reductions, cost)
                if step in reductions:
                    rule.shortened, rule.mark = step, rule.best_loss or 0.0
        if step and rule.decide(step):
            return ended(row, step, rule.best_step or 0, asked_of(rule))
    return ended(row, None, rule.best_step or 0, asked_of(rule))


def asked_of(rule: StopRule) -> float:
    """Further draws of a rule, as a share of the run's forward passes."""
    if not isinstance(rule, Statistical) or not rule.asked:
        return 0.0
    return len(rule.asked) * len(rule.history[0][1]) * MORE_DRAWS / rule.passes


def by_waiting(row: dict[str, Any], heard: str, every: int) -> Ended:
    """What runs do; a run that measures its step length noted it itself."""
    if row["kind"] == "fixed":
        return play(row, StopRule(held_out=heard == "held"), heard, every)
    held = {int(step): fmean(losses) for step, losses in row["pictures"]["held"].items()}
    stopped, chosen = row["ended"] or (None, min(held, key=held.__getitem__))
    return ended(row, stopped, chosen)


def rules_of(row: dict[str, Any]) -> dict[str, Ended]:
    """Every rule on a recorded run, by what it is called."""
    found = {}
    for heard, every in [("held", 10)] if row["kind"] == "measured" else [("held", 20), ("flipped", 30)]:
        name = f"{WORDS[row['kind']]}, {WORDS[heard]}"
        found[f"{name}: by waiting"] = waited = by_waiting(row, heard, every)
        for level, (words, numbers) in product(LEVELS, VARIANTS.items()):
            if numbers.get("more") and heard == "flipped":
                continue  # further draws were recorded of held-out pictures alone
            rule = Statistical(held_out=heard == "held", level=level, measured=row["kind"] == "measured", **numbers)
            one = play(row, rule, heard, every)
            found[f"{name}: below {level:.0%}, {words}"] = one
            found[f"{name}: below {level:.0%}, {words}, or by waiting"] = min(
                one, waited, key=lambda each: each.stopped or math.inf
            )
    return found


def summary(rows: Sequence[dict[str, Any]], tasks: Sequence[str], chosen: Sequence[str] = ("",)) -> list[str]:
    """A line a rule whose name ends in a chosen one: regret, steps and how often it ended, over these tasks."""
    found: dict[str, list[Ended]] = {}
    for row in rows:
        if row["task"] in tasks:
            for name, one in rules_of(row).items():
                found.setdefault(name, []).append(one)
    lines = [
        "| rule | regret: median | worst | steps: median | least | most | ended | further draws |",
        "|" + " --- |" * 8,
    ]
    for name, some in found.items():
        if not name.endswith(tuple(chosen)):
            continue
        regrets, ratios = [one.regret for one in some], [one.ratio for one in some]
        count = sum(one.stopped is not None for one in some)
        words = f"| {name} | {median(regrets):.1%} | {max(regrets):.1%} | {median(ratios):.2f} | {min(ratios):.2f} |"
        lines.append(f"{words} {max(ratios):.2f} | {count} of {len(some)} | {max(one.asked for one in some):.1%} |")
    return lines


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a run and what was heard: where the chosen rules ended it, the step handed over, the regret."""
    lines = [
        f"| half | task | run | {' | '.join(name.removeprefix(': ') for name in CHOSEN[:3])} |",
        "|" + " --- |" * 6,
    ]
    for row in rows:
        found = rules_of(row)
        half = "tuned on" if row["task"] in TUNING else "reported"
        for name in [name for name in found if name.endswith(CHOSEN[0])]:
            kind = name.removesuffix(CHOSEN[0])
            cells = []
            for rule in (name, f"{kind}: {CHOSEN[1]}", f"{kind}: {CHOSEN[2 if 'held' in kind else 3]}"):
                one = found[rule]
                cells.append(f"{one.stopped or '-'}, {one.chosen}, {one.regret:.1%}")
            lines.append(f"| {half} | {row['task']} | {kind} | {' | '.join(cells)} |")
    return lines


def errors(row: dict[str, Any]) -> tuple[float, float] | None:
    """(standard error as a share of the gain, the same with twice the draws over it) of a run's failed validations.

    Medians; None where no validation failed.
    """
    held = {int(step): losses for step, losses in row["pictures"]["held"].items()}
    other = {int(step): losses for step, losses in row["pictures"]["more"].items()}
    more = {step: [fmean(pair) for pair in zip(held[step], other[step], strict=True)] for step in held}
    best, found, base = 0, [], fmean(held[0])
    for step, losses in held.items():
        gained = base - fmean(held[best])
        if fmean(losses) < fmean(held[best]):
            best = step
        elif best:
            facts = {"step": step, "best_step": best, "gained": gained, "base_loss": base, "negligible": NEGLIGIBLE}
            one, two = (Paired.of(of[step], of[best], **facts).error or math.nan for of in (held, more))
            found.append((one / gained, two / one))
    return (median(share for share, _ in found), median(ratio for _, ratio in found)) if found else None


def main() -> None:
    """Record what is not kept yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", type=Path, required=True)
    parser.add_argument("--third", type=Path, default=Path("third"), help="the folder that third_base.py made")
    parser.add_argument("--kept", type=Path, default=Path("stop-replay.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("bench-cells"))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.kept.read_text().splitlines()] if args.kept.exists() else []
    done = {(row["task"], row["seed"], row["kind"]) for row in rows}
    for task in args.tasks:
        for seed in args.seeds:
            kinds = [kind for kind in KINDS if (task, seed, kind) not in done]
            if not kinds:
                continue
            place = Place(task, seed, "lora", args)
            for kind in kinds:
                rows.append(record(place, kind))
                with args.kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(task, seed, kind, rows[-1]["steps"], rows[-1]["ended"], f"{rows[-1]['cpu_s']:.0f} s", flush=True)
    for name, tasks, chosen in (("tuned on", TUNING, ("",)), ("reported", REPORTED, CHOSEN)):
        print("\n".join(["", f"{name}:", "", *summary(rows, tasks, chosen)]))
    print("\n".join(["", *table(rows)]))
    shares, ratios = zip(*[found for row in rows if (found := errors(row))], strict=True)
    print(f"standard error of failed validations: {min(shares):.2%} to {max(shares):.2%}, median {median(shares):.2%}")
    print(f"with twice the draws: {min(ratios):.2f} to {max(ratios):.2f} times that, median {median(ratios):.2f}")


if __name__ == "__main__":
    main()
