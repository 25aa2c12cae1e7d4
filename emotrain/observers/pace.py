"""How fast a run goes and when it may end: from pure step times, with the pauses counted apart."""

from __future__ import annotations

import math
import statistics
from collections import deque

from emotrain.observers.text import duration
from emotrain.train.events import StepEnd

RECENT_STEPS = 50


class Pace:
    """Median of the recent pure step times; a range for the time that is left.

    Validations, samples and saves between two steps do not touch the speed. They lengthen the late end
    of the range, in the proportion in which they have lengthened this run so far.
    """

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._first_seen: float | None = None
        self._last_seen = 0.0
        self._pure = 0.0
        self._step = 0
        self._expected: tuple[int, int] | None = None

    def note(self, event: StepEnd, now: float) -> None:
        """Take note of a step that ended at `now`, in seconds of any steady clock."""
        if math.isfinite(event.step_s) and event.step_s > 0.0:
            self._recent.append(event.step_s)
            self._pure += event.step_s
        if self._first_seen is None:
            self._first_seen = now - max(event.step_s, 0.0)
        self._last_seen = now
        self._step = event.step
        self._expected = event.expected_end

    @property
    def step_s(self) -> float | None:
        """Seconds of a typical recent step; None before the first one."""
        return statistics.median(self._recent) if self._recent else None

    @property
    def overhead(self) -> float:
        """Wall time of the run so far over its pure step time; at least 1."""
        if self._first_seen is None or self._pure <= 0.0:
            return 1.0
        return max(1.0, (self._last_seen - self._first_seen) / self._pure)

    @property
    def last_step(self) -> tuple[int, int]:
        """First and last step that the run may end at."""
        if self._expected is None:
            return self._max_steps, self._max_steps
        early, late = self._expected
        late = min(max(early, late), self._max_steps)
        return min(early, late), late

    def remaining_s(self) -> tuple[float, float] | None:
        """Seconds left, the earliest and the latest.

        The earliest: to the first step it may end at, at the pace of the quicker quarter of the
        recent steps. The latest: to the last step, at the slower quarter's pace, with pauses.
        """
        if not self._recent:
            return None
        ordered = sorted(self._recent)
        quick, slow = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
        early, late = self.last_step
        low = max(0, early - self._step) * quick
        high = max(0, late - self._step) * slow * self.overhead
        return low, max(low, high)

    def eta(self) -> str:
        """The range in words, as in `3:10-7:25`."""
        left = self.remaining_s()
        if left is None:
            return "-"
        return f"{duration(left[0])}-{duration(left[1])}"


class Smoother:
    """Exponential mean without a bias to its start; leaves out what is not finite."""

    def __init__(self, decay: float = 0.95) -> None:
        self._decay = decay
        self._total = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """The mean with `value` in it; NaN before the first finite one."""
        if math.isfinite(value):
            self._total = self._decay * self._total + (1.0 - self._decay) * value
            self._weight = self._decay * self._weight + (1.0 - self._decay)
        return self.value

    @property
    def value(self) -> float:
        """The mean so far."""
        return self._total / self._weight if self._weight else math.nan
