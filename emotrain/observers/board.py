"""What the dashboard knows about a run: filled by events, bounded in memory, nothing drawn."""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from emotrain.files import read_regular
from emotrain.observers.pace import Pace, Smoother
from emotrain.observers.text import clean
from emotrain.observers.trace import Trace
from emotrain.train.events import (
    Event,
    Notice,
    Phase,
    RunEnd,
    RunStart,
    SamplesDrawn,
    Saved,
    StepEnd,
    ValidationEnd,
)

MAX_NOTICES = 8
MAX_LOG = 2**30  # bytes
MAX_PHASES = 12
MAX_VALIDATIONS = 200


@dataclass
class PhaseLine:
    """One phase before, between or after the steps."""

    name: str
    began: float
    done: int = 0
    total: int = 0
    ended: float | None = None


@dataclass
class Board:
    """The latest of everything, and the curves.

    Args:
        clock: seconds of a steady clock.
    """

    clock: Callable[[], float]
    start: RunStart | None = None
    last: StepEnd | None = None
    validation: ValidationEnd | None = None
    samples: SamplesDrawn | None = None
    saved: Saved | None = None
    end: RunEnd | None = None
    began: float = 0.0
    phases: deque[PhaseLine] = field(default_factory=lambda: deque(maxlen=MAX_PHASES))
    notices: deque[tuple[int, str, str]] = field(  # step, level, message
        default_factory=lambda: deque(maxlen=MAX_NOTICES)
    )
    num_warnings: int = 0
    validations: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=MAX_VALIDATIONS))

    def __post_init__(self) -> None:
        self.began = self.clock()
        self._reset(0)

    def _reset(self, max_steps: int) -> None:
        self.pace = Pace(max_steps)
        self.smooth = Smoother()
        self.observes_other = False
        self.loss, self.smoothed, self.observed_loss = Trace(), Trace(), Trace()
        self.scalar, self.trust, self.pulse = Trace(), Trace(), Trace()

    @property
    def step(self) -> int:
        """Steps done."""
        if self.last is not None:
            return self.last.step
        return self.start.start_step if self.start is not None else 0

    @property
    def max_steps(self) -> int:
        """The ceiling."""
        return self.start.max_steps if self.start is not None else 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the board was made."""
        return self.end.seconds if self.end is not None else self.clock() - self.began

    @property
    def phase(self) -> PhaseLine | None:
        """The phase that goes on now."""
        if self.phases and self.phases[-1].ended is None:
            return self.phases[-1]
        return None

    def note(self, event: Event) -> None:
        """Take note of one event."""
        match event:
            case StepEnd():
                self._on_step(event)
            case ValidationEnd():
                self.validation = event
                if math.isfinite(event.loss):
                    self.validations.append((event.step, event.loss))
            case SamplesDrawn():
                self.samples = event
            case Saved():
                self.saved = event
            case Phase():
                self._on_phase(event)
            case Notice():
                self.notices.append((self.step, event.level, clean(event.message)))
                self.num_warnings += event.level == "warning"
            case RunStart():
                self.start = event
                self.last = None
                self._reset(event.max_steps)
                self._take_past(event)
            case RunEnd():
                self._end_phase()
                self.end = event

    def _take_past(self, start: RunStart) -> None:
        """The curves of the steps before a resume, from the run's own log; one that cannot be read leaves them out."""
        rows: list[dict[str, float]] = []
        if start.start_step:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                for line in read_regular(start.run_dir / "metrics.jsonl", MAX_LOG).splitlines():
                    rows.append(json.loads(line))
        for row in rows:
            numbers = [row.get(key) for key in ("step", "loss", "observed_loss", "scalar", "trust", "pulse")]
            if not all(isinstance(number, int | float) for number in numbers) or row["step"] > start.start_step:
                return
            self.loss.add(row["loss"])
            self.smoothed.add(self.smooth.add(row["loss"]))
            for trace, key in (
                (self.observed_loss, "observed_loss"), (self.scalar, "scalar"), (self.trust, "trust"),
                (self.pulse, "pulse"),
            ):  # fmt: skip
                trace.add(row[key])

    def _on_step(self, event: StepEnd) -> None:
        self._end_phase()
        self.last = event
        self.pace.note(event, self.clock())
        self.observes_other = self.observes_other or event.observed_loss != event.loss
        self.loss.add(event.loss)
        self.smoothed.add(self.smooth.add(event.loss))
        self.observed_loss.add(event.observed_loss)
        self.scalar.add(event.reading.scalar)
        self.trust.add(event.reading.trust)
        self.pulse.add(event.reading.pulse)

    def _on_phase(self, event: Phase) -> None:
        now = self.clock()
        line = self.phase
        if line is None or line.name != clean(event.name):
            self._end_phase()
            line = PhaseLine(clean(event.name), now)
            self.phases.append(line)
        line.done, line.total = event.done, event.total
        if event.total and event.done >= event.total:
            line.ended = now

    def _end_phase(self) -> None:
        if self.phases and self.phases[-1].ended is None:
            self.phases[-1].ended = self.clock()

    def validation_marks(self) -> list[tuple[float, float]]:
        """Validation losses with their place in [0, 1] between the first and the last step drawn."""
        if self.last is None or self.start is None:
            return []
        first = self.last.step - self.loss.num_values + 1
        length = max(1, self.last.step - first)
        return [((s - first) / length, loss) for s, loss in self.validations if s >= first]

    def run_dir(self) -> Path | None:
        """Where the run lives."""
        return self.start.run_dir if self.start is not None else None
