"""Does each caption belong to its picture? Measured after a run or as it goes, for a share of what training takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from emotrain.dataset.captions import uniform
from emotrain.dataset.contrasts import PictureContrast
from emotrain.dataset.loader import CachedDataset
from emotrain.dataset.ranking import COMPARED
from emotrain.errors import CheckpointError, listed
from emotrain.runs.folder import RunFolder
from emotrain.runs.loaded import Loaded
from emotrain.runs.pictures import CONTRASTS, rank_pictures
from emotrain.train.contrast import contrastive_losses, one_draw
from emotrain.train.events import Event, Notice, Phase, PictureAction
from emotrain.train.state import TrainState
from emotrain.train.suspects import REASONS, describe

SHARE = 0.1  # of the work of training
SAMPLE = 2.5  # forward passes that training with one sample is worth: there, and back to frozen weights' inputs
PLANS = ((7, 2), (3, 2), (3, 1), (2, 1))  # others, draws: dearest first
OTHERS, DRAWS = 3, 4  # captions that each picture's own is compared with during a run, and noise draws at most
AHEAD = 0.5  # of the ceiling is taken for trained, before it is
NAMED = 5  # pictures in the line for the user


class Watch:
    """Looks at the pictures of a run as it goes, and changes what they count (`dataset.suspects`).

    Every picture is measured once before the first step, as far as AHEAD of the ceiling pays for it, and again while a
    tenth of the training so far does. What it finds lies in the run's state: a resumed run goes on as it would have.
    """

    def __init__(self, loaded: Loaded, folder: RunFolder, notify: Callable[[Event], None]) -> None:
        self.loaded, self.folder, self.notify = loaded, folder, notify
        self.captions = own_captions(loaded.data.train)

    def __call__(self, state: TrainState) -> None:
        """Measure, decide, tell."""
        mode = self.loaded.preset.dataset.suspects
        assert mode != "report"
        if _comparable(self.captions, OTHERS):
            self._measure(state)
        changed = state.suspects.decide(state.step, mode)
        for one in changed:
            undone = one.undone is not None
            self.notify(PictureAction(state.step, one.id, one.kind, undone, REASONS[one.kind]))
        for line in describe(changed):
            self.notify(Notice(line, level="info"))
        if changed:
            self.folder.update_info(picture_actions=[asdict(one) for one in state.suspects.actions])

    def _measure(self, state: TrainState) -> None:
        """One more draw of each picture in turn, those with the fewest first, while it is paid for."""
        model, train, suspects = self.loaded.model, self.loaded.preset.train, state.suspects
        ranks = self.loaded.ranks
        ceiling = train.max_steps * train.micro_batch_size * state.micro_batches
        paid = int(SHARE * SAMPLE * max(state.samples_seen, AHEAD * ceiling))
        names = sorted(self.captions, key=lambda name: uniform(f"watch/{train.seed}/{name}"))
        missing = [
            (number, name)
            for number in range(DRAWS)
            for name in names
            if name not in suspects.contrasts or len(suspects.contrasts[name].own) <= number
        ]
        due = missing[: max(0, paid - suspects.passes) // (OTHERS + 1)]
        own = []
        with model.adapter.off():
            for place, (number, name) in enumerate(due):
                if ranks.has(place):
                    found = one_draw(
                        model.family, model.objective, self.loaded.data.train, self.captions, name,
                        number=number, others=OTHERS, seed=train.seed,
                    )  # fmt: skip
                    own.append(found.to_dict())
        everyones = ranks.meet(own)
        for place, (_, name) in enumerate(due):
            found = PictureContrast.from_dict(everyones[place % ranks.world][place // ranks.world])
            known = suspects.contrasts.get(name)
            suspects.contrasts[name] = found if known is None else known.joined(found)
            suspects.passes += OTHERS + 1


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
            return Plan(num_pictures, others, draws) if num_pictures >= COMPARED else None
    others, draws = PLANS[-1]
    pictures = min(num_pictures, passes // ((1 + others) * draws))
    return Plan(pictures, others, draws) if pictures >= COMPARED else None


def compare_captions(
    loaded: Loaded, state: TrainState, folder: RunFolder, notify: Callable[[Event], None], stop: Callable[[], bool]
) -> None:
    """Write `picture_contrast.jsonl` of a finished run and name the captions that may be wrong.

    The adapter is off: the base has not learned the wrong captions. Nothing of the run depends on it, and a signal
    ends it early.
    """
    if state.suspects.contrasts:
        _write(folder, list(state.suspects.contrasts.values()), notify)
        return
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
        measured = list(found)
    _write(folder, measured, notify)


def _write(folder: RunFolder, contrasts: Sequence[PictureContrast], notify: Callable[[Event], None]) -> None:
    """The log, and a line for the user."""
    lines = [json.dumps(one.to_dict()) + "\n" for one in contrasts]
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
    return len(texts) >= COMPARED and all(len(texts) - texts.count(text) >= others for text in set(texts))


def _tell(folder: RunFolder, notify: Callable[[Event], None]) -> None:
    scores = rank_pictures(folder)
    doubted = [one.id for one in scores if one.verdict == "suspicious" and one.z_contrast is not None]
    if doubted:
        what = f"captions that match their pictures no better than those of others: {listed(doubted, NAMED)}"
        notify(Notice(f"{what}; see `emotrain images {folder.path}`"))
