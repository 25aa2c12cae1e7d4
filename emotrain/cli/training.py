"""What `run` and `resume` share: the display, the result on stdout, the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from emotrain.cli import output
from emotrain.config.schema import Preset
from emotrain.observers.choose import display_observers
from emotrain.train.events import Notice, Phase

if TYPE_CHECKING:
    from emotrain.runs.folder import RunFolder
    from emotrain.runs.preflight import Where
    from emotrain.runs.start import Result


class Training:
    """One training process in front of a person or a program."""

    def __init__(self, preset: Preset, notes: Sequence[str], *, plain: bool, as_json: bool) -> None:
        self.preset, self.as_json = preset, as_json
        self.observers = display_observers(plain=plain, json=as_json, every=preset.log.every)
        for note in notes:
            self.tell(note, "info")

    def tell(self, message: str, level: str = "warning") -> None:
        """One line for the user."""
        for observer in self.observers:
            observer.handle(Notice(message, level=level))

    def wait(self, what: str) -> None:
        """Say what takes its time."""
        for observer in self.observers:
            observer.handle(Phase(what))

    def _looking(self, done: int, total: int) -> None:
        for observer in self.observers:
            observer.handle(Phase("looking at pictures", done, total))

    def run(self, runs_dir: Path, where: Where, extends: str | None) -> None:
        """Start a new run; what can be found out without torch is found out first."""
        from emotrain.runs.preflight import preflight

        facts = preflight(self.preset, where, self._looking, runs_dir)
        facts.raise_first()
        for line in facts.warnings:
            self.tell(line)
        self.wait("loading the libraries")
        from emotrain.runs import start

        self._hand_over(start.run(self.preset, runs_dir=runs_dir, observers=self.observers, extends=extends))

    def resume(self, folder: RunFolder, step: int | None, *, allow_config_change: bool) -> None:
        """Go on with a run."""
        self.wait("loading the libraries")
        from emotrain.runs import start

        self._hand_over(
            start.resume(
                folder,
                self.preset,
                step=step,
                allow_config_change=allow_config_change,
                observers=self.observers,
            )
        )

    def _hand_over(self, result: Result) -> None:
        if result.end.lora is not None and not self.as_json:
            output.result(str(result.end.lora))
        if result.exit_code:
            raise typer.Exit(int(result.exit_code))


@contextmanager
def show(preset: Preset, notes: Sequence[str], *, plain: bool, as_json: bool) -> Iterator[Training]:
    """Put up the display; whatever happens, the terminal is as it was afterwards."""
    training = Training(preset, notes, plain=plain, as_json=as_json)
    try:
        yield training
    finally:
        for observer in training.observers:
            observer.close()
