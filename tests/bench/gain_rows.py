"""The rows of gain_trials.py: which there are, and the tables that are made of them (no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from emotrain.pulse.gain import FACTOR, FAILURES, START, SURE, VAIN

KEPT = Path(__file__).parents[2] / "docs" / "benchmarks" / "gain_trials.jsonl"  # the rows of the report
STEPS = 1000  # the ceiling
LEVEL = 0.005  # of the gain
RULE = (
    f"begin at {START:g}, times {FACTOR:g} after {SURE} sure improvements, divided by it after {FAILURES} failed"
    f" validations, the average going on, end after {VAIN} in vain, none above {START:g}"
)
AFTER = 100  # steps beyond the end, or beyond the lowest validation
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Policy:
    """One row."""

    name: str
    optimizer: str = "emosens"
    lr: float | None = None
    gain: str = "fixed"
    flipped: bool = False
    network: str = "lora"
    sure: float = SURE  # validations before a measured gain rises
    cosine: bool = False  # over the steps of the best constant rate's lowest validation, at that rate

    @property
    def own(self) -> bool:
        """Whether it ends by itself."""
        return self.optimizer.startswith("emo")


PRODIGYPLUS = "prodigy-plus 1"  # its package is not among the project's: pip install prodigy-plus-schedule-free==2.0.1
ADAMW = tuple(Policy(f"adamw {rate:g}", "adamw", rate) for rate in RATES)
POLICIES = (
    Policy("gain auto", gain="auto"),
    Policy("gain fixed"),
    *ADAMW,
    Policy("adamw, cosine", "adamw", cosine=True),
    Policy("prodigy 1", "prodigy", 1.0),
    Policy("schedulefree 0.0025", "schedulefree", 2.5e-3),
    Policy(PRODIGYPLUS, "schedulefree", 1.0),
    Policy("emocats, gain fixed", "emocats"),
    Policy("emoairy, gain fixed", "emoairy"),
    Policy("emocats, gain auto from 1", "emocats", lr=1.0 / START, gain="auto", sure=math.inf),
    Policy("emoairy, gain auto from 1", "emoairy", lr=1.0 / START, gain="auto", sure=math.inf),
    Policy("lokr, gain auto", gain="auto", network="lokr"),
    Policy("lokr, gain fixed", network="lokr"),
    *(replace(policy, name=f"lokr, {policy.name}", network="lokr") for policy in ADAMW),
    Policy("gain auto, flipped", gain="auto", flipped=True, sure=math.inf),
    Policy("gain fixed, flipped", flipped=True),
)


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
    """The best AdamW row of a row's task, seed, network and base; None before enough rates were tried."""
    network = "lokr" if row["policy"].startswith("lokr") else "lora"
    rivals = rivals_of(row["task"], row["seed"], [other for other in rows if same_base(row, other)], network)
    return None if next_rate(rivals) else min(rivals.values(), key=lambda rival: float(rival["true"]))


