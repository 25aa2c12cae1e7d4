"""A run as lines: for people on stderr (no terminal, CI, `--plain`), for programs on stdout (`--json`)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

from emotrain.observers.pace import Pace, Smoother
from emotrain.observers.text import clean, duration, likeness_words, number, short_path, speed
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

PHASE_PAUSE_S = 10.0


class LineWriter:
    """Writes and flushes lines; goes silent once nobody reads them (`| head`, closed ssh).

    Training goes on then: an observer's reader must not be able to end a run.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.closed = False

    def write(self, line: str) -> None:
        """Write one line that ends in its line break."""
        if self.closed:
            return
        try:
            self._write(line)
            self._stream.flush()
        except (OSError, ValueError):  # BrokenPipeError, EIO; ValueError: the stream is closed
            self.closed = True
            self._silence()

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(line.encode(encoding, errors="replace").decode(encoding))

    def _silence(self) -> None:
        """Point the dead descriptor at nothing, or Python fails when it flushes at exit."""
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            return
        if descriptor not in (1, 2):
            return
        nothing = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, descriptor)
        finally:
            os.close(nothing)


class JsonEvents:
    """Newline-delimited events. A step has the fields of metrics.jsonl and `"event": "step"`.

    Args:
        stream: where to write (default: stdout as it is now).
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._writer = LineWriter(sys.stdout if stream is None else stream)

    def handle(self, event: Event) -> None:
        self._writer.write(event.line(with_kind=True))

    def close(self) -> None:
        """Nothing is kept back: every line is flushed when it is written."""


class ConsoleLines:
    """A line every `every` steps and one for everything else; no control codes.

    Args:
        every: steps between two lines; the first and the last step of a run always have one.
        stream: where to write (default: stderr as it is now).
        clock: seconds of a steady clock.
        warnings_only: leave out everything but warnings (beside `--json`).
    """

    def __init__(
        self,
        every: int = 10,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        warnings_only: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self._every = every
        self._writer = LineWriter(sys.stderr if stream is None else stream)
        self._clock = clock
        self._warnings_only = warnings_only
        self._pace = Pace(0)
        self._smooth = Smoother()
        self._max_steps = 0
        self._first_step = 1
        self._phase: tuple[str, float, float] | None = None  # name, when it began, when it was told
        self._training = False  # from then on a phase is told when it takes long

    def handle(self, event: Event) -> None:
        if isinstance(event, StepEnd):
            self._step(event)
        elif isinstance(event, Notice):
            self._notice(event)
        elif not self._warnings_only:
            self._other(event)

    def close(self) -> None:
        """Nothing is kept back: every line is flushed when it is written."""

    def _line(self, text: str) -> None:
        self._writer.write(clean(text) + "\n")

    def _notice(self, event: Notice) -> None:
        if event.level == "warning":
            self._line(f"warning: {event.message}")
        elif not self._warnings_only:
            self._line(event.message)

    def _step(self, event: StepEnd) -> None:
        self._pace.note(event, self._clock())
        smooth = self._smooth.add(event.loss)
        due = event.step % self._every == 0 or event.step in (self._first_step, self._max_steps)
        if self._warnings_only or not due:
            return
        reading = event.reading
        parts = [
            f"step {event.step}/{self._max_steps}",
            f"epoch {event.epoch:.2f}",
            f"loss {number(event.loss)}",
            f"smoothed {number(smooth)}",
            f"scalar {number(reading.scalar, signed=True)}",
            f"trust {number(reading.trust, signed=True)}",
            f"emoPulse {reading.pulse:.2e}",
            f"grad_norm {number(event.grad_norm)}",
            f"stop {100.0 * event.stop_meter:.0f}%" + (" ready" if event.ready else ""),
            speed(self._pace.step_s),
            f"ETA {self._pace.eta()}",
        ]
        if event.observed_loss != event.loss:
            parts.insert(4, f"observed {number(event.observed_loss)}")
        if event.skipped:
            parts.append(f"skipped {event.skipped}")
        self._line("  ".join(parts))

    def _other(self, event: Event) -> None:
        match event:
            case RunStart():
                self._start(event)
            case ValidationEnd():
                drift = "" if event.drift is None else f", drift {number(event.drift)}"
                self._line(
                    f"validation at step {event.step}: loss {number(event.loss)}, "
                    f"scalar {number(event.scalar, signed=True)}, "
                    f"base {number(event.base_loss)}{drift}, "
                    f"best {number(event.best_loss)} at step {event.best_step}"
                )
                if event.comparison:
                    self._line(f"beside the best: {event.comparison}")
                if event.forecast:
                    self._line(f"stop: {event.forecast}")
            case SamplesDrawn():
                self._line(f"samples at step {event.step}: {short_path(event.sheet)}")
            case LikenessMeasured():
                self._line(f"likeness at step {event.step}: {likeness_words(event)}")
            case Saved():
                what = "saved the best" if event.best else "saved"
                self._line(f"{what} at step {event.step}: {short_path(event.path)}")
            case Phase():
                self._on_phase(event)
            case RunEnd():
                self._end(event)

    def _start(self, event: RunStart) -> None:
        self._pace = Pace(event.max_steps)
        self._smooth = Smoother()
        self._max_steps = event.max_steps
        self._first_step = event.start_step + 1
        self._training = True
        self._line(f"run {event.name} in {short_path(event.run_dir)}")
        self._line(
            f"{event.num_images} pictures, {event.steps_per_epoch:g} steps an epoch, "
            f"{event.num_modules} modules, {event.num_parameters:,} parameters, "
            f"{event.optimizer} on {event.device}"
        )
        for label, value in event.facts:
            self._line(f"{label}: {value}")
        if event.start_step:
            self._line(f"resumed after step {event.start_step}")

    def _on_phase(self, event: Phase) -> None:
        """A line at both ends and one every few seconds; while training, counted work is told once it is long."""
        now = self._clock()
        count = f" {event.done}/{event.total}" if event.total else ""
        over = event.total and event.done >= event.total
        if self._phase is None or self._phase[0] != event.name:
            self._phase = None if over else (event.name, now, now)
            if not (self._training and event.total):
                self._line(f"{event.name}{count}")
            return
        name, began, told = self._phase
        if over:
            self._phase = None
            if told > began or not self._training:
                self._line(f"{name}{count}: done in {duration(now - began)}")
        elif now - told >= PHASE_PAUSE_S:
            self._phase = (name, began, now)
            self._line(f"{name}{count}")

    def _end(self, event: RunEnd) -> None:
        self._line(f"ended at step {event.step} ({event.stop_reason}): {event.sentence}")
        if event.best_step is not None:
            self._line(f"best step {event.best_step}, loss {number(event.best_loss)}")
        self._line(f"took {duration(event.seconds)}")
        if event.lora is not None:
            self._line(f"LoRA: {short_path(event.lora)}")
        if event.report is not None:
            self._line(f"report: {short_path(event.report)}")
        if event.resume_command:
            self._line(f"resume with: {event.resume_command}")
        if event.all_command:
            self._line(f"train on all pictures, the held-out ones too, for as long: {event.all_command}")
