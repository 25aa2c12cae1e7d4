"""Two other ways to the unit of LR 1.0, beside the one that a run has: a range test, and an estimate of the distance.

    python tests/bench/styles.py STYLES
    python tests/bench/third_base.py WORK
    python tests/bench/gain_ways.py --styles STYLES --third WORK/third [--tasks ...]

Tasks, bases and "handed over" are those of gain_trials.py, on the styles that rules are tried on. Rows:

* auto: EmoSens at LR 1.0 as a run has it, with its own stop
* range test: 30 steps from the same beginning at 1, 3, 9 and 27 times the published step length; the one with the
  lowest validation goes on with its weights, and from there as "auto" does
* distance: the published pulse times d / 1e-4, where d is Prodigy's estimate of the distance to the solution
  (Mishchenko and Defazio 2023, arXiv:2306.06101, algorithm 4, beta3 = sqrt(0.999)), from 1e-6; given the best stop that
  the validation can tell
* distance, relative pulse: the same with the pulse over its mean up to then, times d

"steps" are those up to the run's own stop, the range test's 120 among them; of the distance rows that of a run without
a measured unit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from gain_rows import STEPS, Policy
from gain_trials import RIVALS_EVERY, Keeping, Place, Watched, best_of
from styles import TUNED_ON
from torch import Tensor

from emotrain.optim.protocol import OptimizerLike
from emotrain.pulse.gain import START, Gain
from emotrain.runs import build
from emotrain.train.loop import Limits, Parts, fit
from emotrain.train.state import TrainState

GAINS = (1.0, 3.0, 9.0, 27.0)
TRIED = 30  # steps at each of them
UNIT, FIRST = 1e-4, 1e-6  # of the published pulse; d at the start
BETA3 = math.sqrt(0.999)
TASKS = ("tiny-sd:ink:32", "tiny-flux:ink:32", "tiny-sd:signs:8", "tiny-flux:stained:32")
AUTO = Policy("gain auto", gain="auto")


class Distance:
    """An optimizer whose step length follows Prodigy's estimate; all else is the inner one's."""

    def __init__(self, inner: OptimizerLike, parameters: Sequence[Tensor], *, relative: bool) -> None:
        self.inner, self.parameters, self.relative = inner, parameters, relative
        self.d, self._scale = FIRST, FIRST / UNIT  # what the published step length is multiplied by
        self._pulses: list[float] = []
        self._first = [p.detach().clone() for p in parameters]
        self._sums = [torch.zeros_like(p) for p in parameters]
        self._numerator = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Estimate by the gradients that are there, then take the step."""
        weight = self.d * float(self.inner.param_groups[0]["lr"])
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        inner = sum(
            float((g * (first - p)).sum()) for g, first, p in zip(gradients, self._first, self.parameters, strict=True)
        )
        self._numerator = BETA3 * self._numerator + weight * inner
        for total, gradient in zip(self._sums, gradients, strict=True):
            total.mul_(BETA3).add_(gradient, alpha=weight)
        size = sum(float(total.abs().sum()) for total in self._sums)
        estimate = self._numerator / size if size else 0.0
        self.d = max(self.d, estimate)
        assert self.inner.reading is not None
        self._pulses.append(self.inner.reading.pulse)
        scale = self.d / (fmean(self._pulses) if self.relative else UNIT)
        self.inner.rescale(scale / self._scale)
        self._scale = scale
        return self.inner.step(closure)


