"""What a run does about pictures that hold it back: found out as it goes, undone where the evidence goes.

A picture whose caption matches it clearly worse than those of others counts a tenth, or is left out; one whose loss
fell far below the others' is shown a quarter as often. Whoever is not shown makes room for another picture of its
folder and size, so that batches and epochs stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from emotrain.dataset.contrasts import PictureContrast
from emotrain.dataset.ranking import LossRecord, caption_scores, rank
from emotrain.errors import listed

Mode = Literal["weigh", "leave_out"]
Kind = Literal["weigh", "leave_out", "seldom"]
CLEAR = 0.5  # contrast from where something is done: a part of the wrong captions have it, hardly a right one
GONE = 0.0  # and below which it is undone
LESS = 0.1  # of the gradient of a picture that may teach the wrong thing
SELDOM = 0.25  # of the showings of a memorised one
REMEMBERED = 20_000  # losses of single samples that are ranked
NAMED = 5  # pictures in a line for the user
WORDS: dict[Kind, str] = {
    "weigh": "counting a tenth",
    "leave_out": "left out",
    "seldom": "shown a quarter as often",
}
REASONS: dict[Kind, str] = {
    "weigh": "its caption matches it worse than those of others",
    "leave_out": "its caption matches it worse than those of others",
    "seldom": "its loss fell far below the others': it is memorised",
}


@dataclass(frozen=True)
class Action:
    """Something done about one picture from the end of `step` on, to the end of `undone` (None: it still is)."""

    id: str
    kind: Kind
    step: int
    undone: int | None = None

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Action | None:
        """The action that `asdict` made a mapping of; None where it is none."""
        name, kind, step, undone = (entry.get(key) for key in ("id", "kind", "step", "undone"))
        if not isinstance(name, str) or kind not in WORDS or not isinstance(step, int):
            return None
        return cls(name, kind, step, undone if isinstance(undone, int) else None)

    def describe(self) -> str:
        """Such as `counting a tenth since step 30`."""
        when = f"since step {self.step}" if self.undone is None else f"from step {self.step} to {self.undone}"
        return f"{WORDS[self.kind]} {when}"


@dataclass
class Suspects:
    """All that the decisions of a run depend on, and the decisions."""

    actions: list[Action] = field(default_factory=list)  # in the order they were taken
    contrasts: dict[str, PictureContrast] = field(default_factory=dict)
    losses: list[LossRecord] = field(default_factory=list)
    passes: int = 0  # forward passes that the contrasts took

    def __post_init__(self) -> None:
        self._count()

    def _count(self) -> None:
        """Set what the actions come to, by id, until they change: every step asks for it.

        `weights` is what the gradient of a picture counts, `shares` how often it is shown in comparison with what the
        data set says; 1 for those that are not in it.
        """
        how = {"leave_out": 0.0, "seldom": SELDOM}
        self.weights = {one.id: LESS for one in self.active() if one.kind != "seldom"}
        self.shares = {one.id: how[one.kind] for one in self.active() if one.kind in how}

    def active(self) -> list[Action]:
        """What is being done now."""
        return [one for one in self.actions if one.undone is None]

    def note(self, records: Iterable[LossRecord]) -> None:
        """Remember the losses of a step."""
        self.losses.extend(records)
        del self.losses[:-REMEMBERED]

    def decide(self, step: int, mode: Mode) -> list[Action]:
        """Rank the pictures; the actions that begin or end with this step."""
        if not self.losses and not self.contrasts:
            return []
        contrasts = list(self.contrasts.values())
        acted = {one.id for one in self.active() if one.kind == mode}
        worse = {name: score >= (GONE if name in acted else CLEAR) for name, score in caption_scores(contrasts).items()}
        wanted: dict[str, Kind] = {name: mode for name, is_worse in worse.items() if is_worse}
        for score in rank(self.losses, contrasts):
            if score.verdict == "memorised":
                wanted.setdefault(score.id, "seldom")
        changed = []
        for place, one in enumerate(self.actions):
            if one.undone is None and wanted.get(one.id) != one.kind:
                self.actions[place] = replace(one, undone=step)
                changed.append(self.actions[place])
        kept = {one.id for one in self.active()}
        begun = [Action(name, kind, step) for name, kind in sorted(wanted.items()) if name not in kept]
        self.actions += begun
        self._count()
        return changed + begun

    def to_document(self) -> dict[str, Any]:
        return {
            "actions": [asdict(one) for one in self.actions],
            "contrasts": [one.to_dict() for one in self.contrasts.values()],
            "losses": [list(one) for one in self.losses],
            "passes": self.passes,
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Suspects:
        contrasts = [PictureContrast.from_dict(one) for one in document["contrasts"]]
        return cls(
            [Action(**one) for one in document["actions"]],
            {one.id: one for one in contrasts},
            [LossRecord(*one) for one in document["losses"]],
            int(document["passes"]),
        )


def describe(changed: Sequence[Action]) -> list[str]:
    """A line for the user for each kind of change."""
    lines = []
    for kind in WORDS:
        begun = [one.id for one in changed if one.kind == kind and one.undone is None]
        ended = [one.id for one in changed if one.kind == kind and one.undone is not None]
        lines += [f"{listed(begun, NAMED)}: {WORDS[kind]} from now on, {REASONS[kind]}"] if begun else []
        lines += [f"{listed(ended, NAMED)}: as before again (not {WORDS[kind]}), the evidence is gone"] if ended else []
    return lines
