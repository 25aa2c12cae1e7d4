"""The last stage of a run: the LoRA files, read back and compared, and the books closed."""

from __future__ import annotations

import filecmp
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.errors import ExitCode, ModelError, UnwritableWeightsError
from emotrain.lora.check import self_check
from emotrain.lora.file import read_lora, save_lora
from emotrain.lora.names import UP, W1
from emotrain.observers.metrics_log import sync
from emotrain.runs import contrast, report
from emotrain.runs.folder import RunFolder, now
from emotrain.runs.loaded import Loaded
from emotrain.runs.metadata import lora_metadata
from emotrain.runs.training import Trained
from emotrain.train.events import Event, Notice, Phase, RunEnd, Saved
from emotrain.train.loop import Outcome, StopReason
from emotrain.train.signals import StopSignals
from emotrain.train.state import TrainState

Notify = Callable[[Event], None]
NOTHING = 5e-4  # of the base's validation loss: a fall below that is no learning
WHOLE = (StopReason.SIGNAL, StopReason.MAX_STEPS)  # the ends of a run that did what it was to do


@dataclass(frozen=True)
class Result:
    """How a run ended, for the command line."""

    folder: RunFolder
    end: RunEnd
    exit_code: ExitCode


def finish(loaded: Loaded, trained: Trained, folder: RunFolder, notify: Notify, signals: StopSignals) -> Result:
    """Write the LoRAs, check them, close the books.

    Raises:
        ModelError: a file does not say what the live weights are: the run is not done.
        ResourceError: the disk is full, or a file cannot be written.
    """
    state, rule, lora = trained.state, loaded.stop_rule, None
    if state.step:
        lora, outcome = hand_over(loaded, state, trained.outcome, folder, notify)
        trained = replace(trained, outcome=outcome)
        draw_written(loaded, state, lora, outcome.reason, notify)
    if loaded.likeness is not None:
        folder.update_info(likeness=loaded.likeness.summary())
    reason, sentence = trained.outcome.reason, trained.outcome.sentence
    interrupted = reason is StopReason.INTERRUPTED
    for notice in last_words(loaded, state):
        notify(notice)
    folder.update_info(
        finished=None if interrupted else now(),
        steps=state.step,
        stop_reason=str(reason),
        stop_sentence=sentence,
        best_step=state.best_step,
        best_loss=state.best_loss,
        base_loss=rule.base_loss,
        last_validation=rule.paired.summary() if rule.paired else None,
        skipped=state.guard.skipped,
        train_s=round(state.train_s, 3),
        resumes=state.resumes,
        lora=lora.name if lora else None,
        gain=rule.gain.summary() if rule.gain else None,
    )
    if reason in WHOLE:
        contrast.compare_captions(loaded, state, folder, notify, lambda: bool(signals))
    page = report.write_at_end(folder, loaded.pictures.all, notify)
    end = end_event(loaded, trained, folder, lora, page)
    notify(end)
    diverged = ExitCode.DIVERGED if reason is StopReason.DIVERGED else ExitCode.OK
    return Result(folder, end, signals.exit_code if interrupted else diverged)


def end_event(
    loaded: Loaded, trained: Trained, folder: RunFolder, lora: Path | None = None, page: Path | None = None
) -> RunEnd:
    """What the observers are told last."""
    state, reason = trained.state, trained.outcome.reason
    resume = loaded.ranks.command(f"resume {shlex.quote(str(folder.path))}")
    return RunEnd(
        step=state.step,
        stop_reason=str(reason),
        sentence=trained.outcome.sentence,
        lora=lora,
        best_step=state.best_step,
        best_loss=state.best_loss,
        seconds=trained.seconds,
        resume_command=resume if reason is StopReason.INTERRUPTED else None,
        session_steps=state.step - trained.first_step,
        all_command=all_command(loaded, state, reason, folder),
        report=page,
    )


def hand_over(
    loaded: Loaded, state: TrainState, outcome: Outcome, folder: RunFolder, notify: Notify
) -> tuple[Path | None, Outcome]:
    """Write the best and the last LoRA, read both back and compare; the best one's path and how the run ended.

    Weights that no file can hold (not finite, or too large for save.dtype) are a divergence: the best LoRA is written
    all the same, where it is whole.

    Raises:
        ModelError: a file does not say what the live weights are: the run is not done.
        ResourceError: the disk is full, or the file cannot be written.
    """
    notify(Phase("writing and checking the LoRA"))
    with loaded.optimizer.eval_mode():
        last = loaded.model.adapter.state()
    best, best_step = state.best_adapter or last, state.best_step
    if best_step == 0:
        notify(Notice("no validation was better than that of step 0, and lora.safetensors is the LoRA of step 0"))
    written: tuple[Path, dict[str, Tensor]] | None = None
    for path, weights, step in (
        (folder.lora_path, best, state.step if best_step is None else best_step),
        (folder.lora_last_path, last, state.step),
    ):
        try:
            write_lora(loaded, path, weights, lora_metadata(loaded, state, step, outcome), checked=written)
        except UnwritableWeightsError as error:
            notify(Notice(f"{path.name} is not written: {error.message}"))
            outcome = Outcome(StopReason.DIVERGED, f"the weights of step {step} cannot be written: {error.message}")
            continue
        notify(Saved(step, path, best=path == folder.lora_path))
        written = written or (path, weights)
    notify(Phase("writing and checking the LoRA", 1, 1))
    return written and written[0], outcome


