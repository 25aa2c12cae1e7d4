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
    "steps": "resume from the checkpoint of every step",
    "controls": "one item taken out of the checkpoint",
    "damage": "a file of the newest checkpoint damaged",
    "power": "power cut: what was not synced may be gone",
}


def page(results: list[dict[str, Any]], notes: list[str]) -> str:
    """Markdown."""
    lines = [*HEAD.format(**machine()).strip().split("\n"), ""]
    lines += ["| what | case | runs | as it should be | checkpoints lost | most steps repeated | minutes |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    results = together(results)
    for part, title in TITLES.items():
        for facts in (one for one in results if one["part"] == part):
            rows = facts["rows"]
            lost = sum(bool(row.get("lost")) for row in rows) if part in ("points", "random", "power") else "-"
            repeated = max((row.get("repeated", 0) for row in rows), default=0)
            shown = repeated if part in ("points", "random") else "-"
            what = title
            if part == "points":
                what += f" ({len({row['point'] for row in rows})} of {facts['points']} points)"
            good = sum(row["ok"] for row in rows)
            minutes = facts["seconds"] / 60
            lines.append(f"| {what} | {facts['case']} | {len(rows)} | {good} | {lost} | {shown} | {minutes:.1f} |")
    kills = sum(row.get("kills", 0) for facts in results for row in facts["rows"])
    lines += ["", f"The runs killed at a random time took {kills} kills in all.", "", *failures(results)]
    lines += ["## What this does not cover", "", *(f"- {note}" for note in notes), ""] if notes else []
    lines += taken_out(results)
    return "\n".join(lines).rstrip() + "\n"


def together(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of several calls for the same part of the same case as one."""
    joined: dict[tuple[str, str], dict[str, Any]] = {}
    for facts in results:
        key = facts["case"], facts["part"]
        if key in joined and facts["part"] != "controls":
            joined[key]["rows"] += facts["rows"]
            joined[key]["seconds"] += facts["seconds"]
        else:
            joined[key] = {**facts, "rows": list(facts["rows"])}
    return list(joined.values())


def machine() -> dict[str, Any]:
    """Where it was run."""
    return {
        "version": emotrain.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def failures(results: list[dict[str, Any]]) -> list[str]:
    """Every run that was not as it should be."""
    lines = []
    for facts in results:
        for row in facts["rows"]:
            if not row["ok"]:
                words = ", ".join(f"{key} {value}" for key, value in row.items() if key != "ok")
                lines.append(f"- {facts['case']}, {facts['part']}: {words}")
    return ["## What was not as it should be", "", *(lines or ["Nothing."]), ""]


def taken_out(results: list[dict[str, Any]]) -> list[str]:
    """How each control was caught."""
    lines = ["## What shows when an item is taken out", ""]
    for facts in (one for one in results if one["part"] == "controls"):
        lines += [
            f"### {facts['case']}",
            "",
            "| item | resumed half way | resumed at the last checkpoint |",
            "|---|---|---|",
        ]
        for row in facts["rows"]:
            cells = [
                f"refused, exit {code}" if code else ", ".join(differs) or "-" for _, code, differs in row["shown"]
            ]
            lines.append(f"| {row['item']} | {' | '.join(cells)} |")
        lines.append("")
    return lines


HEAD = """
# Kill, resume, compare

`tests/bench/kill_resume.py` trains real runs (built-in model, example pictures), ends them in the hardest ways there
are, resumes them with the code that `emotrain resume` uses, and compares the end with that of an uninterrupted run:
sha256 over the adapter, the best adapter, the optimizer's tensors and its emotion, the stop rule, the counters, every
random generator (torch, numpy, python; an observer draws from all of them at every step), both LoRA files, the sample
pictures, and the logs without their times.

- **SIGKILL at every point**: ahead of every creation, rename, removal and fsync below the runs folder, and ahead of and
  after every stage of a save and prune; from before the run folder is there until the lock is gone. Every run is killed
  once, then resumed to its end. Where no checkpoint had been committed, `resume` has to refuse (exit 5), and the run is
  started anew.
- **At a random time**: from outside; half of the resumes are killed again, up to three times in a chain.
- **Every step**: a checkpoint after each step, resumed with `--checkpoint STEP`.
- **One item taken out**: what a fresh run would have stands in the checkpoint for one item at a time. The result has to
  differ or the resume has to be refused; the first line takes nothing out and has to be equal.
- **Damage**: each file of the newest checkpoint cut, with one bit flipped, missing, or an older checkpoint's. The one
  before has to be used and the damaged one kept.
- **Power cut**: killed at a random point; then only what had been fsynced is sure to be there. Other names come and go
  by chance, other files are whole, half, zeros or empty. Logs and sample pictures are not compared here: they are not
  fsynced.

"Checkpoints lost" counts runs whose newest checkpoint was older than the last committed one. Children are forked from a
process that has loaded model and data, so that hundreds of runs take minutes.

emotrain {version}, torch {torch}, Python {python}, {system}, {cores} cores, one thread. No GPU was used: nothing here
says anything about CUDA.

## What was run
"""