def same_base(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are of the same base model: made anew, the third one is not the same to the last digit."""
    return math.isclose(row["base"], other["base"], rel_tol=1e-3)


def share_of(row: dict[str, Any], rival: dict[str, Any]) -> float:
    """Distance to another row of the task and seed, as a share of that one's gain."""
    return (rival["true"] - row["true"]) / (row["base"] - rival["true"])


def regret_of(row: dict[str, Any]) -> float:
    """Distance to the lowest loss of the row's own steps, as a share of what that gained."""
    return (row["true"] - row["lowest"]) / (row["base"] - row["lowest"])


def passes(row: dict[str, Any]) -> float:
    """Forward passes of single samples that a run of EmoSens takes; a backward pass counts as two."""
    return 12.0 * row["stopped"] + 12.0 * (row["stopped"] // row["every"] + 1) + 32.0


def beside(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per task and seed: EmoSens with its own stop, and the others given the best one."""
    heads = "task, seed | base | EmoSens | best AdamW | AdamW, cosine | Prodigy | to AdamW | to Prodigy | passes"
    lines = [f"| {heads} |", "|" + " --- |" * 9]
    for row in own_of(rows):
        rival = best_rival(row, rows)
        cosine, prodigy = (other_of(row, rows, policy) for policy in ("adamw, cosine", "prodigy 1"))
        rate = f" ({rival['policy'].split()[-1]})" if rival else ""
        cells = [
            f"{row['task']}, {row['seed']}",
            f"{row['base']:.4f}",
            cell(row),
            cell(rival) + rate,
            cell(cosine),
            cell(prodigy),
            f"{share_of(row, rival):+.1%}" if rival else "-",
            f"{share_of(row, prodigy):+.1%}" if prodigy else "-",
            f"{passes(row) / (12.0 * rival['chosen']):.2f}" if rival else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cell(row: dict[str, Any] | None) -> str:
    """Held-out loss and step of what is handed over."""
    if row is None:
        return "-"
    return f"{row['true']:.4f} @ {row['chosen']}{' (cut)' if cut_short(row) else ''}"


def ends(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per run as it is by default: how far it ended from its own best, and what its step length did."""
    heads = "task, seed | handed over @ step | ended | lowest @ step | regret | steps | step lengths"
    lines = [f"| {heads} |", "|" + " --- |" * 7]
    for row in own_of(rows):
        ended, steps = row["stopped"] if row["ended"] else "-", row["stopped"] / row["oracle"]
        lines.append(
            f"| {row['task']}, {row['seed']} | {cell(row)} | {ended} | {row['lowest']:.4f} @ {row['oracle']} |"
            f" {regret_of(row):.1%} | {steps:.2f} | {lengths(row)} |"
        )
    return lines


def lengths(row: dict[str, Any]) -> str:
    """The changes of a run's step length: gain and the step from which on it had it."""
    return ", ".join(f"{gain:.2g} @ {step}" for step, gain in row.get("changes") or []) or "-"


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per policy."""
    heads = "row | runs | of the gain: mean | worst | best | handed over at step: median | regret: median | worst"
    lines = [f"| {heads} |", "|" + " --- |" * 8]
    for policy in POLICIES:
        own = [(row, rival) for row in rows if row["policy"] == policy.name and (rival := best_rival(row, rows))]
        if not own:
            continue
        shares = [share_of(row, rival) for row, rival in own]
        line = f"| {policy.name} | {len(shares)} | {fmean(shares):+.1%} | {min(shares):+.1%} | {max(shares):+.1%} |"
        line += f" {median(row['chosen'] for row, _ in own):.0f} |"
        regrets = [regret_of(row) for row, _ in own if policy.own]
        lines.append(line + (f" {median(regrets):.1%} | {max(regrets):.1%} |" if regrets else " - | - |"))
    return lines


def own_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of what a run does by default."""
    return [row for row in rows if row["policy"] == "gain auto" and row["rule"] == RULE]


def targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a run promises, against what it does on styles that nothing was tuned on."""
    lines = ["| measure | target | here | runs |", "|" + " --- |" * 4]
    return lines + [f"| {name} | {target} | {here} |" for name, target, here in figures(rows)]


def figures(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, target, and two cells: the figure and the number of runs."""
    own = own_of(rows)
    pairs = [(row, rival) for row in own if (rival := best_rival(row, rows))]
    shares = [share_of(row, rival) for row, rival in pairs]
    seeds: dict[str, list[float]] = {}
    for (row, _), share in zip(pairs, shares, strict=True):
        seeds.setdefault(row["task"], []).append(share)
    by_task = [fmean(each) for each in seeds.values()]
    others = [share_of(row, other) for row in own if (other := other_of(row, rows, "prodigy 1"))]
    quick = [row["reached"] / rival["chosen"] for row, rival in pairs]
    cost = [passes(row) / (12.0 * rival["chosen"]) for row, rival in pairs]
    tried = [rivals_of(row["task"], row["seed"], [o for o in rows if same_base(row, o)]).values() for row, _ in pairs]
    search = [passes(row) / sum(12.0 * o["chosen"] for o in of) for (row, _), of in zip(pairs, tried, strict=True)]
    ratios = [row["stopped"] / row["oracle"] for row in own]
    early = [ratio for row, ratio in zip(own, ratios, strict=True) if row["ended"]]
    regrets = [regret_of(row) for row in own if row["ended"]]
    flipped = [regret_of(row) for row in rows if row["policy"] == "gain auto, flipped"]
    return [
        ("of the gain, to the best AdamW: mean", "at least 0 %", said(shares, fmean)),
        ("the same: worst run", "at least -1.5 %", said(shares, min)),
        ("the same: worst task, mean of its seeds", "at least -1.5 %", said(by_task, min)),
        ("the same: runs ahead, level within 0.5 %, behind", "-", counted(shares)),
        ("of the gain, to Prodigy: mean", "at least 0 %", said(others, fmean)),
        ("the same: runs ahead, level within 0.5 %, behind", "-", counted(others)),
        ("within 1 % of its lowest, over the best AdamW's steps: median, most", "at most 1.3",
         said(quick, median, max, form=".2f")),
        ("regret of the runs that ended: median, worst", "at most 1 %, 4 %", said(regrets, median, max, form=".1%")),
        ("regret, flipped (a trial, no run has it): median, worst", "at most 2.5 %, 8 %",
         said(flipped, median, max, form=".1%")),
        ("steps over the oracle's: median", "at most 1.4", said(ratios, median, form=".2f")),
        ("the same, runs that ended: least", "at least 0.8", said(early, min, form=".2f")),
        ("forward passes over those of the best AdamW with a known number of steps: median, most", "at most 1",
         said(cost, median, max, form=".2f")),
        ("the same over those of all rates tried, each up to its best: median, most", "-",
         said(search, median, max, form=".2f")),
    ]  # fmt: skip


def other_of(row: dict[str, Any], rows: Sequence[dict[str, Any]], policy: str) -> dict[str, Any] | None:
    """The row of a policy on the same task, seed and base."""
    place = (row["task"], row["seed"], policy)
    return next((o for o in rows if place == (o["task"], o["seed"], o["policy"]) and same_base(row, o)), None)


def counted(shares: Sequence[float]) -> str:
    """How many are ahead, level and behind, and how many there are: two cells of a table."""
    ahead, behind = sum(share > LEVEL for share in shares), sum(share < -LEVEL for share in shares)
    return f"{ahead}, {len(shares) - ahead - behind}, {behind} | {len(shares)}"


def said(values: Sequence[float], *of: Callable[[Sequence[float]], float], form: str = "+.1%") -> str:
    """These figures of the values and how many there are: two cells of a table."""
    words = ", ".join(format(function(values), form) for function in of) if values else "-"
    return f"{words} | {len(values)}"


def cut_short(row: dict[str, Any]) -> bool:
    """Whether a row was ended by the ceiling of the bench; a cosine schedule has its own end."""
    own = (
        not row["ended"]
        if "ended" in row
        else row["policy"] != "adamw, cosine" and row["chosen"] > row["steps"] - AFTER
    )
    return own and row["steps"] >= row["ceiling"]


def kept(file: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The rows of a file by task, seed and policy; of several the last."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {(row["task"], row["seed"], row["policy"]): row for row in map(json.loads, lines)}


def whole(rows: Iterable[dict[str, Any]], ceiling: int) -> list[dict[str, Any]]:
    """Those that a ceiling of now has not cut, or would cut as well: the others are trained again."""
    return [row for row in rows if row["ceiling"] >= ceiling or not cut_short(row)]


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """All tables of these rows."""
    order = {policy.name: place for place, policy in enumerate(POLICIES)}
    rows = [row for row in rows if row["policy"] in order]
    places = list(dict.fromkeys(row["task"] for row in rows))
    rows.sort(key=lambda row: (places.index(row["task"]), row["seed"], order[row["policy"]]))
    parts = [
        targets(rows),
        ["Each task:", "", *beside(rows)],
        ["Each row, to the best AdamW of its task and seed:", "", *summary(rows)],
        ["Where runs ended:", "", *ends(rows)],
    ]
    return [line for part in parts for line in ([""] if part is not parts[0] else []) + part]