def write_lora(
    loaded: Loaded,
    path: Path,
    weights: dict[str, Tensor],
    metadata: dict[str, str],
    checked: tuple[Path, dict[str, Tensor]] | None = None,
) -> None:
    """One file, checked, unless it has the weights and the bytes of a file that was."""
    save, alphas, family = loaded.preset.save, loaded.model.adapter.alphas(), loaded.model.family.name
    save_lora(path, weights, alphas=alphas, family=family, format=save.format, dtype=save.dtype, metadata=metadata)
    if checked is None or not (_equal(weights, checked[1]) and filecmp.cmp(path, checked[0], shallow=False)):
        self_check(path, weights, alphas, family)


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def draw_written(loaded: Loaded, state: TrainState, lora: Path | None, reason: StopReason, notify: Notify) -> None:
    """The sheet's last columns: what the LoRA file draws, read back as its users read it, and at other strengths.

    Left out where the run was interrupted or diverged; pictures of an earlier file go in any case.
    """
    sampler, adapter = loaded.sampler, loaded.model.adapter
    if sampler is None:
        return
    try:
        sampler.forget_lora()
    except OSError as error:
        notify(Notice(f"pictures of an earlier LoRA file stay in {sampler.folder}: {error.strerror}"))
        return
    if lora is None or reason not in WHOLE:
        return
    live = adapter.state()
    step = state.step if state.best_step is None else state.best_step
    try:
        written = read_lora(lora).state
        adapter.load_state(written)
    except ModelError as error:  # a layout that joins modules may give them other ranks
        notify(Notice(f"the sheet has no column of {lora.name}: {error.message}"))
        return
    for strength in sorted({*loaded.preset.sample.strengths} - {1.0}):
        adapter.load_state(  # the update is a product of two: one of them carries the strength
            {name: value * strength if name.endswith((UP, W1)) else value for name, value in written.items()}
        )
        sampler.draw_strength(step, strength)
    adapter.load_state(written)
    paths = sampler.draw_lora(step, state.best_step)
    if loaded.likeness is not None and paths:
        loaded.likeness.of_lora(paths)
    adapter.load_state(live)
    sync([sampler], notify)


def last_words(loaded: Loaded, state: TrainState) -> Iterator[Notice]:
    """What the user should know of the result: that nothing was learned, and what LR 1.0 was found to be."""
    rule, best = loaded.stop_rule, state.best_loss
    base, gain = rule.base_loss, rule.gain
    if state.step and base is not None and best is not None and base - best < NOTHING * base:
        yield Notice(
            f"this run learned next to nothing: the validation loss was {base:.4g} and is {best:.4g} at best;"
            " the LoRA changes hardly anything"
        )
    if gain is not None and (length := gain.step_length()):
        number = f"{length:.1e}".replace("e-0", "e-")
        made = f"the mean length of the {gain.best.steps} steps that the LoRA is made of"
        yield Notice(f"LR {loaded.preset.train.lr or 1.0:.1f} = {number} here: {made}", level="info")


def all_command(loaded: Loaded, state: TrainState, reason: StopReason, folder: RunFolder) -> str | None:
    """How to train on all pictures for the steps that were found; None where none were held out of the folder."""
    best, preset, gain = state.best_step, loaded.preset, loaded.stop_rule.gain
    if reason is not StopReason.SIGNAL or not best or not loaded.pictures.held_out:
        return None
    if preset.validate_.folder is not None:
        return None
    settings: dict[str, Any] = {}
    if gain is not None:  # as many steps as the LoRA is made of, at their mean gain
        best, lr = gain.best.steps, (preset.train.lr or 1.0) * gain.best.gain / gain.best.steps
        settings = {"train.gain": "fixed", "train.lr": f"{lr:.2f}", "train.allow_small_lr": "true"}
    # validated at the end alone: flipped training pictures must not choose an earlier step
    settings |= {"stop.mode": "off", "train.max_steps": best, "validate.every": best}
    words = " ".join(["validate.fraction=0", *(f"--set {key}={value}" for key, value in settings.items())])
    name = shlex.quote(f"{folder.name}-all")
    path = shlex.quote(str(folder.preset_path))
    return loaded.ranks.command(f"run {path} --name {name} --set {words}")
