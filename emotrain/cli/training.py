"""What `run` and `resume` share: the display, the result on stdout, the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from emotrain.cli import output
from emotrain.config.schema import Preset
from emotrain.errors import EmotrainError
from emotrain.observers.choose import display_observers
from emotrain.ranks import ALONE, Ranks
from emotrain.train.events import Notice, Observer, Phase, RunEnd

if TYPE_CHECKING:
    from emotrain.families.kept import KeptBase
    from emotrain.runs.folder import RunFolder
    from emotrain.runs.preflight import Where
    from emotrain.runs.start import Result


NOTIFY_S = 30  # seconds that log.notify may take


class Training:
    """One training process in front of a person or a program."""

    def __init__(
        self, preset: Preset, notes: Sequence[str], *, plain: bool, as_json: bool, ranks: Ranks = ALONE
    ) -> None:
        self.preset, self.as_json, self.ranks = preset, as_json, ranks
        self.observers: tuple[Observer, ...] = ()
        if ranks.first:
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

    def run(self, runs_dir: Path, where: Where, extends: str | None, kept: KeptBase | None = None) -> None:
        """Start a new run; what can be found out without torch is found out first; `kept` is a queue's base."""
        from emotrain.runs.preflight import preflight

        ranks = self.ranks
        with self._notifying(runs_dir / self.preset.name):
            with ranks.together():
                if ranks.first:
                    facts = preflight(self.preset, where, self._looking, runs_dir)
                    facts.raise_first()
                    for line in facts.warnings:
                        self.tell(line)
            self.wait("loading the libraries")
            from emotrain.runs import start

            result = start.run(
                self.preset, runs_dir=runs_dir, observers=self.observers, extends=extends, ranks=ranks, kept=kept
            )
        self._hand_over(result)

    def resume(self, folder: RunFolder, step: int | None, *, allow_config_change: bool) -> None:
        """Go on with a run."""
        self.wait("loading the libraries")
        from emotrain.runs import start

        with self._notifying(folder.path):
            result = start.resume(
                folder,
                self.preset,
                step=step,
                allow_config_change=allow_config_change,
                observers=self.observers,
                ranks=self.ranks,
            )
        self._hand_over(result)

    @contextmanager
    def _notifying(self, run_dir: Path) -> Iterator[None]:
        """Tell `log.notify` of a run that fails; of one that ends `_hand_over` does."""
        try:
            yield
        except EmotrainError as failure:
            self._notify(run_dir, failure.exit_code, {"stop_reason": "failed", "sentence": failure.message})
            raise

    def _notify(self, run_dir: Path, exit_code: int, row: Mapping[str, Any]) -> None:
        command = self.preset.log.notify
        if command is None or not self.ranks.first:
            return
        told = {"event": RunEnd.kind, "run": self.preset.name, "run_dir": str(run_dir), "exit_code": exit_code, **row}
        if (why := tell_command(command, json.dumps(told, ensure_ascii=True))) is not None:
            self.tell(f"log.notify: `{command}` {why}")

    def _hand_over(self, result: Result) -> None:
        if self.ranks.first:
            output.bell()
        self._notify(result.folder.path, int(result.exit_code), result.end.row())
        if result.end.lora is not None and not self.as_json:
            output.result(str(result.end.lora))
        if result.exit_code:
            raise typer.Exit(int(result.exit_code))


def tell_command(command: str, text: str) -> str | None:
    """Run a command of the user's shell with `text` on its stdin; why it failed, None where it did not.

    What it prints is not shown unless it fails: stdout is for results.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(text + "\n", timeout=NOTIFY_S)
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)  # what the shell started, too
            process.kill()
            process.wait()
            return f"took longer than {NOTIFY_S} s, and was ended"
        if not process.returncode:
            return None
        said.seek(0)
        lines = said.read(4096).decode("utf-8", "replace").strip().splitlines()
        return f"failed with exit code {process.returncode}" + (f": {lines[-1][:200]}" if lines else "")


@contextmanager
def show(
    preset: Preset, notes: Sequence[str], *, plain: bool, as_json: bool, ranks: Ranks = ALONE
) -> Iterator[Training]:
    """Put up the display; whatever happens, the terminal is as it was afterwards."""
    training = Training(preset, notes, plain=plain, as_json=as_json, ranks=ranks)
    try:
        yield training
    finally:
        for observer in training.observers:
            observer.close()
