"""Run and resume: train in a run folder that no one else holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from emotrain.config.schema import Preset
from emotrain.errors import CheckpointError
from emotrain.observers.dashboard import Dashboard
from emotrain.runs import changes, out_of_memory
from emotrain.runs.folder import RunFolder, create_run, library_versions, name_taken
from emotrain.runs.session import Result, Session
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.events import Notice, Observer
from emotrain.train.signals import StopSignals, tell_stopping

__all__ = ["Result", "Session", "resume", "run"]


def refuse_done(session: Session, folder: RunFolder) -> None:
    """A run that has handed over its LoRA and has nothing left to do is not resumed.

    One that died between its last checkpoint and the hand-over is: it then only hands over.

    Raises:
        CheckpointError: the run is done.
    """
    step, info = session.state.step, folder.info()
    over = step >= session.preset.train.max_steps or session.stop_rule.decide(step) is not None
    if over and info.get("finished"):
        raise CheckpointError(
            f"run `{folder.name}` is done: it ended by itself after step {step} ({info.get('stop_reason')})",
            "raise train.max_steps with --set, or start a new run from it with start_from.continue",
        )


def run(preset: Preset, *, runs_dir: Path, observers: Sequence[Observer], extends: str | None = None) -> Result:
    """Train a new LoRA; `extends` is the preset that its own changes, for run.json.

    Raises:
        EmotrainError: with the exit code that belongs to it; see `errors`.
    """
    session = Session(preset, observers)
    try:
        target = runs_dir / preset.name
        if target.exists():
            raise name_taken(target)
        session.load()  # nothing to save yet: a signal ends the process here
        out_of_memory.try_largest(session)
        with StopSignals(say_stopping(observers)) as signals:
            folder = create_run(runs_dir, preset.name, preset.to_dict(), extends=extends, **session.facts())
            with folder.lock():
                return session.train(folder, signals)
    finally:
        session.close()


def say_stopping(observers: Sequence[Observer]) -> Callable[[str], None]:
    """How a first Ctrl-C is answered: by the display where it has a place for that, else on stderr."""
    return next((observer.stopping for observer in observers if isinstance(observer, Dashboard)), tell_stopping)


def resume(
    folder: RunFolder,
    preset: Preset,
    *,
    step: int | None = None,
    allow_config_change: bool = False,
    observers: Sequence[Observer],
) -> Result:
    """Go on with a run from its newest whole checkpoint, or from the one of `step`.

    Raises:
        CheckpointError: no checkpoint can be used, or preset, data set or base have changed.
        ResourceError: another process trains in this folder.
    """
    session = Session(preset, observers)
    try:
        with folder.lock():
            store = CheckpointStore(folder.checkpoints_dir, preset.save.keep_last)
            checkpoint, notices = store.load(step)
            session.load()
            if (line := changes.library_changes(folder.info().get("libraries") or {}, library_versions())) is not None:
                notices = [*notices, line]
            for line in notices:
                session.notify(Notice(line))
            before = changes.Identity.from_document(checkpoint.documents["identity"])
            lines = changes.refuse(before, session.identity(), allow=allow_config_change)
            for line in lines:
                session.notify(Notice(line))
            session.restore(checkpoint)
            session.take_new_rate(before)
            refuse_done(session, folder)
            out_of_memory.try_largest(session)
            for line in store.drop_after(checkpoint.step) if step is not None else ():
                session.notify(Notice(line, level="info"))
            with StopSignals(say_stopping(observers)) as signals:
                folder.update_info(finished=None, stop_reason=None)
                folder.write_preset(preset.to_dict())
                return session.train(folder, signals)
    finally:
        session.close()
