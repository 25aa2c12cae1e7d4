"""The second stage of a run: the loop with its logs, checkpoints and samples, in a folder that this process holds."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from emotrain.errors import ResourceError
from emotrain.observers.metrics_log import Log, MetricsLog, sync
from emotrain.observers.tensorboard import TensorBoard
from emotrain.runs import build
from emotrain.runs.contrast import Watch
from emotrain.runs.folder import RunFolder
from emotrain.runs.live_page import LivePage
from emotrain.runs.loaded import Beginning, Loaded
from emotrain.runs.out_of_memory import run_with_advice
from emotrain.train import rng
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.events import Notice, Observers, Phase, RunStart, Saved
from emotrain.train.loop import Limits, Outcome, Parts, device_memory_gib, fit, run_sample
from emotrain.train.losses import LossBaseline
from emotrain.train.memory import OutOfMemory
from emotrain.train.signals import StopSignals
from emotrain.train.state import TrainState, capture


@dataclass(frozen=True)
class Trained:
    """How the loop ended, from which step on it ran in this process, and the seconds that it took."""

    state: TrainState
    outcome: Outcome
    first_step: int
    seconds: float


@dataclass(frozen=True)
class Outputs:
    """What the loop writes as it goes; of several processes the leading one alone has a store."""

    loaded: Loaded
    folder: RunFolder
    expected: list[float]
    observers: Observers
    store: CheckpointStore | None = None
    logs: tuple[Log, ...] = ()
    watch: Watch | None = None

    def sample(self, step: int, best_step: int | None) -> None:
        """Draw the sample prompts, where there are any, and compare them with the pictures, where that is wanted."""
        sampler, likeness = self.loaded.sampler, self.loaded.likeness
        paths = sampler.draw(step, best_step) if sampler is not None else []
        if likeness is not None and paths:
            likeness.at_step(step, paths)
            self.folder.update_info(likeness=likeness.summary())

    def lacks_samples(self, step: int) -> bool:
        """Whether a step's sheet was begun and left, because the run was to stop."""
        sampler, every = self.loaded.sampler, self.loaded.preset.sample.every
        return sampler is not None and every > 0 and step % every == 0 and sampler.lacks(step)

    def save(self, state: TrainState) -> None:
        """A checkpoint and the best LoRA so far; a full disk costs this save, not the run.

        Raises:
            ResourceError: the processes of the run have other weights.
        """
        refuse_other_weights(self.loaded, state.step)
        with self.loaded.ranks.together():
            if self.store is not None:
                self._commit(self.store, state)
            self.loaded.ranks.meet(None)

    def _commit(self, store: CheckpointStore, state: TrainState) -> None:
        """The files of `save`."""
        loaded, notify = self.loaded, self.observers.notify
        notify(Phase("saving", 0, 1))
        tensors, documents = capture(state, loaded.model.adapter, loaded.optimizer, loaded.stop_rule, self.expected)
        documents["identity"] = loaded.identity.to_document()
        best = state.best_step is not None and state.best_step == state.step
        sync(self.logs, notify)  # ahead of the commit: no power cut leaves a checkpoint without its logs
        try:
            keep = loaded.stop_rule.around_signals([*store.steps(), state.step])
            path = store.save(state.step, tensors, documents, best=best, keep=keep)
            notify(Saved(state.step, path, best))
        except ResourceError as error:
            notify(Notice(f"{error.message}; the run goes on"))
        notify(Phase("saving", 1, 1))


