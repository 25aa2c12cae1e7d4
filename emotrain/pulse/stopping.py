"""The decision to end a run: pure floats in, one sentence out (no torch).

The training loss cannot show over-training, since it goes on falling. So the decision rests on the validation: the loss
of a few held-out pictures at fixed noise and timesteps. The emo sensors follow it: they are started anew at every best
validation, and `scalar` below zero since then means that the run gets worse. The published signals of the training loss
shorten the wait where they light.

Where no pictures can be spared the validation uses training pictures, flipped. Their loss goes on falling slowly while
the pictures are memorised, but no longer as fast as that of the same pictures unflipped. So a fall counts as far as it
exceeds SHARED of what the unflipped ones have gained. Flipping is no fair measure of what is not symmetric (light from
the left, lettering, a grid): where the flipped pictures have gained little when their fall ends, the rule uses them
unflipped, and can tell a standstill only.

Where a run measures the gain of its step length (`emotrain.pulse.gain`), the same validations raise and lower it, and
the run ends when no other gain brings more.

Each validation is compared with the best before it, picture by picture (`emotrain.pulse.paired`). That is said; it can
raise the gain; it does not end a run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from emotrain.pulse.gain import FAILURES, HOPE, NEGLIGIBLE, VAIN, Change, Gain
from emotrain.pulse.paired import Paired
from emotrain.pulse.signal import Averages, update_averages

WINDOW = 32  # steps that a published signal is watched over
DENSE = 0.9  # share of lit steps in the window that counts as sustained
PATIENCE = 0.4  # of the best step: how long the validation may fail to improve
PATIENCE_LIT = 0.3  # the same while the published signal is sustained
NEGLIGIBLE_PLAIN = 0.03  # NEGLIGIBLE for unflipped training pictures, which go on falling as they are memorised
SHARED = 0.35  # of what unflipped pictures gain: flipped ones that gain less are being memorised
FAST = 0.1  # of the improvement so far: a fall of flipped pictures that counts whatever it is
UNFAIR = 0.4  # of the gain of unflipped pictures: if flipped ones have gained less, flipping is not fair
MIN_GAIN = 0.02  # of the base's loss: before that nothing is said about flipping
MIN_STEPS = 60
UNFAIR_SENTENCE = (
    "flipped, the training pictures have hardly improved where unflipped they have: from now on the validation uses"
    " them unflipped, which cannot show over-training; a folder of other pictures would (validate.folder)"
)


@dataclass
class StopRule:
    """Says when the run is done, and remembers which step was the best.

    Args:
        mode: `off` never stops; `signal` stops on the published signal, sustained; `trusted` on validation and signal.
        min_steps: never before this step.
        held_out: the validation uses held-out pictures; else training pictures, flipped.
        gain: of the step length, raised and lowered by the validations; None: it stays as it is.
    """

    mode: Literal["off", "signal", "trusted"] = "trusted"
    min_steps: int = MIN_STEPS
    held_out: bool = True
    gain: Gain | None = None
    gain_change: Change = field(default=Change.NONE, compare=False)  # by the last validation
    lit: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    base_loss: float | None = None
    base_plain: float | None = None  # loss of the same pictures, unflipped
    unfair: bool = False  # flipping: the rule uses the unflipped pictures
    observed_loss: float = field(default=math.nan, compare=False)  # what the last validation said
    best_step: int | None = None
    best_loss: float | None = None
    best_pictures: list[float] = field(default_factory=list)  # the same, of single pictures
    best_plain_pictures: list[float] = field(default_factory=list)  # unflipped
    paired: Paired | None = None  # the last validation beside the best before it
    anchor_step: int = 0  # last best that was worth starting the wait again
    anchor_loss: float = math.inf
    anchor_plain: float | None = None
    averages: Averages | None = None
    scalar: float = 0.0
    failed_validations: int = 0
    validations: int = 0
    num_steps: int = 0  # steps
    densest: int = 0  # most lit steps in any window so far
    densest_end: int = 0  # the last step of the first such window

    def update_validation(
        self,
        step: int,
        loss: float,
        plain: float | None = None,
        pictures: Sequence[float] = (),
        plain_pictures: Sequence[float] = (),
    ) -> bool:
        """Take in one validation; true when it is the best so far. Step 0 is the base.

        Args:
            step: steps done.
            loss: of the held-out or the flipped pictures, finite.
            plain: of the flipped pictures, unflipped.
            pictures: what `loss` is the mean of.
            plain_pictures: what `plain` is the mean of.
        """
        self.validations += 1
        if self.base_loss is None:
            self.base_loss, self.base_plain = loss, plain
        if plain is not None:
            loss, plain = self._fair(loss, plain)
        self.observed_loss = loss
        without, gained = self._without_memorising(loss, plain), max(self.base_loss - loss, 0.0)
        too_small = gained * (NEGLIGIBLE_PLAIN if self.unfair else NEGLIGIBLE)
        counts = self.anchor_loss - without > too_small
        if plain is not None:
            counts = counts or self.anchor_loss - loss > FAST * gained
        is_best = (self.best_loss is None or loss < self.best_loss) if self.held_out else counts
        if self.unfair:
            pictures, plain_pictures = plain_pictures, ()
        self._compare(step, loss, pictures, plain_pictures)
        if is_best:
            self.best_step, self.best_loss = step, loss
            self.best_pictures, self.best_plain_pictures = list(pictures), list(plain_pictures)
        if counts:
            self.anchor_step, self.anchor_loss, self.anchor_plain = step, loss, plain
            self.averages, without = None, loss
        self.averages, self.scalar, _ = update_averages(self.averages, without)
        still = too_small / max(without, 1e-12)  # a fall too small to count is standing still
        no_fall = step != self.anchor_step and self.scalar <= still
        self.failed_validations = self.failed_validations + 1 if no_fall else 0
        self._update_gain(step, is_best)
        return is_best

    def _compare(self, step: int, loss: float, pictures: Sequence[float], plain: Sequence[float]) -> None:
        """Note how a validation stands beside the best before it; flipped pictures without what comes of memorising."""
        self.paired = None
        if self.best_loss is None or not pictures or len(pictures) != len(self.best_pictures):
            return
        assert self.base_loss is not None
        assert self.best_step is not None
        gained = [old - new for old, new in zip(self.best_plain_pictures, plain, strict=True)]
        if math.fsum(gained) > 0.0:
            pictures = [each + SHARED * more for each, more in zip(pictures, gained, strict=True)]
        self.paired = Paired.of(
            pictures,
            self.best_pictures,
            step=step,
            best_step=self.best_step,
            gained=self.base_loss - min(loss, self.best_loss),
            base_loss=self.base_loss,
            negligible=NEGLIGIBLE_PLAIN if self.unfair else NEGLIGIBLE,
        )

    def evidence(self) -> str:
        """How the last validation stood beside the best before it, to end a sentence with; empty where unknown."""
        if self.paired is None or not (words := self.paired.words()):
            return ""
        return f"; the last validation, at step {self.paired.step}, is {words}"

    def update_non_finite_validation(self, step: int) -> None:
        """Take in a validation that says nothing but that the steps may be too long."""
        self.paired = None
        self._update_gain(step, False)

    def _update_gain(self, step: int, is_best: bool) -> None:
        if self.gain is None or self.base_loss is None or self.best_loss is None:
            return
        losses = {"best_loss": self.best_loss, "base_loss": self.base_loss}
        paired = self.paired
        surely = paired is not None and paired.error is not None and -paired.difference > paired.error
        self.gain_change = self.gain.update_validation(step, is_best=is_best, surely=surely, **losses)

    def _without_memorising(self, loss: float, plain: float | None) -> float:
        """A loss of flipped pictures without what comes of memorising them since the anchor."""
        if plain is None or self.anchor_plain is None:
            return loss
        return loss + SHARED * max(self.anchor_plain - plain, 0.0)

    def _fair(self, loss: float, plain: float) -> tuple[float, float | None]:
        """What to use: flipped pictures and the same unflipped, or these alone."""
        assert self.base_loss is not None
        assert self.base_plain is not None
        if self.unfair:
            return plain, None
        gained = self.base_plain - plain
        if loss >= self.anchor_loss and gained > MIN_GAIN * self.base_plain and self.base_loss - loss < UNFAIR * gained:
            self.unfair = True
            if self.gain is not None:
                self.gain.mark = None  # a loss of flipped pictures
            self.base_loss, self.anchor_loss, self.best_loss = self.base_plain, math.inf, None
            return plain, None
        return loss, plain

    def update_step(self, ready: bool, length: float = 0.0) -> None:
        """Take in the optimizer's own stop signal of one step, and the step's length."""
        self.num_steps += 1
        if self.gain is not None:
            self.gain.update_step(length)
        self.lit.append(ready)
        if sum(self.lit) > self.densest:
            self.densest, self.densest_end = sum(self.lit), self.num_steps

    def around_signals(self, steps: Iterable[int]) -> set[int]:
        """Of these saved steps, the last one before the densest cluster of published signals and the first after."""
        if not self.densest:
            return set()
        ordered = sorted(steps)
        before = [step for step in ordered if step <= self.densest_end - WINDOW]
        after = [step for step in ordered if step >= self.densest_end]
        return {*before[-1:], *after[:1]}

    @property
    def sustained(self) -> bool:
        """The published signal was lit for most of the last 32 steps."""
        return len(self.lit) == WINDOW and sum(self.lit) >= DENSE * WINDOW

    def wait(self) -> int:
        """Steps after the best validation that the rule waits for a better one."""
        if not self.anchor_step:
            return HOPE
        share = PATIENCE_LIT if self.sustained else PATIENCE
        return max(round(share * self.anchor_step), 1)

    def meter(self, step: int) -> float:
        """0..1: how far the rule is towards its decision."""
        if self.mode == "off":
            return 0.0
        ready = min(step / max(self.min_steps, 1), 1.0)
        if self.mode == "signal" or not self.validations:
            return ready * sum(self.lit) / WINDOW / DENSE if self.lit else 0.0
        if self.gain is not None:
            return min(ready, self.gain.progress())
        waited = (step - self.anchor_step) / max(self.wait(), self.min_steps - self.anchor_step, 1)
        return min(ready, waited, self.failed_validations / FAILURES, 1.0) if self.failed_validations else 0.0

    def _missing(self) -> int:
        """How many more validations it takes until the run ends, if none of them is better."""
        if self.gain is None:
            return max(FAILURES - self.failed_validations, 0)
        assert self.best_loss is not None
        assert self.base_loss is not None
        return self.gain.missing(self.best_loss, self.base_loss)

    def expected_end(self, step: int, max_steps: int, every: int) -> tuple[int, int] | None:
        """First and last step at which the run is expected to end, once the validation has begun to fail.

        Args:
            step: steps done.
            max_steps: the ceiling.
            every: steps between two validations.
        """
        if self.mode != "trusted" or not self.validations:
            return None
        if self.gain is None:
            if not self.failed_validations:
                return None
            validated = (step // every + self._missing()) * every
            waits = (PATIENCE_LIT, PATIENCE) if self.anchor_step else (HOPE, HOPE)
            ends = [self.anchor_step + round(share * (self.anchor_step or 1)) for share in waits]
        else:
            if self.best_step == self.gain.validated and not self.gain.vain:
                return None
            missing = self._missing()
            validated = self.gain.validated + missing * self.gain.interval
            ends = [validated, validated if missing <= 1 else round(1.5 * validated)]
        first, last = (min(max(step, self.min_steps, validated, end), max_steps) for end in ends)
        return first, last

    def forecast(self, step: int, max_steps: int, every: int) -> str:
        """When the run will end if it does not get better, in a sentence; arguments as those of `expected_end`."""
        latest = f"ends at step {max_steps} at the latest"
        if self.mode == "off":
            return f"ends at step {max_steps}: stop.mode is off"
        if self.mode == "signal" or not self.validations:
            return f"ends when the optimizer's stop signal is lit on {DENSE:.0%} of {WINDOW} steps; {latest}"
        end = self.expected_end(step, max_steps, every)
        if end is None:
            return f"the validation improves; {latest}" if step else latest
        failed = self.gain.failed if self.gain is not None else self.failed_validations
        missing, when = self._missing(), f"{end[0]} to {end[1]}" if end[0] != end[1] else f"{end[0]}"
        count = f"{min(failed, FAILURES)} of {FAILURES} validations without improvement"
        if self.gain is not None and not failed and self.best_step != step:
            count = f"the steps were shortened at step {step}"
        if self.gain is not None and missing > 1:
            shorter = ", then shorter steps" if failed and missing > FAILURES - failed else ""
            return f"{count}{shorter}; ends at step {end[0]} at the earliest"
        if missing > 1:
            return f"{count}; ends at step {when} if the next {missing} are no better"
        return f"{count}; ends at step {when} if " + ("the next is no better" if missing else "none is better before")

    def decide(self, step: int) -> str | None:
        """One sentence when the run is done, else None."""
        if self.mode == "off" or step < self.min_steps:
            return None
        if self.mode == "signal" or not self.validations:
            if self.sustained:
                return f"the optimizer signalled READY TO STOP on {sum(self.lit)} of the last {WINDOW} steps"
            return None
        if self.gain is not None:
            if not self.gain.done:
                return None
            why = f"{VAIN} step lengths in a row have brought less than {NEGLIGIBLE:.1%} of what was gained"
        elif self.failed_validations >= FAILURES and step - self.anchor_step >= self.wait():
            why = f"has not improved for {self.failed_validations} validations"
        else:
            return None
        which, fell = "held-out loss", "was lowest"
        if not self.held_out:
            which, fell = "loss of flipped training pictures", "last fell by more than memorising explains"
        if self.unfair:
            which, fell = (
                "loss of training pictures",
                f"last fell by more than {NEGLIGIBLE_PLAIN:.0%} of what was gained",
            )
        return f"the {which} {fell} at step {self.best_step} ({self.best_loss:.4g}) and {why}{self.evidence()}"

    def to_document(self) -> dict[str, Any]:
        average = self.averages
        return {
            "mode": self.mode,
            "min_steps": self.min_steps,
            "lit": list(self.lit),
            "base_loss": self.base_loss,
            "base_plain": self.base_plain,
            "unfair": self.unfair,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "best_pictures": self.best_pictures,
            "best_plain_pictures": self.best_plain_pictures,
            "paired": asdict(self.paired) if self.paired else None,
            "anchor_step": self.anchor_step,
            "anchor_loss": None if math.isinf(self.anchor_loss) else self.anchor_loss,
            "anchor_plain": self.anchor_plain,
            "averages": [average.short, average.medium, average.long] if average else None,
            "scalar": self.scalar,
            "failed_validations": self.failed_validations,
            "validations": self.validations,
            "num_steps": self.num_steps,
            "densest": [self.densest, self.densest_end],
            "gain": self.gain.to_document() if self.gain else None,
        }

    def load_document(self, document: dict[str, Any]) -> None:
        """Inverse of `to_document`; mode and min_steps stay as this rule was built, the gain is the saved rule's."""
        self.lit = deque(document["lit"], maxlen=WINDOW)
        self.base_loss, self.base_plain = document["base_loss"], document["base_plain"]
        self.unfair = document["unfair"]
        self.best_step, self.best_loss = document["best_step"], document["best_loss"]
        self.best_pictures, self.best_plain_pictures = document["best_pictures"], document["best_plain_pictures"]
        self.paired = Paired(**document["paired"]) if document["paired"] else None
        self.anchor_step = document["anchor_step"]
        self.anchor_loss = math.inf if document["anchor_loss"] is None else document["anchor_loss"]
        self.anchor_plain = document["anchor_plain"]
        self.averages = Averages(*document["averages"]) if document["averages"] else None
        self.scalar, self.failed_validations = document["scalar"], document["failed_validations"]
        self.validations, self.num_steps = document["validations"], document["num_steps"]
        self.densest, self.densest_end = document["densest"]
        self.gain = Gain.from_document(document["gain"]) if document["gain"] else None
