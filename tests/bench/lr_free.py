"""Does LR 1.0 need an excuse? The emo optimizers beside AdamW at five rates, Prodigy and schedule-free.

    python tests/bench/lr_free.py [--work DIR] [--models tiny-sd tiny-flux] [--report docs/benchmarks]
    python tests/bench/lr_free.py --kept-only       train nothing: tables of the cells that are in the work folder
    python tests/bench/lr_free.py --pictures FOLDER --held-out FOLDER    another style, in place of the tasks

The tasks of stop_regret.py with micro-batches of 4 and 400 steps each. Every 10 steps the LoRA is kept; "lowest" is the
lowest true held-out loss of all of them, found by halving around the lowest of 13: the best stop there could have been.
The other trainers' optimizers run as those trainers run them, without an average of the weights (`train.ema: false`);
one row shows what it does for AdamW. "as published" is EmoSens without the three things that a run adds (bias
correction, the base's mean loss to begin at, the average); the rows after it leave out one of them each.
All have the published step length (`train.gain: fixed`): this says what the other additions to the published rule
bring. The step length that a run measures by default is in gain_trials.py.

The scheduler of tiny-flux has no dynamic shifting, so the mended shift of FLUX.1 leaves these figures alone: the cell
`tiny-flux-ink-32, adamw 0.001, seed 0` trained again (2026-11-27) gave every digit of its row below.

"of the gain" is the distance to the best AdamW's lowest loss, as a share of what that gained over the base: above zero
is better. Seeds differ in the LoRA's start, noise, timesteps and the order of pictures; a range is that of all seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from longrun import Cell, LongRun, Task
from stop_regret import FIRST

from emotrain.pulse.draw import Panel, svg

STEPS = 400
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
PUBLISHED = (("bias_correction", False),)
CALM = (("generation", "3.7.6"),)
NO_TASK = Task("", "", 0)


def shapes() -> list[Cell]:
    """Every row but its task. The rows that decide have three seeds (AdamW: two at the three middle rates)."""
    own = Cell(NO_TASK)
    other = replace(own, ema=False)
    return [
        *[replace(own, seed=seed) for seed in (0, 1, 2)],
        *[replace(own, seed=seed, words=PUBLISHED, ema=False, baseline="raw") for seed in (0, 1)],
        replace(own, ema=False),
        replace(own, words=PUBLISHED),
        replace(own, baseline="raw"),
        replace(own, baseline="corrected"),
        replace(own, words=CALM),
        replace(own, optimizer="emoairy"),
        replace(own, optimizer="emocats"),
        *[replace(other, optimizer="adamw", lr=rate) for rate in RATES],
        *[replace(other, optimizer="adamw", lr=rate, seed=1) for rate in RATES[1:4]],
        replace(own, optimizer="adamw", lr=1e-3),
        replace(other, optimizer="prodigy", lr=1.0),
        replace(other, optimizer="schedulefree", lr=2.5e-3),
    ]


def label(cell: Cell) -> str:
    """How a row is called; the defaults of a run have no words."""
    emo = cell.optimizer.startswith("emo")
    uncorrected = cell.words == PUBLISHED
    words = [str(value) for key, value in cell.words if key == "generation"]
    if uncorrected and cell.baseline == "raw":
        words.append("as published")
    elif cell.baseline == "raw":
        words.append("from the first loss")
    elif uncorrected:
        words.append("no bias correction")
    elif emo and not cell.ema:
        words.append("no average")
    elif not emo and cell.ema:
        words.append("averaged")
    if cell.baseline == "corrected":
        words.append("corrected loss")
    return ", ".join([f"{cell.optimizer} {cell.lr or 1.0:g}", *words])


@dataclass(frozen=True)
class Row:
    """One cell, measured."""

    label: str
    seed: int
    base: float
    lowest: float
    step: int
    last: float
    wrong: float  # loss at the lowest step with wrong captions
    drift: float
    pulse: float

    def line(self) -> str:
        """Of the table."""
        kept = f"{(self.base - self.wrong) / (self.base - self.lowest):.0%}" if self.lowest < self.base else "-"
        return (
            f"| {self.label} | {self.seed} | {self.lowest:.4f} @ {self.step} |"
            f" {self.last:.4f} | {kept} | {self.drift:.3f} | {self.pulse:.1e} |"
        )


def measure(cell: Cell, work: Path) -> Row:
    """Train a cell, find its lowest step, measure the controls there."""
    run = LongRun(cell, work)
    shared = cell == Cell(cell.task, seed=cell.seed)  # with stop_regret.py, which needs it longer
    run.train(*(FIRST[cell.task.model, 4] if shared else (STEPS, STEPS)))
    best = run.best(STEPS)
    wrong, drift = run.controls(best)
    pulse = sorted(run.record.pulse[:STEPS])[STEPS // 2]
    values = (run.true(0), run.true(best), best, run.true(STEPS), wrong, drift, pulse)
    return Row(label(cell), cell.seed, *values)


def task_table(rows: Sequence[Row]) -> list[str]:
    """One line per cell."""
    heads = "optimizer, LR | seed | lowest @ step | at step 400 | gain kept with wrong captions"
    return [
        f"The base's loss is {rows[0].base:.4f}.",
        "",
        f"| {heads} | drift without trigger | median step length |",
        "|" + " --- |" * 7,
        *[row.line() for row in rows],
    ]


def lowest_of(rows: Sequence[Row], name: str) -> list[float]:
    """The lowest losses of all seeds of a row."""
    return [row.lowest for row in rows if row.label == name]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def summary(tables: dict[str, list[Row]]) -> list[str]:
    """EmoSens at LR 1.0 against the best AdamW, one line per task and contender."""
    lines = [
        "| task | best AdamW: rate, lowest (seeds) | contender | lowest: mean (range) | of the gain | worst seed |",
        "|" + " --- |" * 6,
    ]
    for task, rows in tables.items():
        names = list(dict.fromkeys(row.label for row in rows))
        swept = {name: lowest_of(rows, name) for name in names if name.startswith("adamw") and "averaged" not in name}
        if not swept:
            continue
        best = min(swept, key=lambda name: mean(swept[name]))
        goal, gain = mean(swept[best]), rows[0].base - mean(swept[best])
        spread = " ".join(f"{value:.4f}" for value in swept[best])
        for name in names:
            own = lowest_of(rows, name)
            if name in swept and name != "adamw 0.0001":
                continue
            share, worst = (goal - mean(own)) / gain, (goal - max(own)) / gain
            band = f" ({min(own):.4f} to {max(own):.4f})" if len(own) > 1 else ""
            lines.append(
                f"| {task} | {best}: {spread} | {name} | {mean(own):.4f}{band} | {share:+.1%} | {worst:+.1%} |"
            )
    return lines


def plot(tasks: Sequence[Task], tables: dict[str, list[Row]], work: Path) -> str:
    """Validation of 3 held-out pictures along the run, seed 0: EmoSens, the best AdamW, AdamW 1e-4, two others."""
    panels = []
    for task in tasks:
        rows = [row for row in tables.get(task.name, []) if row.seed == 0]
        swept = [row for row in rows if row.label.startswith("adamw") and "averaged" not in row.label]
        if not swept:
            continue
        best = min(swept, key=lambda row: row.lowest).label
        wanted = ("emosens 1", best, "adamw 0.0001", "schedulefree 0.0025")
        curves = []
        for shape in shapes():
            if shape.seed == 0 and label(shape) in wanted:
                held = LongRun(replace(shape, task=task), work).record.held
                points = sorted((int(step), loss) for step, loss in held.items() if int(step) <= STEPS)
                curves.append((label(shape), points))
        panels.append(Panel(task.name, curves))
    return svg(panels, title="LR 1.0 beside the others", panel_height=150)


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """The usual four, or one of a style from outside for each model."""
    if not args.pictures:
        return [Task(model, style, n) for model in args.models for style, n in (("ink", 32), ("signs", 8))]
    return [Task.of_folders(model, args.pictures, args.held_out) for model in args.models]


def main() -> None:
    """Train what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-cells"))
    parser.add_argument("--models", nargs="+", default=["tiny-sd", "tiny-flux"])
    parser.add_argument("--pictures", type=Path, help="another style to train on")
    parser.add_argument("--held-out", type=Path, help="at least 20 pictures of it to measure with")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--kept-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables: dict[str, list[Row]] = {}
    tasks = tasks_of(args)
    for task in tasks:
        for shape in shapes():
            cell = replace(shape, task=task)
            if args.kept_only and not (args.work / cell.name / "record.json").exists():
                continue
            row = measure(cell, args.work)
            tables.setdefault(task.name, []).append(row)
            print(task.name, row.line(), flush=True)
    lines = ["## In short", "", *summary(tables)]
    for name, rows in tables.items():
        lines += ["", f"## {name}", "", *task_table(rows)]
    print("\n".join(lines))
    if args.report:
        about = (__doc__ or "").split("\n\n", 2)[2].splitlines()
        head = ["# LR 1.0 beside the others", "", "`python tests/bench/lr_free.py`", "", *about, ""]
        (args.report / "lr_free.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        (args.report / "lr_free.svg").write_text(plot(tasks, tables, args.work), encoding="utf-8")


if __name__ == "__main__":
    main()
