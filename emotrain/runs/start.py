"""Run and resume: load, train in a run folder that no one else holds, hand over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import Signals
from typing import Any

from emotrain.config.schema import Preset
from emotrain.errors import CheckpointError, ExitCode
from emotrain.families.kept import KeptBase
from emotrain.observers.dashboard import Dashboard
from emotrain.ranks import ALONE, Ranks
from emotrain.runs import changes, out_of_memory
from emotrain.runs.finish import Result, end_event, finish
from emotrain.runs.folder import KeptByTheLead, RunFolder, create_run, library_versions, name_taken, named_in
from emotrain.runs.loaded import Beginning, Loaded, go_back, load
from emotrain.runs.training import train
from emotrain.train.checkpoint import Checkpoint, CheckpointStore, from_files, to_files
from emotrain.train.events import Notice, Observer, Observers
from emotrain.train.signals import StopSignals, tell_stopping
from emotrain.train.state import TrainState

__all__ = ["Result", "resume", "run"]


def run(
    preset: Preset,
    *,
    runs_dir: Path,
    observers: Sequence[Observer],
    extends: str | None = None,
    ranks: Ranks = ALONE,
    kept: KeptBase | None = None,
) -> Result:
    """Train a new LoRA.

    Args:
        preset: checked.
        runs_dir: where the run's folder is made.
        observers: which are told what happens.
        extends: the preset that its own changes, for run.json.
        ranks: the processes that train together.
        kept: the base of the run before in a queue.

    Raises:
        EmotrainError: with the exit code that belongs to it; see `errors`.
    """
    watching, whole = Observers(observers), False
    try:
        with ranks.together():
            target = runs_dir / preset.name
            if ranks.first and target.exists():
                raise name_taken(target)
            loaded = load(named_in(runs_dir, preset), watching.notify, ranks=ranks, kept=kept)
            begin = Beginning(TrainState(micro_batches=preset.train.gradient_accumulation_steps * ranks.world))
            out_of_memory.try_largest(loaded, begin.state, watching.notify)  # not saved yet: a signal ends it here
        with stop_signals(observers, ranks) as signals:
            with ranks.together():
                folder: RunFolder = KeptByTheLead(target)
                if ranks.first:
                    folder = create_run(runs_dir, preset.name, preset.to_dict(), extends=extends, **loaded.facts())
            with holding(folder, ranks):
                result = train_and_finish(loaded, begin, folder, watching, signals)
                whole = not result.exit_code
                return result
    finally:
        if kept is not None and not whole:
            kept.drop()  # what broke this run may have reached the weights that the next one would share
        watching.close()


def train_and_finish(
    loaded: Loaded, begin: Beginning, folder: RunFolder, watching: Observers, signals: StopSignals
) -> Result:
    """Train in a folder that is held, and hand over; all processes of a run end with the same exit code."""
    ranks = loaded.ranks
    trained = train(loaded, begin, folder, watching, signals)
    received = next((number for number in ranks.meet(signals.received) if number is not None), None)
    signals.received = None if received is None else Signals(received)
    result: Result | None = None
    with ranks.together():
        if ranks.first:
            result = finish(loaded, trained, folder, watching.notify, signals)
        code = ranks.told(None if result is None else int(result.exit_code))
    return result or Result(folder, end_event(loaded, trained, folder), ExitCode(code))


@contextmanager
def holding(folder: RunFolder, ranks: Ranks) -> Iterator[None]:
    """The folder's lock; who cannot have it ends all processes of the run."""
    with ExitStack() as held:
        with ranks.together():
            held.enter_context(folder.lock())
        yield


def stop_signals(observers: Sequence[Observer], ranks: Ranks) -> StopSignals:
    """A first Ctrl-C is answered by the display where it has a place for that, else on stderr; by rank 0 alone."""
    if not ranks.first:
        return StopSignals()
    display = next((observer for observer in observers if isinstance(observer, Dashboard)), None)
    return StopSignals(tell_stopping) if display is None else StopSignals(display.stopping, display.quit)


