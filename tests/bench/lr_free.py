"""Does LR 1.0 need an excuse? EmoSens, EmoAiry and EmoCats beside AdamW at five rates, Prodigy and schedule-free.

    python tests/bench/lr_free.py [--work DIR] [--models tiny-sd tiny-flux] [--report docs/benchmarks]

The tasks of stop_regret.py with micro-batches of 4, 400 steps each, the true held-out loss every 50 steps. Cells are
kept in the work folder and used again; the EmoSens ones are those of stop_regret.py.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from longrun import Cell, LongRun, Task
from stop_regret import FIRST

STEPS, GRID = 400, 50
NO_TASK = Task("", "", 0)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
CALM = (("generation", "3.7.6"),)
OPTIMIZERS: list[Cell] = [  # the task of each is put in later
    *[Cell(NO_TASK, 4, seed, "emosens", ear=ear) for ear in ("raw", "corrected") for seed in (0, 1)],
    Cell(NO_TASK, 4, 0, "emosens", words=CALM),
    Cell(NO_TASK, 4, 0, "emosens", words=CALM, ear="corrected"),
    Cell(NO_TASK, 4, 0, "emoairy"),
    Cell(NO_TASK, 4, 0, "emocats"),
    *[Cell(NO_TASK, 4, 0, "adamw", rate) for rate in RATES],
    Cell(NO_TASK, 4, 0, "prodigy", 1.0),
    Cell(NO_TASK, 4, 0, "schedulefree", 2.5e-3),
]


def label(cell: Cell) -> str:
    """How a row is called."""
    words = "".join(f", {value}" for _, value in cell.words)
    return f"{cell.optimizer} {cell.lr or 1.0:g}{words}" + (", corrected ear" if cell.ear == "corrected" else "")


def measure(cell: Cell, work: Path) -> tuple[LongRun, list[int]]:
    """Train a cell and measure it on the grid."""
    run = LongRun(cell, work)
    plain = cell.optimizer == "emosens" and cell.ear == "raw" and not cell.words
    run.train(*(FIRST[cell.task.model, 4] if plain else (STEPS, STEPS)))
    grid = list(range(0, STEPS + 1, GRID))
    for step in grid:
        run.true(step)
    return run, grid


def main() -> None:
    """Train what is missing, print one table a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-cells"))
    parser.add_argument("--models", nargs="+", default=["tiny-sd", "tiny-flux"])
    parser.add_argument("--report", type=Path)
    parser.add_argument("--kept-only", action="store_true", help="train nothing: the cells that are in the work folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    for model in args.models:
        for style, count in (("ink", 32), ("signs", 8)):
            lines += task_table(Task(model, style, count), args.work, args.kept_only)
    print("\n".join(lines))
    if args.report:
        head = [
            "# LR 1.0 beside the others",
            "",
            "`python tests/bench/lr_free.py`",
            "",
            *(__doc__ or "").splitlines()[4:],
        ]
        (args.report / "lr_free.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


def task_table(task: Task, work: Path, kept_only: bool) -> list[str]:
    """One line per optimizer: lowest loss and where, loss at the end, controls at the lowest."""
    lines = ["", f"## {task.name}", ""]
    heads = "optimizer, LR | seed | base | lowest @ step | at step 400 | gain kept with wrong captions"
    lines += [f"| {heads} | drift without trigger | median step length |", "|" + " --- |" * 8]
    for shape in OPTIMIZERS:
        cell = replace(shape, task=task)
        if kept_only and not (work / cell.name / "record.json").exists():
            continue
        run, grid = measure(cell, work)
        best = min(grid, key=run.true)
        wrong, drift = run.controls(best)
        base, least = run.true(0), run.true(best)
        kept = f"{(base - wrong) / (base - least):.0%}" if least < base else "-"
        pulse = sorted(run.record.pulse[:STEPS])[STEPS // 2]
        lines.append(
            f"| {label(shape)} | {shape.seed} | {base:.4f} | {least:.4f} @ {best} |"
            f" {run.true(STEPS):.4f} | {kept} | {drift:.3f} | {pulse:.1e} |"
        )
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    main()
