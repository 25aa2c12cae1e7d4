"""Is the run ended at the right step? Regret of the stop rule, beside other ways to end a run.

    python tests/bench/stop_regret.py [--work DIR] [--models tiny-sd tiny-flux] [--report docs/benchmarks]
    python tests/bench/stop_regret.py --pictures FOLDER --held-out FOLDER    another style, in place of the tasks
    python tests/bench/styles.py DIR    makes some, in DIR/*/train and DIR/*/heldout

Each cell is one long run (see longrun.py) whose oracle is its lowest true held-out loss. Regret is
(loss of the LoRA that is handed over - oracle) / (base - oracle). Every rule is tried on the same recorded runs: they
hear only what was known at each step. Cells are kept in the work folder and used again.

"held out" listens to 3 pictures that are not trained on, "flipped" to 3 training pictures, flipped and as they are;
both as often as the product does when left to itself, so that validations take a tenth of the run: every 20 steps with
micro-batches of 4 and every 30 with 1; flipped, every 30 and every 50.

The runs have the published step length (`train.gain: fixed`). That is the rule of a run that does not measure its
steps: with another optimizer than EmoSens, or where the preset says so. How the default ends is in
gain_trials.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from by_hand import write_report
from longrun import EVERY, Cell, LongRun, Task

from emotrain.pulse.draw import Panel, svg
from emotrain.pulse.replay import replay
from emotrain.pulse.stopping import StopRule
from emotrain.runs.build import validate_every

FIRST = {("tiny-sd", 4): (400, 900), ("tiny-sd", 1): (500, 1800)}
FIRST |= {("tiny-flux", 4): (500, 1200), ("tiny-flux", 1): (900, 2400)}


@dataclass(frozen=True)
class Ended:
    """What a rule did: the step it stopped at (None: never, within the run) and the step that it hands over."""

    stopped: int | None
    chosen: int


def trusted(run: LongRun, validation: str) -> Ended:
    """The product's own rule, fed with a recorded run as often as a run validations when left to itself."""
    record, every = run.record, listens_every(run.cell, 3 if validation == "held" else 0)
    rule, losses = StopRule(held_out=validation == "held"), getattr(record, validation)
    for step in range(record.steps + 1):
        if step:
            rule.update_step(record.ready[step - 1])
        if step % every == 0:
            plain = None if validation == "held" else run.plain(step)
            rule.update_validation(step, losses[str(step)], plain)
        if step and rule.decide(step):
            return Ended(step, rule.best_step or 0)
    return Ended(None, rule.best_step or 0)