def resume(
    folder: RunFolder,
    preset: Preset,
    *,
    step: int | None = None,
    allow_config_change: bool = False,
    observers: Sequence[Observer],
    ranks: Ranks = ALONE,
) -> Result:
    """Go on with a run from its newest whole checkpoint, or from the one of `step`.

    Raises:
        CheckpointError: no checkpoint can be used, or preset, data set or base have changed.
        ResourceError: another process trains in this folder.
    """
    watching = Observers(observers)
    notify = watching.notify
    try:
        with holding(folder, ranks):
            with ranks.together():
                store = CheckpointStore(folder.checkpoints_dir, preset.save.keep_last)
                checkpoint, notices = read_by_the_lead(store, step, ranks)
                before = changes.Identity.from_document(checkpoint.documents["identity"])
                loaded = load(named_in(folder.path.parent, preset), notify, before.examples, ranks)
                if ranks.first:
                    info, means = folder.info(), loaded.facts()["memory"]
                    other = (
                        changes.library_changes(info.get("libraries") or {}, library_versions()),
                        changes.memory_changes(info.get("memory"), means),
                    )
                    notices += [
                        *filter(None, other),
                        *changes.refuse(before, loaded.identity, allow=allow_config_change),
                    ]
                    for line in notices:
                        notify(Notice(line))
                begin, facts = go_back(loaded, checkpoint, before), {}
                if ranks.first:
                    refuse_done(loaded, begin.state.step, folder)
                    facts = ranks_of_run(folder, begin.state, ranks, watching)
                out_of_memory.try_largest(loaded, begin.state, notify)
                for line in store.drop_after(checkpoint.step) if step is not None and ranks.first else ():
                    notify(Notice(line, level="info"))
            with stop_signals(observers, ranks) as signals:
                with ranks.together():
                    folder.update_info(finished=None, stop_reason=None, **facts)
                    folder.write_preset(preset.to_dict())
                return train_and_finish(loaded, begin, folder, watching, signals)
    finally:
        watching.close()


def read_by_the_lead(store: CheckpointStore, step: int | None, ranks: Ranks) -> tuple[Checkpoint, list[str]]:
    """The checkpoint, and a line for each one skipped; the other processes get it sent: they may not see that disk."""
    if ranks.world == 1:
        return store.load(step)
    files: dict[str, bytes] = {}
    notices: list[str] = []
    told: dict[str, Any] = {}
    if ranks.first:
        checkpoint, notices = store.load(step)
        files = to_files(checkpoint.step, checkpoint.tensors, checkpoint.documents)
        told = {"step": checkpoint.step, "path": str(checkpoint.path), "best": checkpoint.best, "files": list(files)}
    told = ranks.told(told)
    contents = ((name, ranks.send(files.get(name))) for name in told["files"])
    return from_files(Path(told["path"]), told["step"], contents, best=told["best"]), notices


def ranks_of_run(folder: RunFolder, state: TrainState, ranks: Ranks, watching: Observers) -> dict[str, Any]:
    """What run.json says of the processes; tells what it means if there are others than before."""
    before = folder.info().get("ranks", 1)
    if before == ranks.world == 1:
        return {}
    if before != ranks.world:
        counts = " and ".join(
            f"{verb} on {count} process{'es' * (count != 1)}"
            for verb, count in (("the run was trained", before), ("goes on", ranks.world))
        )
        watching.notify(
            Notice(f"{counts}: a step takes the same {state.micro_batches} micro-batches, equal to rounding")
        )
    if (idle := ranks.world - state.micro_batches) > 0:
        watching.notify(
            Notice(f"{idle} of {ranks.world} processes have nothing to do in a step of {state.micro_batches}")
        )
    return {"ranks": ranks.world, "launch": list(ranks.launch)}


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
