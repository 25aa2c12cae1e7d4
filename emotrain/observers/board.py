"""What the dashboard knows about a run: filled by events, bounded in memory, nothing drawn."""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from emotrain.files import read_regular
from emotrain.observers.curve import Trace
from emotrain.observers.pace import Pace, Smoother
from emotrain.observers.text import clean, duration
from emotrain.train.events import (
    Event,
    LikenessMeasured,
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
MAX_VALIDATIONS = 500
TRACED = ("loss", "observed_loss", "scalar", "trust", "pulse")  # columns of a step's row


class Clock(ProgressColumn):
    """How long a phase has taken, and how long it may go on."""

    def render(self, task: Task) -> Text:
        """Both times, or the one that it took."""
        took = (task.finished_time if task.finished else task.elapsed) or 0.0
        left = ""
        if task.completed and task.remaining:
            left = f"  {duration(took / task.completed * task.remaining)} left"
        return Text.assemble(duration(took), (left, "label"))


class Phases(Progress):
    """The long pieces of work before, between and after the steps; the last one may be going on.

    Args:
        clock: seconds of a steady clock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        columns = (
            TextColumn("{task.fields[sign]}", style="good"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            Clock(),
        )
        super().__init__(*columns, auto_refresh=False, get_time=clock)
        self._clock = clock
        self._current: TaskID | None = None

    @property
    def current(self) -> Task | None:
        """The phase that goes on now."""
        return next((task for task in self.tasks if task.id == self._current), None)

    @property
    def current_s(self) -> float:
        """How long it has gone on, in seconds."""
        return (self.current.elapsed or 0.0) if self.current is not None else 0.0

    def note(self, event: Phase) -> None:
        """Begin a phase, or go on with it; `done == total` ends it."""
        name = clean(event.name)
        if self.current is None or self.current.description != name:
            self.end()
            self._current = self.add_task(name, total=None, sign=" ", count="")
            for old in self.task_ids[:-MAX_PHASES]:
                self.remove_task(old)
        assert self._current is not None
        if event.total:
            count = f"{event.done}/{event.total}" if event.total > 1 else ""
            self.update(self._current, completed=event.done, total=event.total, count=count)
            if event.done >= event.total:
                self.end()

    def end(self) -> None:
        """The phase that goes on is over."""
        if (task := self.current) is not None:
            total = task.total or 1
            self.update(task.id, completed=total, total=total, sign="✓")
            self._current = None


class Board:
    """The latest of everything, and the curves.

    Args:
        clock: seconds of a steady clock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.began = clock()
        self.phases = Phases(clock)
        self.start: RunStart | None = None
        self.end: RunEnd | None = None
        self.samples: SamplesDrawn | None = None
        self.likeness: LikenessMeasured | None = None
        self.saved: Saved | None = None
        self.notices: deque[tuple[str, str]] = deque(maxlen=MAX_NOTICES)  # level, message
        self.num_warnings = 0
        self.stopping = False  # somebody has pressed Ctrl-C
        self.validation: ValidationEnd | None = None
        self.validations: deque[tuple[int, float]] = deque(maxlen=MAX_VALIDATIONS)
        self._reset(0)

    def _reset(self, max_steps: int) -> None:
        self.last: StepEnd | None = None
        self.pace = Pace(max_steps)
        self.smooth = Smoother()
        self.traces = {name: Trace() for name in (*TRACED, "smoothed")}

    @property
    def step(self) -> int:
        if self.last is not None:
            return self.last.step
        return self.start.start_step if self.start is not None else 0

    @property
    def max_steps(self) -> int:
        """The ceiling."""
        return self.start.max_steps if self.start is not None else 0

    @property
    def steps(self) -> tuple[int, int]:
        """First and last step of the curves."""
        return self.step - self.traces["loss"].num_values + 1, self.step

    @property
    def elapsed_s(self) -> float:
        """Seconds since the board was made."""
        return self.end.seconds if self.end is not None else self.clock() - self.began

    def note(self, event: Event) -> None:
        match event:
            case StepEnd():
                self.phases.end()
                self.last = event
                self.pace.note(event, self.clock())
                self._trace(event.row())
            case ValidationEnd():
                self.validation = event
                if math.isfinite(event.loss):
                    self.validations.append((event.step, event.loss))
            case SamplesDrawn():
                self.samples = event
            case LikenessMeasured():
                self.likeness = event
            case Saved():
                self.saved = event
            case Phase():
                self.phases.note(event)
            case Notice():
                self.notices.append((event.level, clean(event.message)))
                self.num_warnings += event.level == "warning"
            case RunStart():
                self.start = event
                self._reset(event.max_steps)
                self._take_past(event)
            case RunEnd():
                self.phases.end()
                self.end = event

    def _trace(self, row: dict[str, Any]) -> None:
        for name in TRACED:
            value = row.get(name)
            self.traces[name].add(math.nan if value is None else float(value))
        self.traces["smoothed"].add(self.smooth.add(self.traces["loss"].last))

    def _take_past(self, start: RunStart) -> None:
        """The curves of the steps before a resume, from the run's own logs; those that cannot be read are left out."""
        if not start.start_step:
            return
        damaged = (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError)
        with contextlib.suppress(*damaged):
            for row in _rows(start.run_dir / "metrics.jsonl", start.start_step):
                self._trace(row)
        with contextlib.suppress(*damaged):
            for row in _rows(start.run_dir / "validation.jsonl", start.start_step):
                self.note(ValidationEnd(**row))
        with contextlib.suppress(*damaged):
            for row in _rows(start.run_dir / "likeness.jsonl", start.start_step):
                self.note(LikenessMeasured(**row))


def _rows(log: Path, last_step: int) -> Iterator[dict[str, Any]]:
    """The rows of a log up to a step, until one is damaged."""
    for line in read_regular(log, MAX_LOG).splitlines():
        row = json.loads(line)
        if row["step"] > last_step:
            return
        yield row
