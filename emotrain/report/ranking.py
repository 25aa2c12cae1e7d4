"""A run's ranking of its pictures, as pages show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from emotrain.dataset.lint_types import PictureRow
from emotrain.dataset.ranking import MEANINGS, PictureScore

RANKED = 60  # pictures in the table, with previews
LISTED = 2000  # and in the list below it, without
LOOKS = {"suspicious": "error", "hard": "warning", "memorised": "warning", "normal": "good", "unseen": "quiet"}


def ranking_rows(
    scores: Sequence[PictureScore],
    pictures: Mapping[str, PictureRow],
    actions: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The rows of the table.

    Args:
        scores: the ranking, those that most deserve a look first.
        pictures: by id, with captions and previews where there are any.
        actions: by id, what the run did about a picture, a few words each.
    """
    rows = []
    for number, score in enumerate(scores[:LISTED]):
        picture = pictures.get(score.id)
        rows.append(
            {
                "id": score.id,
                "preview": picture.preview if picture and number < RANKED else b"",
                "caption": picture.captions[0] if picture and picture.captions else "",
                "verdict": score.verdict,
                "look": LOOKS[score.verdict],
                "meaning": MEANINGS[score.verdict],
                "actions": actions.get(score.id, ()),
                "contrast": "–" if score.z_contrast is None else f"{score.z_contrast:+.1f}",
                "early": f"{score.z_early:+.1f}",
                "late": f"{score.z_late:+.1f}",
                "visits": score.visits,
            }
        )
    return rows
