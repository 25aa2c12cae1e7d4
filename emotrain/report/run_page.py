"""The page of one run, and the page that sets several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from emotrain.pulse.draw import Panel, svg
from emotrain.report.pages import render
from emotrain.report.ranking import RANKED, ranking_rows
from emotrain.report.run_view import Points, PromptRow, RunView

WIDE, NARROW = 1000, 380  # pixels of the charts: one for each kind of screen, so that their text stays readable
MOST_POINTS = 400  # of a curve; a longer one keeps the lowest and highest value of each stretch
SMOOTHED = 40  # the mean goes over a 40th of the run
SIDE_BY_SIDE = 6  # runs whose facts, samples and settings stand in a column each
LARGE = ("steps", "training time", "pictures")  # facts in the head of the page; the others are in a line below
HEADLINES = {
    "signal": ("stopped automatically", "good"),
    "max_steps": ("reached train.max_steps", "good"),
    "interrupted": ("interrupted: saved, can be resumed", "warning"),
    "diverged": ("diverged", "error"),
    "running": ("running", "info"),
    "crashed": ("crashed", "error"),
    "damaged": ("run.json is damaged", "error"),
}


def run_page(run: RunView, refresh_s: int = 0) -> str:
    """The whole page as one string, ready for a file; it loads itself again every `refresh_s` seconds, 0: never."""
    sections = [
        ("curves", "Curves", True),
        ("samples", "Samples", True),
        ("lora", "The LoRA", run.lora),
        ("ranking", "Pictures", run.ranking),
        ("settings", "Settings", run.settings.every),
    ]
    return render(
        "run.html",
        script="gallery.js",
        refresh=refresh_s,
        title=f"{run.name}: run report",
        run=run,
        headline=headline(run),
        gain=gain(run),
        sections=[(name, heading) for name, heading, content in sections if content],
        large=LARGE,
        charts=charts(run_panels(run)),
        load_command=f"pipeline.load_lora_weights({run.lora.path!r})" if run.lora else "",
        ranking=ranking_rows(run.ranking, run.pictures, run.actions),
        ranked=RANKED,
    )


def compare_page(
    runs: Sequence[RunView], differences: Sequence[tuple[str, Sequence[str]]], links: Sequence[str]
) -> str:
    """A line for each run; up to SIDE_BY_SIDE of them beside each other, too.

    Args:
        runs: two or more.
        differences: preset keys in which they are not all alike, with each run's value.
        links: the page of each, empty where there is none.
    """
    groups = comparable(runs)
    labels = list(dict.fromkeys(label for run in runs for label, _ in run.facts))
    return render(
        "compare.html",
        title="runs: " + ", ".join(run.name for run in runs),
        runs=runs,
        overview=list(zip(runs, [headline(run) for run in runs], links, map(newest_sample, runs), strict=True)),
        beside=len(runs) <= SIDE_BY_SIDE,
        most=SIDE_BY_SIDE,
        facts=[(label, [dict(run.facts).get(label, "–") for run in runs]) for label in labels],
        groups=groups,
        without=[run for run in runs if not any(run in group for group in groups)],
        charts=[charts([_validations(group)]) for group in groups],
        rows=shared_prompts(runs),
        differences=differences,
    )


def newest_sample(run: RunView) -> bytes:
    """The last sample of the first prompt, a JPEG; empty where there is none."""
    pictures = run.gallery.rows[0].pictures if run.gallery.rows else ()
    return next((one for one in reversed(pictures) if one), b"")


def headline(run: RunView) -> tuple[str, str]:
    """How it ended, in a few words, and the class of their colour."""
    return HEADLINES.get(run.status, (run.status, "warning"))


def gain(run: RunView) -> str:
    """How far the validation loss fell: `-54 %`; empty where that is not known."""
    if not run.base_loss or run.best_loss is None:
        return ""
    return f"{100.0 * (run.best_loss / run.base_loss - 1.0):+.0f} %"


def comparable(runs: Sequence[RunView]) -> list[list[RunView]]:
    """Runs whose validation losses may stand side by side, the largest group first; those without any are left out."""
    groups: dict[object, list[RunView]] = {}
    for run in runs:
        if run.same_validation is not None and run.curves.validation:
            groups.setdefault(run.same_validation, []).append(run)
    return sorted(groups.values(), key=len, reverse=True)


def shared_prompts(runs: Sequence[RunView]) -> list[tuple[PromptRow, list[tuple[str, bytes]]]]:
    """Prompts that every run drew in the same way, each with (column, picture) of every run's last column."""
    found: list[dict[Any, PromptRow]] = [
        {(row.prompt, row.negative, row.details): row for row in run.gallery.rows} for run in runs
    ]
    rows = []
    for key, row in found[0].items():
        if all(key in other for other in found):
            last = [(run.gallery.columns[-1], other[key].pictures[-1]) for run, other in zip(runs, found, strict=True)]
            rows.append((row, last))
    return rows