class Ways(Place):
    """A task on which the ways are tried from one beginning."""

    def part(self, optimizer: Any, gain: Gain | None) -> tuple[Parts, Keeping, TrainState]:
        """What `fit` needs, from the LoRA that is on the model now."""
        state = TrainState()
        rule = Watched(held_out=True, gain=gain)
        rule.own_stop = gain is not None
        validation = Keeping(self, state, self.run.validation.held)
        parts = Parts(
            family=self.run.model.family, objective=self.run.model.objective, adapter=self.run.model.adapter,
            optimizer=optimizer, data=self.run.data, stop_rule=rule, loss_baseline=self.run.loss_baseline,
            validation=validation, notify=lambda event: None, save=lambda state: None,  # type: ignore[arg-type]
            sample=lambda step: None, interrupted=lambda: False,
        )  # fmt: skip
        return parts, validation, state

    def optimizer(self, gain: float, kind: str) -> Any:
        """EmoSens with its average, whose first step is `gain` times as long as published."""
        lr = gain / START if kind == "auto" else gain  # a run that measures begins at START by itself
        cell = replace(self.cell, gain=kind, lr=lr, ema=True)
        preset = cell.preset(self.run.folder / "train", self.run.folder / "validation")
        self.run.model.adapter.load_state(self.first)
        return build.build_optimizer_of(preset, self.run.model.adapter.parameters())

    def limits(self, steps: int, every: int) -> Limits:
        """Of one stretch."""
        return Limits(steps, 1, 1.0, self.seed, every, 10**9, 0)

    def auto(self) -> dict[str, Any]:
        """As a run has it."""
        parts, validation, state = self.part(self.optimizer(START, "auto"), Gain())
        fit(parts, self.limits(STEPS, self.every(AUTO)), state)
        return self.row("auto", parts.stop_rule, validation, state.step)

    def range_test(self) -> dict[str, Any]:
        """The best of four gains after 30 steps goes on."""
        tried = []
        for gain in GAINS:
            parts, validation, state = self.part(self.optimizer(gain, "auto"), Gain(value=gain))
            fit(parts, self.limits(TRIED, self.every(AUTO)), state)
            tried.append((validation.losses[TRIED], gain, self.run.model.adapter.state(), parts, validation, state))
        _, gain, weights, parts, validation, state = min(tried, key=lambda one: one[0])
        self.run.model.adapter.load_state(weights)
        fit(parts, self.limits(STEPS, self.every(AUTO)), state)
        row = self.row("range test", parts.stop_rule, validation, state.step)
        return row | {"chosen gain": gain, "steps": row["steps"] + TRIED * (len(GAINS) - 1)}

    def distance(self, *, relative: bool = False) -> dict[str, Any]:
        """The pulse times the estimated distance."""
        inner = self.optimizer(FIRST / UNIT, "fixed")
        optimizer = Distance(inner, self.run.model.adapter.parameters(), relative=relative)
        parts, validation, state = self.part(optimizer, None)
        fit(parts, self.limits(STEPS, RIVALS_EVERY), state)
        way = "distance, relative pulse" if relative else "distance"
        return self.row(way, parts.stop_rule, validation, state.step) | {"d": optimizer.d}

    def row(self, way: str, rule: Any, validation: Keeping, steps: int) -> dict[str, Any]:
        """Held-out loss of the LoRA that is handed over."""
        chosen = (rule.ended[1] if rule.ended else rule.best_step or 0) if rule.own_stop else best_of(validation.losses)
        ended = rule.ended[0] if rule.ended else steps
        loss = self.true(validation.weights[chosen])
        return {"task": self.name, "way": way, "base": self.base, "loss": loss, "step": chosen, "steps": ended}


WAYS: dict[str, Callable[[Ways], dict[str, Any]]] = {
    "auto": Ways.auto,
    "range test": Ways.range_test,
    "distance": Ways.distance,
    "distance, relative pulse": partial(Ways.distance, relative=True),
}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown, each way beside "auto" as a share of what that gained."""
    lines = ["| task | way | handed over @ step | to auto | steps | found |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        auto = next(other for other in rows if (other["task"], other["way"]) == (row["task"], "auto"))
        share = (auto["loss"] - row["loss"]) / (auto["base"] - auto["loss"])
        found = f"gain {row['chosen gain']:g}" if "chosen gain" in row else f"d {row['d']:.1e}" if "d" in row else ""
        cells = (row["task"], row["way"], f"{row['loss']:.4f} @ {row['step']}", f"{share:+.1%}", row["steps"], found)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    """Train what is not kept yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", type=Path, default=Path("styles"), help="the folder that styles.py made")
    parser.add_argument("--third", type=Path, default=Path("third"), help="the folder that third_base.py made")
    parser.add_argument("--work", type=Path, default=Path("bench-cells"))
    parser.add_argument("--kept", type=Path, default=Path("gain-ways.jsonl"))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    assert all(task.split(":")[1].split("-")[-1] in (*TUNED_ON, "ink", "signs") for task in args.tasks)
    rows = []
    with contextlib.suppress(FileNotFoundError):
        rows = [json.loads(line) for line in args.kept.read_text(encoding="utf-8").splitlines()]
    for task in args.tasks:
        done = {row["way"] for row in rows if row["task"] == task}
        place = None if done == set(WAYS) else Ways(task, 0, "lora", args)
        for way in WAYS:
            if place is None or way in done:
                continue
            started = time.process_time()
            rows.append(WAYS[way](place))
            with args.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], f"{time.process_time() - started:.0f} s", flush=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