def at_step(run: LongRun, step: int | None) -> Ended:
    """Stop at a step and hand over what there is, rounded up to where an adapter was kept."""
    last = run.kept()[-1]
    if step is None or step > run.record.steps:
        return Ended(None, last)
    return Ended(step, min(-(-step // EVERY) * EVERY, last))


def quiet(run: LongRun) -> Ended:
    """The first READY of generations 3.6 to 3.7.6, on the same losses."""
    observed_loss = run.record.observed_loss
    signals = {
        signal.name: signal.first for signal in replay(list(range(1, len(observed_loss) + 1)), observed_loss).signals
    }
    return at_step(run, signals["3.6-3.7.6 navi/sens"])


def ready(run: LongRun) -> Ended:
    """The first READY of 3.9."""
    lit = run.record.ready
    return at_step(run, lit.index(True) + 1 if True in lit else None)


def patient(run: LongRun, wait: int = 100) -> Ended:
    """Patience on the training loss: its average over about 50 steps has not improved for 100 steps."""
    losses = run.record.losses
    average, best, best_step = losses[0], float("inf"), 0
    for step, loss in enumerate(losses, 1):
        average += (loss - average) / min(step, 50)
        if average < best:
            best, best_step = average, step
        elif step - best_step >= wait:
            return at_step(run, step)
    return at_step(run, None)


RULES: dict[str, Callable[[LongRun], Ended]] = {
    "trusted, held out": lambda run: trusted(run, "held"),
    "trusted, flipped": lambda run: trusted(run, "flipped"),
    "first READY of 3.9": ready,
    "quiet signal (3.7.6)": quiet,
    "patience on the training loss": patient,
    "200 steps": lambda run: at_step(run, 200),
    "500 steps": lambda run: at_step(run, 500),
    "1,000 steps": lambda run: at_step(run, 1000),
    "the last step": lambda run: Ended(None, run.kept()[-1]),
    "lowest held-out validation, no stop": lambda run: lowest(run, "held"),
    "lowest flipped validation, no stop": lambda run: lowest(run, "flipped"),
}


def lowest(run: LongRun, validation: str) -> Ended:
    """The lowest validation of the whole long run: what a rule that never stops too early would hand over."""
    losses = getattr(run.record, validation)
    return Ended(None, int(min(losses, key=losses.__getitem__)))


def cells_of(models: Sequence[str], micro_batches: Sequence[int], baselines: Sequence[str]) -> list[Cell]:
    """4 tasks, 2 seeds; and the noisy set."""
    found = []
    for model in models:
        tasks = [Task(model, "ink", 32), Task(model, "signs", 8)]
        for micro_batch in micro_batches:
            places = [(task, seed) for seed in (0, 1) for task in tasks] + [(Task(model, "ink", 32, wrong=3), 0)]
            found += [
                Cell(task, micro_batch, seed, baseline=baseline) for task, seed in places for baseline in baselines
            ]
    return found


def title(cell: Cell) -> str:
    """Of a row or a plot."""
    return cell.place if cell.baseline == "auto" else f"{cell.place}, baseline {cell.baseline}"


@dataclass(frozen=True)
class Judged:
    """One rule on one cell."""

    rule: str
    cell: str
    stopped: int | None
    chosen: int
    regret: float
    steps_ratio: float | None  # steps used over the oracle's


def listens_every(cell: Cell, held_out: int) -> int:
    """Steps between two validations where the preset says `auto`: they may take a tenth of a small model's run."""
    return validate_every(cell.preset(Path("train"), Path("validation"), every="auto"), held_out)


def judge(run: LongRun) -> list[Judged]:
    """Every rule on one run; asking for a step's true loss may lower the oracle, so that comes first."""
    ended = {name: rule(run) for name, rule in RULES.items()}
    for one in ended.values():
        run.true(one.chosen)
    oracle = run.best()
    base, least = run.true(0), run.true(oracle)
    return [
        Judged(
            name,
            run.cell.name,
            one.stopped,
            one.chosen,
            (run.true(one.chosen) - least) / (base - least),
            one.stopped / oracle if one.stopped else None,
        )
        for name, one in ended.items()
    ]


def summary(judged: list[Judged]) -> list[str]:
    """One line per rule: median and worst regret, steps used, how often it stopped at all."""
    lines = ["| rule | regret: median | worst | steps / oracle's: median | most | stopped |", "|" + " --- |" * 6]
    for rule in RULES:
        own = [one for one in judged if one.rule == rule]
        regrets = [one.regret for one in own]
        ratios = [one.steps_ratio for one in own if one.steps_ratio is not None]
        used = f"{statistics.median(ratios):.2f} | {max(ratios):.2f}" if ratios else "- | -"
        lines.append(
            f"| {rule} | {statistics.median(regrets):.1%} | {max(regrets):.1%} | {used} | {len(ratios)} of {len(own)} |"
        )
    return lines


def table(runs: list[LongRun], judged: list[Judged]) -> list[str]:
    """Every cell: oracle, both trusted rules, controls."""
    heads = "cell | base | oracle @ step | run's steps | held out: stopped, chosen, regret | flipped |"
    lines = [f"| {heads} gain kept with wrong captions | drift without trigger |", "|" + " --- |" * 8]
    for run in runs:
        oracle = run.best()
        base, least = run.true(0), run.true(oracle)
        words = []
        for rule in list(RULES)[:2]:
            one = next(j for j in judged if j.rule == rule and j.cell == run.cell.name)
            words.append(f"{one.stopped or 'ceiling'}, {one.chosen}, {one.regret:.1%}")
        wrong, drift = run.controls(oracle)
        lines.append(
            f"| {title(run.cell)} | {base:.4f} | {least:.4f} @ {oracle} | {run.record.steps} |"
            f" {words[0]} | {words[1]} | {(base - wrong) / (base - least):.0%} | {drift:.3f} |"
        )
    return lines


def plot(runs: list[LongRun], judged: list[Judged]) -> str:
    """True held-out loss, both validations and where the held-out rule stopped, one panel a cell."""
    panels = []
    for run in runs:
        true = sorted((int(step), loss) for step, loss in run.record.true.items())
        held, flipped = (
            sorted((int(step), loss) for step, loss in losses.items())
            for losses in (run.record.held, run.record.flipped)
        )
        one = next(j for j in judged if j.cell == run.cell.name)
        marks = [(float(one.chosen), "handed over")] + ([(float(one.stopped), "stop")] if one.stopped else [])
        curves = [("held-out loss", true), ("validation, held out", held), ("validation, flipped", flipped)]
        panels.append(Panel(title(run.cell), curves, marks=marks))
    return svg(panels, title="When to stop", panel_height=110)


def main() -> None:
    """Train what is missing, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-cells"))
    parser.add_argument("--models", nargs="+", default=["tiny-sd", "tiny-flux"])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="with --pictures")
    parser.add_argument("--baselines", nargs="+", default=["auto"], help="auto corrected: both, side by side")
    parser.add_argument("--pictures", type=Path, help="another style to train on")
    parser.add_argument("--held-out", type=Path, help="at least 20 pictures of it to measure with")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = cells_of(args.models, args.micro_batches, args.baselines)
    if args.pictures:
        tasks = [Task.of_folders(model, args.pictures, args.held_out) for model in args.models]
        cells = [Cell(task, size, seed) for task in tasks for size in args.micro_batches for seed in args.seeds]
    runs, judged = [], []
    for cell in cells:
        run = LongRun(cell, args.work)
        run.train(*FIRST[cell.task.model, cell.micro_batch])
        runs.append(run)
        judged += judge(run)
        print(
            cell.name,
            run.record.steps,
            "oracle",
            run.best(),
            *[f"{one.regret:.1%}" for one in judged[-len(RULES) :][:2]],
        )
    lines = [*summary(judged), "", *table(runs, judged)]
    print("\n".join(lines))
    if args.report:
        text = Path(__file__).read_text(encoding="utf-8").split('"""')[1].strip()
        head = ["# When to stop", "", "`python tests/bench/stop_regret.py`", "", *text.splitlines()[6:], ""]
        write_report(args.report / "stop_regret.md", [*head, *lines])
        (args.report / "stop_regret.svg").write_text(plot(runs, judged), encoding="utf-8")


if __name__ == "__main__":
    main()
