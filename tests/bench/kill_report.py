"""The page with what was run and what came of it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import emotrain

TITLES = {
    "points": "SIGKILL at every point",
    "random": "SIGKILL at a random time, resumes killed again",
    "chain": "killed after every step: resume of a resume of a resume",
    "steps": "resume from the checkpoint of every step",
    "power": "power cut: what was not synced may be gone",
    "damage": "a file of the newest checkpoint damaged",
    "controls": "one item taken out of the checkpoint",
}
Rows = list[dict[str, Any]]


def page(results: Rows, notes: list[str]) -> str:
    """Markdown."""
    lines = [*HEAD.format(**machine()).strip().split("\n"), ""]
    lines += ["| what | case | runs | as it should be | checkpoints lost | most steps repeated | minutes |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for part, title in TITLES.items():
        for case in dict.fromkeys(row["case"] for row in results if row["part"] == part):
            rows = [row for row in results if (row["part"], row["case"]) == (part, case)]
            lines.append(f"| {title}{detail(part, rows)} | {case} | {figures(part, rows)} |")
    kills = sum(row.get("kills", 0) for row in results if row["part"] == "random")
    runs = sum(row["part"] == "random" for row in results)
    good = sum(row["ok"] for row in results)
    lines += ["", f"In all {len(results)} runs, {good} as they should be. The {runs} runs that were killed at a random"]
    lines += [f"time took {kills} kills. Minutes are those of one of several processes on two busy cores.", ""]
    lines += failures(results)
    lines += ["## What this does not cover", "", *(f"- {note}" for note in notes), ""] if notes else []
    lines += taken_out(results)
    return "\n".join(lines).rstrip() + "\n"


def detail(part: str, rows: Rows) -> str:
    """How many points there are, and how many of them left folders of their own."""
    if part != "points":
        return ""
    same = sum("same_as" in row for row in rows)
    return f" ({len(rows)} of {rows[0]['points']} points; {len(rows) - same} different folders)"


def figures(part: str, rows: Rows) -> str:
    """Runs, good ones, lost checkpoints, repeated steps, minutes."""
    lost = sum(bool(row.get("lost")) for row in rows) if part in ("points", "random", "power", "chain") else "-"
    repeated = max(row.get("repeated", 0) for row in rows) if part in ("points", "random", "chain") else "-"
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"{len(rows)} | {sum(row['ok'] for row in rows)} | {lost} | {repeated} | {minutes:.1f}"


def machine() -> dict[str, Any]:
    """Where it was run."""
    return {
        "version": emotrain.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def failures(results: Rows) -> list[str]:
    """Every run that was not as it should be."""
    bad = [row for row in results if not row["ok"]]
    lines = [
        f"- {', '.join(f'{key} {value}' for key, value in row.items() if key not in ('digest', 'commit'))}"
        for row in bad
    ]
    return ["## What was not as it should be", "", *(lines or ["Nothing."]), ""]


def taken_out(results: Rows) -> list[str]:
    """How each control was caught."""
    rows = [row for row in results if row["part"] == "controls"]
    lines = ["## What shows when an item is taken out", ""] if rows else []
    for case in dict.fromkeys(row["case"] for row in rows):
        lines += [f"### {case}", "", "| item | resumed half way | resumed at the last checkpoint |", "|---|---|---|"]
        for row in (one for one in rows if one["case"] == case):
            cells = [
                f"refused, exit {code}" if code else ", ".join(differs) or "-" for _, code, differs in row["shown"]
            ]
            lines.append(f"| {row['key']} | {' | '.join(cells)} |")
        lines.append("")
    return lines


HEAD = """
# Kill, resume, compare

`tests/bench/kill_resume.py` trains real runs (built-in model, example pictures), ends them in the hardest ways there
are, resumes them with the code that `emotrain resume` uses, and compares the end with that of an uninterrupted run:
sha256 over the adapter, the best adapter, the optimizer's tensors and its emotion, the stop rule, the counters, every
random generator (torch, numpy, python; an observer draws from all of them at every step), both LoRA files, the sample
pictures, and the logs without their times.

- **SIGKILL at every point**: ahead of every creation, rename, removal and fsync below the runs folder, and ahead of
  and after every stage of a save and prune; from before the run folder is there until the lock is gone. The run forks
  ahead of each kill; the killed process's folder is copied and resumed to the end, then the fork goes on to the next
  point, and its own end is compared too. Where a folder equals an earlier one to the byte, the resume is not done
  twice. Where no checkpoint had been committed, `resume` has to refuse (exit 5), and the run is started anew.
- **At a random time**: from outside; half of the resumes are killed again, up to three times in a chain.
- **After every step**: a checkpoint after each step, killed right after its commit, resumed, killed after the next.
- **Every step**: a checkpoint after each step, resumed with `--checkpoint STEP`.
- **Power cut**: killed at a random point; then only what had been fsynced is sure to be there. Other names come and
  go by chance, other files are whole, half, zeros or empty, and so is what was added to a log since its last fsync.
  Logs and sample pictures are compared as everything else.
- **Damage**: each file of the newest checkpoint cut in half or by a byte, emptied, zeroed, lengthened, missing, an
  older checkpoint's, or with one bit flipped at its first byte, in its header, at a third, at two thirds and at its
  last byte. The checkpoint before has to be used and the damaged one kept.
- **One item taken out**: what a fresh run would have stands in the checkpoint for one item at a time. The result has
  to differ or the resume has to be refused; the first line takes nothing out and has to be equal.

Each run has 5 steps, a checkpoint at 2, 4 and 5, eleven pictures in two bucket sizes, so that batches are ragged,
epochs end within steps and between them, and the largest batch is tried first where the first one is smaller.
"Checkpoints lost" counts runs whose newest checkpoint was older than the last committed one.

emotrain {version}, torch {torch}, Python {python}, {system}, {cores} cores, one thread. No GPU was used: nothing here
says anything about CUDA.

## What was run
"""
