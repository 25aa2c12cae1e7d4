"""Which pictures a run could not learn, from the loss of every sample (no torch).

A loss by itself says little: it depends far more on how noisy the sample was than on the picture. So
each loss is first compared with what all pictures have at the same place on the noise scale; what remains
is averaged per picture, early and late in the run apart, and held against the other pictures with a median
and a median deviation that no outlier moves.

  * hard: still far above the others at the end;
  * memorised: fell far below the others, and far more than they did;
  * suspicious: its own caption explains it no better than the captions of other pictures do (a wrong caption, a broken
    picture). That takes the contrast of `PictureContrast`, and a model that makes something of the captions; without
    these, high from the start and the least improved.

`picture_losses.jsonl` of a run: a line a step, `{"step": 7, "samples": [["folder/a.png", 0.31, 0.084], ...]}`: id,
position on the noise scale (0..1), the unweighted loss, and "no caption" where the sample went without. Such samples
are left out of the ranking (a loss without a caption is a higher one), but for pictures that never had one.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emotrain.dataset.contrasts import PictureContrast, contrast_scores

Verdict = Literal["suspicious", "hard", "memorised", "normal", "unseen"]
Floats = NDArray[np.float64]
BINS = 24
MIN_VISITS = 3  # in each half of the run
COMPARED = 8  # pictures whose captions were compared from where a wrong one stands out
NO_CAPTION = "no caption"
WRONG = -0.5  # contrast from where an own caption is taken for a wrong one: two thirds of the wrong ones are above ...
APART = (
    1.25  # ... if it is as many robust standard deviations above the others, whose captions may all be badly learned
)
HEARS = -2.2  # median contrast up to which the model makes enough of captions to tell
Z_OUTLIER = 3.5  # of medians and median deviations: Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers
MEANINGS: dict[Verdict, str] = {
    "suspicious": "its caption may be wrong, or the picture broken",
    "hard": "its loss stays far above the others'",
    "memorised": "its loss fell far below the others': seen too often, or a copy",
    "normal": "",
    "unseen": "seen too rarely to say",
}
_ORDER = {"suspicious": 0, "hard": 1, "memorised": 2, "normal": 3, "unseen": 4}


class LossRecord(NamedTuple):
    """The loss of one sample at one optimizer step; `position` on the noise scale in 0..1."""

    step: int
    id: str
    position: float
    loss: float
    captioned: bool = True


@dataclass(frozen=True)
class PictureScore:
    """One picture's place in the ranking.

    `early` and `late` are mean log-loss above (or below) what is usual at the same noise, in the run's first and second
    half; `z_early`, `z_late` the same in robust standard deviations of all pictures; `z_fall` how much less than the
    others it fell. `z_contrast` says how its own caption matches it in comparison with wrong ones: near 0 no better, -3
    three standard deviations better (None: not measured).
    `score` ranks: the higher, the more it deserves a look.
    """

    id: str
    verdict: Verdict
    score: float
    visits: int
    early: float
    late: float
    z_early: float
    z_late: float
    z_fall: float
    z_contrast: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_losses(lines: Iterable[str]) -> list[LossRecord]:
    """Records of a `picture_losses.jsonl`; a last line that was cut off is left out.

    Raises:
        ValueError: another line is not as described, with its number.
    """
    records: list[LossRecord] = []
    failed: int | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if failed is not None:
            raise ValueError(f"line {failed} is not a step with its samples")
        try:
            records += _records_of(json.loads(line))
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            failed = number
    return records


def _records_of(entry: Any) -> list[LossRecord]:
    step = int(entry["step"])
    records = []
    for name, position, loss, *more in entry["samples"]:
        record = LossRecord(step, str(name), float(position), float(loss), NO_CAPTION not in more)
        if math.isfinite(record.loss) and math.isfinite(record.position):
            records.append(record)
    return records


def excess(positions: Sequence[float], losses: Sequence[float]) -> Floats:
    """Log-loss of each sample above what is usual at its position: float64 [N].

    Usual is the median log-loss of the samples around it: of bins with equally many samples, linear between them.

    Raises:
        ValueError: not one position per loss, or none at all.
    """
    if len(positions) != len(losses) or not len(losses):
        raise ValueError(f"{len(positions)} positions and {len(losses)} losses")
    place = np.asarray(positions, np.float64)
    level = np.log(np.maximum(np.asarray(losses, np.float64), 1e-12))
    order = np.argsort(place, kind="stable")
    parts = np.array_split(order, max(1, min(BINS, len(order) // 12)))
    centres = np.array([np.median(place[part]) for part in parts])
    usual = np.array([np.median(level[part]) for part in parts])
    result: Floats = level - np.interp(place, centres, usual)
    return result


def robust_z(values: Sequence[float] | Floats, least_scale: float = 1e-6) -> Floats:
    """Distance from the median in units of 1.4826 median absolute deviations; `least_scale` bounds these from below."""
    array = np.asarray(values, np.float64)
    middle = np.median(array)
    scale = 1.4826 * np.median(np.abs(array - middle))
    result: Floats = (array - middle) / max(float(scale), least_scale)
    return result


def rank(
    records: Sequence[LossRecord],
    contrasts: Sequence[PictureContrast] = (),
    *,
    ids: Sequence[str] = (),
) -> tuple[PictureScore, ...]:
    """Rank the pictures of a run, those that most deserve a look first.

    Args:
        records: the loss of every sample.
        contrasts: the captions' contrast, where it was measured.
        ids: all pictures; those without records are ranked last, as unseen.

    Raises:
        ValueError: neither records nor ids.
    """
    names = sorted({record.id for record in records} | {one.id for one in contrasts} | set(ids))
    if not names:
        raise ValueError("no pictures to rank")
    captioned = {record.id for record in records if record.captioned}
    halves = _halves(sorted(one for one in records if one.captioned or one.id not in captioned))
    seen = [name for name in names if min(len(part.get(name, ())) for part in halves) >= MIN_VISITS]
    z_contrast = contrast_scores(contrasts)
    suspects = _suspects(z_contrast)
    early, late = (np.array([np.mean(part[name]) for name in seen]) for part in halves)
    numbers: dict[str, tuple[float, ...]] = {}
    if seen:
        noise = _sampling_error(halves, seen)
        rows = zip(
            seen, early, late, robust_z(early, noise), robust_z(late, noise), robust_z(late - early, noise), strict=True
        )
        numbers = {row[0]: tuple(float(value) for value in row[1:]) for row in rows}
    scores = [
        _score(name, numbers.get(name), sum(len(part.get(name, ())) for part in halves), z_contrast.get(name), suspects)
        for name in names
    ]
    return tuple(sorted(scores, key=lambda one: (_ORDER[one.verdict], -one.score, one.id)))


def _halves(records: Sequence[LossRecord]) -> tuple[Mapping[str, list[float]], ...]:
    """Excess of each picture's samples, in the run's first and second half apart."""
    halves: tuple[dict[str, list[float]], ...] = (defaultdict(list), defaultdict(list))
    if not records:
        return halves
    middle = np.median([record.step for record in records])
    for which in (0, 1):
        chosen = [record for record in records if (record.step > middle) == bool(which)]
        if chosen:
            above = excess([one.position for one in chosen], [one.loss for one in chosen])
            for record, value in zip(chosen, above, strict=True):
                halves[which][record.id].append(float(value))
    return halves


def _sampling_error(halves: Sequence[Mapping[str, list[float]]], seen: Sequence[str]) -> float:
    """Standard error of a picture's mean: differences below it are luck."""
    errors = [
        np.std(part[name], ddof=1) / math.sqrt(len(part[name]))
        for part in halves
        for name in seen
        if len(part[name]) > 1
    ]
    return float(max(np.median(errors), 1e-3)) if errors else 1.0


