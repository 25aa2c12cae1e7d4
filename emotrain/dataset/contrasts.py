"""Does a caption belong to its picture? Scores from the losses of pictures under each other's captions (no torch).

`picture_contrast.jsonl`, a line a picture: `{"id": "folder/a.png", "own": [...], "others": {"folder/b.png": [...]}}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TEMPERATURE = 0.05  # in log-loss: a caption that raises the loss by 5% is e times less likely to belong
_ROUNDS = 60
_UNSEEN = 1e-12  # likelihood of a pair that was not measured


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
            entry = json.loads(line)
            own = tuple(float(loss) for loss in entry["own"])
            others = tuple((str(name), tuple(float(loss) for loss in row)) for name, row in entry["others"].items())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"line {number} is not a picture with its losses") from error
        found.append(PictureContrast(str(entry["id"]), own, others))
    return found


def contrast_scores(pictures: Sequence[PictureContrast]) -> dict[str, float]:
    """How unlikely each picture's own caption is to be its own: -log of a probability, 0 where it is sure.

    Mean log-losses are explained as a part of the picture and a part of the caption (some are worse for every picture),
    fitted on the wrong captions alone. What is left makes likelihoods, balanced until every picture has one
    caption and every caption one picture (Sinkhorn 1964): the picture it was taken from claims a swapped caption.
    The more of the other captions were measured, the better: with all of them it is a matching.

    Raises:
        ValueError: a picture without other captions, or not with the same draws.
    """
    names = {one.id: k for k, one in enumerate(pictures)}
    for one in pictures:
        rows = [row for _, row in one.others]
        if not one.own or not rows or any(len(row) != len(one.own) for row in rows):
            raise ValueError(f"{one.id} has no losses to compare")
    entries = [
        (names[one.id], names[name], _mean_log(row)) for one in pictures for name, row in one.others if name in names
    ]
    if not entries:
        return dict.fromkeys(names, 0.0)
    of_picture, of_caption = _additive(entries, len(names))
    likely = np.full((len(names), len(names)), _UNSEEN)
    for row, column, value in [*entries, *((names[one.id], names[one.id], _mean_log(one.own)) for one in pictures)]:
        excess = value - of_picture[row] - of_caption[column]
        likely[row, column] = np.exp(np.clip(-excess / TEMPERATURE, -25.0, 25.0))
    for _ in range(_ROUNDS):
        likely /= likely.sum(axis=1, keepdims=True)
        likely /= likely.sum(axis=0, keepdims=True)
    own = -np.log(np.maximum(np.diag(likely), _UNSEEN))
    return {name: float(own[k]) for name, k in names.items()}


def _mean_log(losses: Sequence[float]) -> float:
    return float(np.log(np.maximum(losses, 1e-12)).mean())


def _additive(entries: Sequence[tuple[int, int, float]], count: int) -> tuple[Floats, Floats]:
    """Parts r, c of value = r[row] + c[column] + rest, by alternating means; a rare c is drawn towards 0."""
    rows, columns = (np.array([entry[k] for entry in entries]) for k in (0, 1))
    values = np.array([entry[2] for entry in entries])
    of_row, of_column = np.zeros(count), np.zeros(count)
    in_row, in_column = (np.bincount(index, minlength=count) for index in (rows, columns))
    for _ in range(20):
        of_row = np.bincount(rows, values - of_column[columns], count) / np.maximum(in_row, 1)
        of_column = np.bincount(columns, values - of_row[rows], count) / (in_column + 2.0)
    return of_row, of_column
