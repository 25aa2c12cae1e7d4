"""What share of a run do the validations take? Steps and validations of the two built-in models, in turns, in CPU time.

    python tests/bench/validation_cost.py [--rounds 20] [--report docs/benchmarks/validation_cost.md]

A validation is what the loop does: the loss of 4 held-out pictures at 4 draws each, and the drift at one draw each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from emotrain.config.load import load_preset
from emotrain.runs.build import build_validation, validate_every
from emotrain.runs.loaded import load
from emotrain.train.loop import Limits, Parts, train_step
from emotrain.train.losses import LossBaseline
from emotrain.train.state import TrainState


def seconds(work: object) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - started


def measure(preset_name: str, micro_batch: int, rounds: int) -> tuple[float, float, int]:
    """(CPU seconds of a step, of a validation, steps between two validations when left to `auto`)."""
    words = (f"train.micro_batch_size={micro_batch}", "validate.every=auto")
    preset = load_preset(preset_name, words, "cost")
    loaded, state = load(preset, lambda event: None), TrainState()
    validation = build_validation(preset, loaded.model, loaded.data, loaded.ranks, loaded.data.validation)
    parts = Parts(
        family=loaded.model.family,
        objective=loaded.model.objective,
        adapter=loaded.model.adapter,
        optimizer=loaded.optimizer,
        data=loaded.data.train,
        stop_rule=loaded.stop_rule,
        loss_baseline=LossBaseline(),
        validation=validation,
        notify=lambda event: None,
        save=lambda state: None,
        sample=lambda step: None,
        interrupted=lambda: False,
    )
    limits = Limits(10**6, 1, 1.0, preset.train.seed, 1, 10**6, 0)
    steps, validations = [], []
    for turn in range(rounds + 2):
        step = seconds(lambda: [train_step(parts, limits, state) for _ in range(4)]) / 4
        asked = seconds(lambda: (validation.pictures(), validation.drift()))
        if turn >= 2:
            steps.append(step)
            validations.append(asked)
    held = len(loaded.pictures.held_out)
    return statistics.median(steps), statistics.median(validations), validate_every(preset, held)


def main() -> None:
    """One line per model and micro-batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    heads = "model | micro-batch | step, CPU ms | validation, CPU ms | auto: every | share | every 10 steps: share"
    lines = [f"| {heads} |", "|" + " --- |" * 7]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EMOTRAIN_CACHE"] = cache
        for preset, model in (("quickstart", "tiny-sd"), ("quickstart-flux", "tiny-flux")):
            for micro_batch in (1, 4):
                step, validation, every = measure(preset, micro_batch, args.rounds)
                shares = [validation / (validation + steps * step) for steps in (every, 10)]
                lines.append(
                    f"| {model} | {micro_batch} | {1000 * step:.0f} | {1000 * validation:.0f} | {every} |"
                    f" {shares[0]:.1%} | {shares[1]:.1%} |"
                )
                print(lines[-1], flush=True)
    if args.report:
        said = (__doc__ or "").splitlines()[4:]
        text = ["# What the validations cost", "", "`python tests/bench/validation_cost.py`", "", *said, "", *lines]
        args.report.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
