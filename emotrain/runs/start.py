"""Run and resume: load, train in a run folder that no one else holds, hand over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emotrain.config.schema import Preset
from emotrain.errors import CheckpointError
from emotrain.observers.dashboard import Dashboard
from emotrain.runs import changes, out_of_memory
from emotrain.runs.finish import Result, finish
from emotrain.runs.folder import RunFolder, create_run, library_versions, name_taken
from emotrain.runs.loaded import Beginning, Loaded, go_back, load
from emotrain.runs.training import train
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.events import Notice, Observer, Observers
from emotrain.train.signals import StopSignals, tell_stopping
from emotrain.train.state import TrainState

__all__ = ["Result", "resume", "run"]


def run(preset: Preset, *, runs_dir: Path, observers: Sequence[Observer], extends: str | None = None) -> Result:
    """Train a new LoRA; `extends` is the preset that its own changes, for run.json.

    Raises:
        EmotrainError: with the exit code that belongs to it; see `errors`.
    """
    watching = Observers(observers)
    try:
        target = runs_dir / preset.name
        if target.exists():
            raise name_taken(target)
        loaded, begin = load(preset, watching.notify), Beginning(TrainState())
        out_of_memory.try_largest(loaded, begin.state, watching.notify)  # nothing to save yet: a signal ends it here
        with stop_signals(observers) as signals:
            folder = create_run(runs_dir, preset.name, preset.to_dict(), extends=extends, **loaded.facts())
            with folder.lock():
                trained = train(loaded, begin, folder, watching, signals)
                return finish(loaded, trained, folder, watching.notify, signals)
    finally:
        watching.close()


def stop_signals(observers: Sequence[Observer]) -> StopSignals:
    """A first Ctrl-C is answered by the display where it has a place for that, else on stderr."""
    display = next((observer for observer in observers if isinstance(observer, Dashboard)), None)
    return StopSignals(tell_stopping) if display is None else StopSignals(display.stopping, display.quit)


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
    watching = Observers(observers)
    notify = watching.notify
    try:
        with folder.lock():
            store = CheckpointStore(folder.checkpoints_dir, preset.save.keep_last)
            checkpoint, notices = store.load(step)
            before = changes.Identity.from_document(checkpoint.documents["identity"])
            loaded = load(preset, notify, before.examples)
            info, means = folder.info(), loaded.facts()["memory"]
            other = (
                changes.library_changes(info.get("libraries") or {}, library_versions()),
                changes.memory_changes(info.get("memory"), means),
            )
            notices += [*filter(None, other), *changes.refuse(before, loaded.identity, allow=allow_config_change)]
            for line in notices:
                notify(Notice(line))
            begin = go_back(loaded, checkpoint, before)
            refuse_done(loaded, begin.state.step, folder)
            out_of_memory.try_largest(loaded, begin.state, notify)
            for line in store.drop_after(checkpoint.step) if step is not None else ():
                notify(Notice(line, level="info"))
            with stop_signals(observers) as signals:
                folder.update_info(finished=None, stop_reason=None)
                folder.write_preset(preset.to_dict())
                trained = train(loaded, begin, folder, watching, signals)
                return finish(loaded, trained, folder, notify, signals)
    finally:
        watching.close()


def refuse_done(loaded: Loaded, step: int, folder: RunFolder) -> None:
    """A run that has handed over its LoRA and has nothing left to do is not resumed.

    One that died between its last checkpoint and the hand-over is: it then only hands over.

    Raises:
        CheckpointError: the run is done.
    """
    info = folder.info()
    over = step >= loaded.preset.train.max_steps or loaded.stop_rule.decide(step) is not None
    if over and info.get("finished"):
        raise CheckpointError(
            f"run `{folder.name}` is done: it stopped automatically after step {step} ({info.get('stop_reason')})",
            "raise train.max_steps with --set, or start a new run from it with start_from.continue",
        )
