"""Does a caption belong to its picture? Scores from the losses of pictures under each other's captions (no torch).

`picture_contrast.jsonl`, a line a picture: `{"id": "folder/a.png", "own": [...], "others": {"folder/b.png": [...]}}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SHRINK = 2.0  # a caption's own part is drawn towards 0 as if it had been seen so many more times without any


@dataclass(frozen=True)
class PictureContrast:
    """Losses of one picture under several captions, at the same noise and timesteps each.

    `own` holds one loss per noise draw with its own caption; `others` the same draws with the caption of another
    picture, by that picture's id.
    """

    id: str
    own: tuple[float, ...]
    others: tuple[tuple[str, tuple[float, ...]], ...]

    def to_dict(self) -> dict[str, Any]:
        """A line of `picture_contrast.jsonl`."""
        return {"id": self.id, "own": list(self.own), "others": {name: list(row) for name, row in self.others}}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> PictureContrast:
        others = tuple((str(name), tuple(float(loss) for loss in row)) for name, row in entry["others"].items())
        return cls(str(entry["id"]), tuple(float(loss) for loss in entry["own"]), others)

    def joined(self, more: PictureContrast) -> PictureContrast:
        """With the draws of another measurement under the same captions."""
        rows = dict(more.others)
        others = tuple((name, (*row, *rows[name])) for name, row in self.others)
        return PictureContrast(self.id, (*self.own, *more.own), others)


def parse_contrasts(lines: Iterable[str]) -> list[PictureContrast]:
    """Records of a `picture_contrast.jsonl`.

    Raises:
        ValueError: a line is not as described, with its number.
    """
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(PictureContrast.from_dict(json.loads(line)))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"line {number} is not a picture with its losses") from error
    return found


def contrast_scores(pictures: Sequence[PictureContrast]) -> dict[str, float]:
    """How much better its own caption matches each picture than a wrong one: 0 is no better, -3 is 3 deviations better.

    Mean log-losses under wrong captions are explained as a part of the picture and a part of the caption (some are
    worse for every picture). What they do not explain is how much wrong captions differ for one picture; in that
    standard deviation the own caption's log-loss is measured from what a wrong one would give. Where the model makes
    nothing of the words, all pictures are near 0.

    Raises:
        ValueError: a picture without two other captions, or not with the same draws.
    """
    for one in pictures:
        losses = [row for _, row in one.others]
        if not one.own or len(losses) < 2 or any(len(row) != len(one.own) for row in losses):
            raise ValueError(f"{one.id} has no losses to compare")
    if not pictures:
        return {}
    captions = sorted({one.id for one in pictures} | {name for one in pictures for name, _ in one.others})
    place = {name: k for k, name in enumerate(captions)}
    entries = _entries(pictures, place)
    index = np.array([entry[:2] for entry in entries])
    values = np.array([entry[2] for entry in entries])
    of_picture, of_caption, deviation = _additive(index[:, 0], index[:, 1], values, len(captions))
    return {
        one.id: float((_mean_log(one.own) - of_picture[row] - of_caption[place[one.id]]) / deviation)
        for row, one in enumerate(pictures)
    }


def _entries(pictures: Sequence[PictureContrast], place: dict[str, int]) -> list[tuple[int, int, float]]:
    """Row, column and mean log-loss of every wrong caption measured."""
    return [(row, place[name], _mean_log(losses)) for row, one in enumerate(pictures) for name, losses in one.others]


def _mean_log(losses: Sequence[float]) -> float:
    return float(np.log(np.maximum(losses, 1e-12)).mean())


def _additive(
    rows: NDArray[np.int64], columns: NDArray[np.int64], values: Floats, num_captions: int
) -> tuple[Floats, Floats, float]:
    """Parts r, c of value = r[row] + c[column] + rest, by alternating means, and the deviation of a new one's rest."""
    num_pictures = int(rows.max()) + 1
    in_row, in_column = np.bincount(rows), np.bincount(columns, minlength=num_captions)
    of_row, of_column = np.zeros(num_pictures), np.zeros(num_captions)
    for _ in range(20):
        of_row = np.bincount(rows, values - of_column[columns]) / in_row
        of_column = np.bincount(columns, values - of_row[rows], num_captions) / (in_column + SHRINK)
    rest = values - of_row[rows] - of_column[columns]
    fitted = num_pictures + float((in_column / (in_column + SHRINK)).sum()) - 1.0
    free = max(len(values) - fitted, 1.0) / len(values)
    spread = 1.4826 * float(np.median(np.abs(rest)))  # a few odd captions must not hide the others
    return of_row, of_column, max(spread * math.sqrt((1.0 + 1.0 / in_row.mean()) / free), 1e-3)
