"""After a run: does each caption belong to its picture? Measured within a share of what training took."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from emotrain.dataset.loader import CachedDataset
from emotrain.errors import CheckpointError
from emotrain.runs.folder import RunFolder
from emotrain.runs.loaded import Loaded
from emotrain.runs.pictures import CONTRASTS, rank_pictures
from emotrain.train.contrast import contrastive_losses
from emotrain.train.events import Event, Notice, Phase
from emotrain.train.state import TrainState

SHARE = 0.1  # of the work of training
SAMPLE = 2.5  # forward passes that training with one sample is worth: there, and back to frozen weights' inputs
PLANS = ((7, 2), (3, 2), (3, 1), (2, 1))  # others, draws: dearest first
FEWEST = 8  # pictures with captions of their own from where wrong ones stand out
NAMED = 5  # pictures in the line for the user


@dataclass(frozen=True)
class Plan:
    """How much is measured: forward passes are `pictures * (1 + others) * draws`."""

    pictures: int
    others: int
    draws: int


def plan_contrast(num_pictures: int, samples_seen: int) -> Plan | None:
    """The most that a tenth of a run pays for; fewer pictures where it does not pay for all, None for too few.

    Args:
        num_pictures: with a caption.
        samples_seen: that the run trained with.
    """
    passes = int(SHARE * SAMPLE * samples_seen)
    for others, draws in PLANS:
        if (1 + others) * draws * num_pictures <= passes and others < num_pictures:
            return Plan(num_pictures, others, draws) if num_pictures >= FEWEST else None
    others, draws = PLANS[-1]
    pictures = min(num_pictures, passes // ((1 + others) * draws))
    return Plan(pictures, others, draws) if pictures >= FEWEST else None


def compare_captions(
    loaded: Loaded, state: TrainState, folder: RunFolder, notify: Callable[[Event], None], stop: Callable[[], bool]
) -> None:
    """Write `picture_contrast.jsonl` of a finished run and name the captions that may be wrong.

    The adapter is off: the base has not learned the wrong captions. Nothing of the run depends on it, and a signal
    ends it early.
    """
    captions = own_captions(loaded.data.train)
    plan = plan_contrast(len(captions), state.samples_seen)
    if plan is None:
        return
    if plan.pictures < len(captions):  # those first whose losses speak against them
        order = {score.id: k for k, score in enumerate(rank_pictures(folder))}
        chosen = sorted(captions, key=lambda name: order.get(name, len(order)))[: plan.pictures]
        captions = {name: captions[name] for name in chosen}
    if not _comparable(captions, plan.others):
        return
    model = loaded.model
    with model.adapter.off():
        found = contrastive_losses(
            model.family,
            model.objective,
            loaded.data.train,
            captions,
            others=plan.others,
            draws=plan.draws,
            seed=loaded.preset.train.seed,
            progress=lambda done, total: notify(Phase("comparing captions", done, total)),
            stop=stop,
        )
        lines = [json.dumps(one.to_dict()) + "\n" for one in found]
    try:
        (folder.path / CONTRASTS).write_text("".join(lines), encoding="utf-8", newline="\n")
        _tell(folder, notify)
    except (OSError, CheckpointError) as error:
        notify(Notice(f"the captions' comparison is lost: {error}"))


def own_captions(data: CachedDataset) -> dict[str, str]:
    """By id the captions of the pictures that have one; regularisation pictures apart."""
    return {one.id: one.captions[0] for one in data.examples if one.captions[0] and not one.prior}


def _comparable(captions: Mapping[str, str], others: int) -> bool:
    """Whether every picture finds so many captions that are not its own."""
    texts = list(captions.values())
    return len(texts) >= FEWEST and all(len(texts) - texts.count(text) >= others for text in set(texts))


def _tell(folder: RunFolder, notify: Callable[[Event], None]) -> None:
    scores = rank_pictures(folder)
    doubted = [one.id for one in scores if one.verdict == "suspicious" and one.z_contrast is not None]
    if doubted:
        names = ", ".join(doubted[:NAMED]) + (f" and {len(doubted) - NAMED} more" if len(doubted) > NAMED else "")
        what = f"captions that suit their pictures no better than those of others: {names}"
        notify(Notice(f"{what}; see `emotrain images {folder.path}`"))
