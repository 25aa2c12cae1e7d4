"""Which pictures a finished (or running) run could not learn, from what it recorded (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emotrain.dataset.contrasts import parse_contrasts
from emotrain.dataset.ranking import PictureScore, parse_losses, rank
from emotrain.errors import CheckpointError
from emotrain.files import read_regular
from emotrain.runs.folder import RunFolder
from emotrain.train.suspects import Action

LOSSES = "picture_losses.jsonl"
MAX_LOG = 2**30  # bytes
CONTRASTS = "picture_contrast.jsonl"


def rank_pictures(folder: RunFolder) -> tuple[PictureScore, ...]:
    """The ranking of a run's pictures.

    Raises:
        CheckpointError: the run recorded no losses, or its files are damaged.
    """
    losses = _lines(folder, LOSSES)
    if losses is None:
        raise CheckpointError(
            f"run `{folder.name}` has no {LOSSES}", "it is written from the first step on: train a few epochs first"
        )
    try:
        records = parse_losses(losses)
        contrasts = parse_contrasts(_lines(folder, CONTRASTS) or [])
        return rank(records, contrasts)
    except ValueError as error:
        raise CheckpointError(f"run `{folder.name}`: its losses cannot be ranked: {error}") from error


def actions_of(info: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a run did about its pictures, by id, a few words each; entries of run.json that are none are left out."""
    found: dict[str, list[str]] = {}
    written = info.get("picture_actions")
    for entry in written if isinstance(written, list) else []:
        action = Action.from_dict(entry) if isinstance(entry, dict) else None
        if action is not None:
            found.setdefault(action.id, []).append(action.describe())
    return found


def _lines(folder: RunFolder, name: str) -> list[str] | None:
    try:
        text = read_regular(folder.path / name, MAX_LOG).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder.path / name} cannot be read: {error}") from error
    return text.split("\n")