def charts(panels: Sequence[Panel]) -> list[tuple[str, Markup]]:
    """The same panels for wide and for narrow screens; nothing without curves."""
    drawn = [panel for panel in panels if any(curve for _, curve in panel.curves)]
    if not drawn:
        return []
    return [
        ("wide", Markup(svg(drawn, width=WIDE, panel_height=130))),  # svg() escapes every text in it
        ("narrow", Markup(svg(drawn, width=NARROW, panel_height=110))),
    ]


def run_panels(run: RunView) -> list[Panel]:
    """Loss and validation, and the emotion's signals underneath, on one x axis."""
    curves = run.curves
    marks = [(float(run.best_step), f"best: step {run.best_step}")] if run.best_step is not None else []
    if run.last_step and run.last_step != run.best_step:
        word = "now" if run.status == "running" else "end"
        marks.append((float(run.last_step), f"{word}: step {run.last_step}"))
    base: Points = ()
    if run.base_loss is not None and curves.validation:
        base = tuple((x, run.base_loss) for x in (curves.validation[0][0], float(run.last_step or 1)))
    likeness: list[tuple[str, Points]] = [("samples", curves.likeness)]
    if curves.likeness:
        ends = (curves.likeness[0][0], float(run.last_step or 1))
        likeness += [(label, tuple((x, value) for x in ends)) for label, value in run.likeness]
    return [
        Panel("training loss", [("mean", thin(smooth(curves.loss))), ("each step", thin(curves.loss))], marks=marks),
        Panel("validation loss", [("with the LoRA", thin(curves.validation)), ("without", base)], marks=marks),
        Panel("likeness", likeness, marks=marks),
        Panel("scalar", [("", thin(curves.scalar))]),
        Panel("trust", [("", thin(curves.trust))]),
        Panel("emoPulse (logarithmic)", [("", thin(curves.pulse))], log=True),
    ]


def _validations(group: Sequence[RunView]) -> Panel:
    """The curves of a group; of a large one those of the five best runs, which colours can still tell apart."""
    best = sorted(group, key=lambda run: math.inf if run.best_loss is None else run.best_loss)[:5]
    title = "validation loss" if len(best) == len(group) else "validation loss of the five best"
    return Panel(title, [(run.name[:24], thin(run.curves.validation)) for run in group if run in best])


def smooth(points: Points) -> Points:
    """The mean of each value and those around it, a 40th of the series in all."""
    reach = max(1, len(points) // (2 * SMOOTHED))
    if len(points) < 8:
        return ()
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    edges = [(max(0, k - reach), min(len(points), k + reach + 1)) for k in range(len(points))]
    return tuple((x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, edges, strict=True))


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points: the lowest and the highest of each stretch, in their order, and both ends."""
    if len(points) <= most:
        return points
    stretches = (most - 2) // 2
    kept = [points[0]]
    for k in range(stretches):
        part = points[k * len(points) // stretches : (k + 1) * len(points) // stretches]
        low, high = min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])
        kept += sorted({low, high})
    return (*kept, points[-1])