def caption_scores(contrasts: Sequence[PictureContrast]) -> dict[str, float]:
    """The contrast of every caption; none where too few were compared, or the model does not hear captions."""
    scores = contrast_scores(contrasts) if len(contrasts) >= COMPARED else {}
    return scores if scores and float(np.median(list(scores.values()))) <= HEARS else {}


def _suspects(z_contrast: Mapping[str, float]) -> frozenset[str] | None:
    """Pictures whose captions seem wrong; None where the contrast cannot tell."""
    values = list(z_contrast.values())
    if not values or float(np.median(values)) > HEARS:
        return None
    apart = dict(zip(z_contrast, robust_z(values, 1e-3), strict=True))
    return frozenset(name for name, value in z_contrast.items() if value >= WRONG and apart[name] >= APART)


def _score(
    name: str,
    numbers: tuple[float, ...] | None,
    visits: int,
    z_contrast: float | None,
    suspects: frozenset[str] | None,
) -> PictureScore:
    contrast = None if suspects is None else z_contrast
    if numbers is None and contrast is None:
        return PictureScore(name, "unseen", 0.0, visits, 0.0, 0.0, 0.0, 0.0, 0.0, z_contrast)
    early, late, z_early, z_late, z_fall = numbers or (0.0,) * 5
    from_start = min(z_early, z_late, z_late + z_fall)
    verdict: Verdict = "normal"
    score = contrast if contrast is not None else max(from_start, z_late, -z_fall if z_late < 0 else 0.0)
    if name in suspects if suspects is not None and contrast is not None else from_start >= Z_OUTLIER:
        verdict = "suspicious"
    elif z_late >= Z_OUTLIER:
        verdict, score = "hard", z_late
    elif z_late <= -Z_OUTLIER and z_fall <= -Z_OUTLIER:
        verdict, score = "memorised", -z_fall
    return PictureScore(name, verdict, score, visits, early, late, z_early, z_late, z_fall, z_contrast)
