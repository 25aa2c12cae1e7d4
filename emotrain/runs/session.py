"""One process's part of a run: what is loaded, who watches, how it is saved and how it ends."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from emotrain.config.schema import Preset
from emotrain.dataset.split import example_digests, fingerprint
from emotrain.errors import ExitCode, ResourceError
from emotrain.families.common import words_of
from emotrain.lora.file import read_lora
from emotrain.runs import adapters, build, changes, contrast, finish, parents, report
from emotrain.runs.data import read_pictures
from emotrain.runs.folder import RunFolder, now
from emotrain.runs.out_of_memory import run_with_advice
from emotrain.runs.plan import plan_run
from emotrain.train import rng
from emotrain.train import state as run_state
from emotrain.train.checkpoint import Checkpoint, CheckpointStore
from emotrain.train.events import Event, Notice, Observer, Phase, RunEnd, RunStart, Saved
from emotrain.train.loop import Limits, Outcome, Parts, Sample, StopReason, fit
from emotrain.train.loss_baseline import LossBaseline
from emotrain.train.signals import StopSignals
from emotrain.train.state import TrainState

NOTHING = 5e-4  # of the base's validation loss: a fall below that is no learning


@dataclass(frozen=True)
class Result:
    """How a run ended, for the command line."""

    folder: RunFolder
    end: RunEnd
    exit_code: ExitCode


class Session:
    """One process's part of a run: what is loaded, who watches, and how it is saved."""

    def __init__(self, preset: Preset, observers: Sequence[Observer]) -> None:
        self.preset = preset
        self.observers = list(observers)
        self.checkpoint: Checkpoint | None = None
        self.records: finish.PictureLosses | None = None
        self.logs: list[finish.Log] = []
        self._identity: changes.Identity | None = None
        self._failed: set[int] = set()  # observers whose failure has been said

    def notify(self, event: Event) -> None:
        """Tell every observer."""
        for observer in self.observers:
            try:
                observer.handle(event)
            except (OSError, ResourceError) as error:
                self._lost(observer, error)

    def _lost(self, observer: Observer | finish.PictureLosses, error: Exception) -> None:
        """A log or display that cannot be written costs lines, never the run; it is said once."""
        if id(observer) in self._failed:
            return
        self._failed.add(id(observer))
        reason = str(error).splitlines()[0]
        self.notify(Notice(f"{type(observer).__name__} loses lines while the run goes on: {reason}"))

    def load(self) -> None:
        """Everything up to the first step that needs no run folder; bad input is refused here."""
        preset = self.preset
        rng.deterministic_kernels(preset.train.deterministic is True)
        rng.seed_all(preset.train.seed)
        self.found = build.sniffed(preset)
        settings = build.loader_settings(preset, self.found)
        self.pictures = read_pictures(preset)
        path = preset.start_from.continue_
        earlier = read_lora(parents.lora_of(path)) if path else None
        if earlier is not None:
            words = f"the LoRA that is continued sets the network: {parents.continued(earlier)}"
            self.notify(Notice(words, level="info"))
        plan = plan_run(preset, self.found, self.pictures, settings)
        self.model = build.load_model(preset, self.notify, earlier, plan)
        counts = self.model.adapter.num_modules_by_part()
        if earlier is None:
            adapters.check_modules(self.found, preset.network.targets, counts[self.model.adapter.part])
            if preset.network.text_encoder:
                adapters.check_text_modules(self.found, counts)
        self.data = build.prepare_data(preset, self.model, self.pictures, settings, self.notify)
        self.size = settings.rules.resolutions[0]
        self.sampler = build.build_sampler(preset, self.model, self.size, self.notify)
        self.model.family.free_encoders()  # all is encoded: the denoiser takes their place
        self.model.family.place_denoiser()
        self.model.adapter.use_half_precision(self.model.family.dtype)
        self.optimizer = build.build_optimizer_of(preset, self.model.adapter.parameters())
        self.stop_rule = build.build_stop_rule(preset, held_out=bool(self.pictures.held_out))
        self.state = TrainState()
        self.expected: list[float] = []
        self.dataset_digest = fingerprint(self.pictures.all)

    def facts(self) -> dict[str, Any]:
        """What run.json says of the beginning."""
        return {
            "seed": self.preset.train.seed,
            "device": str(self.model.family.device),
            "base_sha256": self.model.base_digest,
            "dataset_sha256": self.dataset_digest,
            "parents": self.model.parents,
            "family": self.found.family,
            "held_out": [example.id for example in self.pictures.held_out],
        }

    def identity(self) -> changes.Identity:
        """What a resumed run must agree with; it cannot change while this process trains."""
        if self._identity is None:
            family = self.model.family
            scheduler = json.dumps(words_of(family.scheduler.config), sort_keys=True, default=str)
            inputs = {
                "the VAE": family.vae_identity(),
                "the text encoders or tokenizers": family.text_identity(),
                "the model's scheduler": hashlib.sha256(scheduler.encode()).hexdigest(),
            }
            for number, parent in enumerate(self.model.parents, 1):
                inputs[f"earlier LoRA {number} ({parent['kind']} {parent['file']})"] = parent["sha256"]
            digests = example_digests(self.pictures.all)
            self._identity = changes.Identity(self.preset.to_dict(), self.model.base_digest, digests, inputs)
        return self._identity

    def take_new_rate(self, before: changes.Identity) -> None:
        """A learning rate that was changed on purpose counts: a checkpoint brings its own back."""
        rate = self.preset.train.lr
        if rate is None or dict(changes.flat(before.preset)).get("train.lr") == rate:
            return
        gain = self.stop_rule.gain.value if self.stop_rule.gain else 1.0
        for group in self.optimizer.param_groups:
            group["scope" if "scope" in group else "lr"] = rate * gain

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was taken."""
        self.checkpoint = checkpoint
        self.state, self.expected = run_state.restore(
            checkpoint.tensors,
            checkpoint.documents,
            self.model.adapter,
            self.optimizer,
            self.stop_rule,
        )
        self.state.resumes += 1

    def train(self, folder: RunFolder, signals: StopSignals) -> Result:
        """Train in a run folder that this process holds the lock of."""
        preset, started = self.preset, time.monotonic()
        self.folder = folder
        self.store = CheckpointStore(folder.checkpoints_dir, preset.save.keep_last)
        files = finish.file_observers(preset, folder)
        self.observers += files
        baseline = LossBaseline(self.expected)
        if self.checkpoint is None:
            listen = partial(build.build_loss_baseline, preset, self.model, self.data.train, self.notify)
            baseline = run_with_advice(self, "while measuring the base model's loss", listen)
            self.expected = baseline.expected
            folder.update_info(start_loss=baseline.start)
        self.first_step = self.state.step
        self.notify(self.start_event(folder))
        self.records = finish.PictureLosses(folder.path / "picture_losses.jsonl", self.state.step)
        self.logs = [self.records, *(one for one in files if isinstance(one, finish.Log))]
        if self.sampler is not None:
            self.sampler.folder = folder.samples_dir
            self.logs.append(self.sampler)
        plain = self.data.plain
        parts = Parts(
            family=self.model.family,
            objective=self.model.objective,
            adapter=self.model.adapter,
            optimizer=self.optimizer,
            data=self.data.train,
            stop_rule=self.stop_rule,
            loss_baseline=baseline,
            validation=build.build_validation(preset, self.model, self.data, self.data.validation),
            notify=self.notify,
            save=self.save,
            sample=self.sample,
            record=self.record,
            interrupted=lambda: bool(signals),
            plain_validation=build.build_validation(preset, self.model, self.data, plain) if plain else None,
        )
        if self.checkpoint is not None:  # the random state is put back last, after everything that may draw
            for line in rng.restore(self.checkpoint.tensors["rng"], self.checkpoint.documents["rng"]):
                self.notify(Notice(line))
        outcome = run_with_advice(self, "in the optimizer's step", lambda: fit(parts, self.limits(), self.state))
        return self.end(outcome, signals, time.monotonic() - started)

    def limits(self) -> Limits:
        """The numbers of the loop."""
        preset = self.preset
        return Limits(
            max_steps=preset.train.max_steps,
            gradient_accumulation_steps=preset.train.gradient_accumulation_steps,
            max_grad_norm=preset.train.max_grad_norm,
            seed=preset.train.seed,
            validate_every=build.validate_every(preset, len(self.pictures.held_out)),
            save_every=preset.save.every,
            sample_every=preset.sample.every,
            sample_at_start=preset.sample.at_start,
            tell_ready=preset.train.optimizer.notify,
        )

    def start_event(self, folder: RunFolder) -> RunStart:
        """What the observers are told before the first step."""
        preset, data, model = self.preset, self.data.train, self.model
        held = len(self.pictures.held_out)
        per_epoch = data.batches_per_epoch / preset.train.gradient_accumulation_steps
        held_words = f"{held} held out" if held else "none held out: the validation uses flipped training pictures"
        return RunStart(
            name=folder.name,
            run_dir=folder.path,
            start_step=self.state.step,
            max_steps=preset.train.max_steps,
            steps_per_epoch=per_epoch,
            optimizer=preset.train.optimizer.name,
            num_images=data.num_images,
            num_modules=model.adapter.num_modules,
            num_parameters=sum(p.numel() for p in model.adapter.parameters()),
            device=str(model.family.device),
            facts=(
                ("model", f"{Path(preset.model.base).name}, {self.found.describe()}"),
                ("data", f"{data.num_images} pictures, {held_words}"),
                ("LoRA", f"rank {model.adapter.rank}, {describe_modules(model.adapter.num_modules_by_part())}"),
                *([("step", "length measured by the validation")] if self.stop_rule.gain else []),
                *([("trigger", preset.dataset.trigger)] if preset.dataset.trigger else []),
            ),
        )

    def sample(self, step: int) -> None:
        """Draw the sample prompts, where there are any."""
        if self.sampler is not None:
            self.sampler.draw(step, self.state.best_step)

    def record(self, step: int, samples: Sequence[Sample]) -> None:
        """Keep the loss of every picture for `emotrain images`."""
        if self.records is not None:
            try:
                self.records.write(step, samples)
            except ResourceError as error:
                self._lost(self.records, error)

    def save(self, state: TrainState) -> None:
        """A checkpoint and the best LoRA so far; a full disk costs this save, not the run."""
        self.notify(Phase("saving", 0, 1))
        tensors, documents = run_state.capture(state, self.model.adapter, self.optimizer, self.stop_rule, self.expected)
        documents["identity"] = self.identity().to_document()
        best = state.best_step is not None and state.best_step == state.step
        finish.sync(self.logs, self.notify)  # ahead of the commit: no power cut leaves a checkpoint without its logs
        try:
            keep = self.stop_rule.around_signals([*self.store.steps(), state.step])
            path = self.store.save(state.step, tensors, documents, best=best, keep=keep)
            self.notify(Saved(state.step, path, best))
        except ResourceError as error:
            self.notify(Notice(f"{error.message}; the run goes on"))
        self.notify(Phase("saving", 1, 1))

    def end(self, outcome: Outcome, signals: StopSignals, seconds: float) -> Result:
        """Write the LoRAs, check them, close the books."""
        state, folder = self.state, self.folder
        interrupted = outcome.reason is StopReason.INTERRUPTED
        lora = None
        if state.step:
            lora, outcome = finish.hand_over(self, outcome)
            finish.draw_written(self, lora, outcome)
        self.say_if_nothing_moved()
        self.say_unit()
        folder.update_info(
            finished=None if interrupted else now(),
            steps=state.step,
            stop_reason=str(outcome.reason),
            stop_sentence=outcome.sentence,
            best_step=state.best_step,
            best_loss=state.best_loss,
            base_loss=self.stop_rule.base_loss,
            skipped=state.guard.skipped,
            train_s=round(state.train_s, 3),
            resumes=state.resumes,
            lora=lora.name if lora else None,
            gain=self.stop_rule.gain.summary() if self.stop_rule.gain else None,
        )
        if outcome.reason in (StopReason.SIGNAL, StopReason.MAX_STEPS):
            contrast.compare_captions(self, lambda: bool(signals))
        page = report.write_at_end(folder, self.pictures.all, self.notify)
        end = RunEnd(
            step=state.step,
            stop_reason=str(outcome.reason),
            sentence=outcome.sentence,
            lora=lora,
            best_step=state.best_step,
            best_loss=state.best_loss,
            seconds=seconds,
            resume_command=f"emotrain resume {shlex.quote(str(folder.path))}" if interrupted else None,
            session_steps=state.step - self.first_step,
            all_command=self.all_command(outcome),
            report=page,
        )
        self.notify(end)
        code = ExitCode.OK
        if interrupted:
            code = signals.exit_code
        elif outcome.reason is StopReason.DIVERGED:
            code = ExitCode.DIVERGED
        return Result(folder, end, code)

    def all_command(self, outcome: Outcome) -> str | None:
        """How to train on all pictures for the steps that were found; None where none were held out of the folder."""
        best, preset = self.state.best_step, self.preset
        if outcome.reason is not StopReason.SIGNAL or not best or not self.pictures.held_out:
            return None
        if preset.validate_.folder is not None:
            return None
        settings: dict[str, Any] = {}
        if self.stop_rule.gain is not None:  # as many steps as the LoRA is made of, at their mean gain
            made = self.stop_rule.gain.best
            best, lr = made.steps, (preset.train.lr or 1.0) * made.gain / made.steps
            settings = {"train.gain": "fixed", "train.lr": f"{lr:.2f}", "train.allow_small_lr": "true"}
        # validated at the end alone: flipped training pictures must not choose an earlier step
        settings |= {"stop.mode": "off", "train.max_steps": best, "validate.every": best}
        words = " ".join(["validate.fraction=0", *(f"--set {key}={value}" for key, value in settings.items())])
        preset_path, name = shlex.quote(str(self.folder.preset_path)), shlex.quote(f"{self.folder.name}-all")
        return f"emotrain run {preset_path} --name {name} --set {words}"

    def say_unit(self) -> None:
        """What the run has found LR 1.0 to be, where it has measured it."""
        gain = self.stop_rule.gain
        if gain is not None and (length := gain.step_length()):
            number = f"{length:.1e}".replace("e-0", "e-")
            lr = self.preset.train.lr or 1.0
            made = f"the mean length of the {gain.best.steps} steps that the LoRA is made of"
            self.notify(Notice(f"LR {lr:.1f} = {number} here: {made}", level="info"))

    def say_if_nothing_moved(self) -> None:
        """A run that learned nothing says so: its LoRA looks like any other file."""
        base, best = self.stop_rule.base_loss, self.state.best_loss
        if not self.state.step or base is None or best is None or base - best >= NOTHING * base:
            return
        self.notify(
            Notice(
                f"this run learned next to nothing: the validation loss was {base:.4g} and is {best:.4g} at best;"
                " the LoRA changes hardly anything"
            )
        )

    def close(self) -> None:
        """Let every observer finish, whatever happened."""
        for observer in self.observers:
            observer.close()
        if self.records is not None:
            self.records.close()


def describe_modules(counts: dict[str, int]) -> str:
    """How many modules the LoRA has, and where where it is on more than the denoiser."""
    if len(counts) == 1:
        return f"{sum(counts.values())} modules"
    return " + ".join(f"{count} {part}" for part, count in counts.items()) + " modules"