def refuse_other_weights(loaded: Loaded, step: int) -> None:
    """All processes of a run compute the same updates: where their weights differ, something is broken.

    Raises:
        ResourceError: they differ.
    """
    ranks = loaded.ranks
    if ranks.world == 1:
        return
    whole = hashlib.sha256()
    for tensor in loaded.model.adapter.state().values():
        whole.update(tensor.numpy().data)
    digests = ranks.meet(whole.hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        error = ResourceError(
            f"at step {step} the LoRA of rank {other} is not that of rank 0: this step is not saved",
            "the checkpoints before it are whole; train on GPUs of one kind, and look for a faulty one",
        )
        error.of_rank, error.is_silent = other, not ranks.first
        raise error


def train(loaded: Loaded, begin: Beginning, folder: RunFolder, observers: Observers, signals: StopSignals) -> Trained:
    """Train until the stop rule, the ceiling or a signal ends it.

    Raises:
        EmotrainError: out of memory, or a folder that cannot be written.
    """
    started, state, ranks = time.monotonic(), begin.state, loaded.ranks
    first_step = state.step
    with ranks.together():
        outputs, baseline = open_outputs(loaded, begin, folder, observers)
        if loaded.sampler is not None and ranks.world == 1:  # several processes stop together, at the end of a step
            loaded.sampler.stopped = lambda: signals.received is not None
        parts = loop_parts(loaded, state, baseline, outputs, signals)
        if begin.checkpoint is not None:  # the random state is put back last, after everything that may draw
            for line in rng.restore(begin.checkpoint.tensors["rng"], begin.checkpoint.documents["rng"]):
                observers.notify(Notice(line))
        ranks.meet(None)
    if ranks.told(begin.checkpoint is not None and outputs.lacks_samples(state.step)):
        run_sample(parts, state.step)
    work = partial(fit, parts, limits(loaded, state), state)
    try:
        outcome = run_with_advice(loaded, state, folder, "in the optimizer's step", work)
    except OutOfMemory as error:
        if not error.everywhere:
            raise
        with ranks.together():
            raise
    return Trained(state, outcome, first_step, time.monotonic() - started)


def open_outputs(
    loaded: Loaded, begin: Beginning, folder: RunFolder, observers: Observers
) -> tuple[Outputs, LossBaseline]:
    """The logs of the run, and its loss baseline, which a new run measures."""
    preset, state, ranks = loaded.preset, begin.state, loaded.ranks
    if ranks.first:
        page = LivePage(folder, loaded.pictures.all, observers.notify)
        curves = [TensorBoard(folder.tensorboard_dir)] if preset.log.tensorboard else []
        observers.all += [metrics := MetricsLog(folder.path), *curves, page]
    baseline = LossBaseline(list(begin.expected))
    if begin.checkpoint is None:
        measure = partial(build.build_loss_baseline, preset, loaded.model, loaded.data.train, observers.notify, ranks)
        baseline = run_with_advice(loaded, state, folder, "while measuring the base model's loss", measure)
        folder.update_info(start_loss=baseline.start)
    observers.notify(start_event(loaded, folder, state))
    watch = Watch(loaded, folder, observers.notify) if preset.dataset.suspects != "report" else None
    if not ranks.first:
        return Outputs(loaded, folder, baseline.expected, observers, watch=watch), baseline
    store = CheckpointStore(folder.checkpoints_dir, preset.save.keep_last)
    logs: list[Log] = [metrics]
    if loaded.sampler is not None:
        loaded.sampler.folder = folder.samples_dir
        logs.append(loaded.sampler)
    if loaded.likeness is not None:
        loaded.likeness.go_on(folder.info().get("likeness"))
    return Outputs(loaded, folder, baseline.expected, observers, store, tuple(logs), watch), baseline


def loop_parts(
    loaded: Loaded, state: TrainState, baseline: LossBaseline, outputs: Outputs, signals: StopSignals
) -> Parts:
    """What the loop works with."""
    preset, model, data = loaded.preset, loaded.model, loaded.data
    validation = partial(build.build_validation, preset, model, data, loaded.ranks)
    return Parts(
        family=model.family,
        objective=model.objective,
        adapter=model.adapter,
        optimizer=loaded.optimizer,
        data=data.train,
        stop_rule=loaded.stop_rule,
        loss_baseline=baseline,
        validation=validation(data.validation),
        plain_validation=validation(data.plain) if data.plain else None,
        notify=outputs.observers.notify,
        save=outputs.save,
        sample=lambda step: outputs.sample(step, state.best_step),
        watch=outputs.watch,
        preservation=build.build_preservation(preset, model, data),
        graphs=build.build_graphs(preset, model.family, model.adapter, outputs.observers.notify),
        interrupted=lambda: signals.received is not None,
        ranks=loaded.ranks,
    )


def limits(loaded: Loaded, state: TrainState) -> Limits:
    """The numbers of the loop."""
    preset = loaded.preset
    every, at_start = loaded.ranks.told((preset.sample.every, preset.sample.at_start))  # each process may have its own
    return Limits(
        max_steps=preset.train.max_steps,
        gradient_accumulation_steps=state.micro_batches,
        max_grad_norm=preset.train.max_grad_norm,
        seed=preset.train.seed,
        validate_every=build.validate_every(preset, len(loaded.pictures.held_out), state.micro_batches),
        save_every=preset.save.every,
        sample_every=every,
        sample_at_start=at_start,
        tell_ready=preset.train.optimizer.notify,
    )


def start_event(loaded: Loaded, folder: RunFolder, state: TrainState) -> RunStart:
    """What the observers are told before the first step."""
    preset, data, model = loaded.preset, loaded.data.train, loaded.model
    held = len(loaded.pictures.held_out)
    held_words = f"{held} held out" if held else "none held out: the validation uses flipped training pictures"
    return RunStart(
        name=folder.name,
        run_dir=folder.path,
        start_step=state.step,
        max_steps=preset.train.max_steps,
        steps_per_epoch=data.batches_per_epoch / state.micro_batches,
        optimizer=preset.train.optimizer.name,
        num_images=data.num_images,
        num_modules=model.adapter.num_modules,
        num_parameters=sum(p.numel() for p in model.adapter.parameters()),
        device=str(model.family.device),
        device_memory_gib=device_memory_gib(model.family.device),
        facts=(
            ("model", f"{Path(preset.model.base).name}, {loaded.found.describe()}"),
            ("data", f"{data.num_images} pictures, {held_words}"),
            ("LoRA", f"{model.adapter.title}, {describe_modules(model.adapter.num_modules_by_part())}"),
            *many_facts(loaded, state),
            *([("samples", f"drawn on {base.name}")] if (base := loaded.sample_base) else []),
            *([("step", "length measured by the validation")] if loaded.stop_rule.gain else []),
            *([("trigger", preset.dataset.trigger)] if preset.dataset.trigger else []),
        ),
    )


def many_facts(loaded: Loaded, state: TrainState) -> list[tuple[str, str]]:
    """A line about the processes, where there are several."""
    if loaded.ranks.world == 1:
        return []
    samples = state.micro_batches * loaded.preset.train.micro_batch_size
    return [("ranks", f"{loaded.ranks.world} processes share the {samples} pictures of a step")]


def describe_modules(counts: dict[str, int]) -> str:
    """How many modules the LoRA has, and where where it is on more than the denoiser."""
    if len(counts) == 1:
        return f"{sum(counts.values())} modules"
    return " + ".join(f"{count} {part}" for part, count in counts.items()) + " modules"
