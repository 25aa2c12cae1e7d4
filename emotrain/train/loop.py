"""The training loop: forward, backward, observe the loss, step, tell, decide.

Shape letters: B samples of a micro-batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from emotrain.batch import Batch, embeddings_and_masks, send
from emotrain.dataset.ranking import LossRecord
from emotrain.pulse.gain import Change
from emotrain.pulse.stopping import UNFAIR_SENTENCE
from emotrain.ranks import ALONE, Ranks
from emotrain.train.events import Event, Notice, Phase, StepEnd, ValidationEnd
from emotrain.train.graphs import Graphs
from emotrain.train.losses import LossBaseline, inputs, losses_there, noise_like, timesteps_of, uniforms
from emotrain.train.memory import OutOfMemory, with_memory
from emotrain.train.preservation import Preservation
from emotrain.train.state import LIMIT, TrainState, describe
from emotrain.train.validation import Validation

if TYPE_CHECKING:
    from emotrain.dataset.loader import CachedDataset
    from emotrain.diffusion import Objective
    from emotrain.families.common import LoadedFamily
    from emotrain.lora.adapter import Adapter
    from emotrain.optim.protocol import OptimizerLike
    from emotrain.pulse.stopping import StopRule


LOSS_SCALE_STEP = 8.0  # by what the scale of the loss is divided: after four times 4096 is 1

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class StopReason(StrEnum):
    """Why the loop ended."""

    SIGNAL = "signal"
    MAX_STEPS = "max_steps"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Parts:
    """What one run is made of. `save` and `sample` are called between steps and must leave training untouched."""

    family: LoadedFamily
    objective: Objective
    adapter: Adapter
    optimizer: OptimizerLike
    data: CachedDataset
    stop_rule: StopRule
    loss_baseline: LossBaseline
    validation: Validation | None
    notify: Callable[[Event], None]
    save: Callable[[TrainState], None]
    sample: Callable[[int], None]
    interrupted: Callable[[], bool]
    graphs: Graphs | None = None  # of the passes, on a GPU where they can be recorded
    plain_validation: Validation | None = None  # the flipped pictures of `validation`, unflipped
    preservation: Preservation | None = None
    watch: Callable[[TrainState], None] | None = None  # looks at single pictures before step 1 and after validations
    ranks: Ranks = ALONE  # the processes that train together


@dataclass(frozen=True)
class Limits:
    """The numbers of the loop; 0 turns `sample_every` off."""

    max_steps: int
    gradient_accumulation_steps: int  # micro-batches of a step, of all processes together
    max_grad_norm: float | None
    seed: int
    validate_every: int
    save_every: int
    sample_every: int
    sample_at_start: bool = True
    tell_ready: bool = True  # say so when the optimizer's stop signal lights up


@dataclass(frozen=True)
class Outcome:
    """How the loop ended, in a word and in a sentence."""

    reason: StopReason
    sentence: str


@dataclass(frozen=True)
class Gathered:
    """What one step's forward and backward passes left behind; the losses are still on the device."""

    losses: Tensor  # float32 [2, samples]: as they are, and times their data set's weight
    positions: list[float]
    ids: list[str]
    captioned: list[bool]
    flags: tuple[Tensor, ...] = ()  # of several processes: how many were told to stop, how many had no memory

    def read(self, grad_norm: Tensor) -> tuple[list[float], list[float], float, list[float]]:
        """Plain losses, weighted losses, gradient's norm, flags: the one read of a step that waits for the device."""
        count = len(self.ids)
        last = [number.to(self.losses).reshape(1) for number in (grad_norm, *self.flags)]
        numbers = torch.cat([self.losses.flatten(), *last]).cpu().tolist()
        return numbers[:count], numbers[count : 2 * count], numbers[2 * count], numbers[2 * count + 1 :]

    def samples(self, step: int, plain: Sequence[float]) -> tuple[LossRecord, ...]:
        """One entry per sample, in their order."""
        rows = zip(self.ids, self.positions, plain, self.captioned, strict=True)
        return tuple(LossRecord(step, name, round(at, 5), round(loss, 6), said) for name, at, loss, said in rows)


def accumulate(parts: Parts, limits: Limits, state: TrainState) -> Gathered:
    """Forward and backward over this process's micro-batches of one step; the losses of others' are 0.

    The gradient is that of the mean over all samples of the step, whatever the sizes of its micro-batches and whoever
    takes them.
    """
    first = state.micro_step
    shares, counts = state.suspects.shares, state.suspects.weights
    asked = (shares,) if shares else ()
    numbers = range(limits.gradient_accumulation_steps)
    own = {i: parts.data.batch(first + i, *asked) for i in numbers[parts.ranks.rank :: parts.ranks.world]}
    labels = [own[i].labels if i in own else parts.data.labels(first + i, *asked) for i in numbers]
    total = sum(len(one.ids) for one in labels)
    losses: list[Tensor] = []
    positions: list[float] = []
    for i, one in enumerate(labels):
        u = uniforms(limits.seed, state.samples_seen + len(positions), len(one.ids))
        timesteps = timesteps_of(parts.family, parts.objective, u, one.latent_size)
        positions += parts.objective.position(timesteps).tolist()
        if (batch := own.get(i)) is None:
            losses.append(torch.zeros(2, len(one.ids), device=parts.family.device))
            continue
        noise = noise_like(batch.latents, limits.seed, first + i)
        noisy, *more = inputs(parts.objective, batch, noise, timesteps)
        tensors = [batch.weights, noisy, *more]
        if counts:  # the gradient alone: what is shown and observed stays the mean over all pictures
            tensors.insert(0, torch.tensor([counts.get(name, 1.0) for name in batch.ids]))
        work = partial(backward, parts, batch, total, bool(counts))
        if parts.graphs is None:
            losses.append(work(send(tensors, parts.family.device)))
        else:
            masks = [mask.numpy().tobytes() for mask in embeddings_and_masks(batch.text)[1].values()]
            losses.append(parts.graphs.run((total, bool(counts), *masks), tensors, work))
        parts.adapter.collect_gradients()
        if i == 0 and parts.preservation is not None:
            kept = parts.preservation.loss(state.step, batch, noisy, timesteps)
            if kept is not None:
                (kept * parts.adapter.loss_scale).backward()  # type: ignore[no-untyped-call]
                parts.adapter.collect_gradients()
    parts.adapter.unscale_gradients()
    ids = [name for one in labels for name in one.ids]
    captioned = [said for one in labels for said in one.captioned]
    return Gathered(torch.cat(losses, dim=1), positions, ids, captioned)


def exchange(parts: Parts, limits: Limits, state: TrainState, own: Gathered | None) -> Gathered:
    """What all processes left behind together, gradients and losses added up; None: this one had no memory."""
    if own is None:
        asked = (state.suspects.shares,) if state.suspects.shares else ()
        steps = range(state.micro_step, state.micro_step + limits.gradient_accumulation_steps)
        total = sum(len(parts.data.labels(step, *asked).ids) for step in steps)
        own = Gathered(torch.zeros(2, total, device=parts.family.device), [], [""] * total, [])
        failed = True
    else:
        failed = False
    flags = [torch.full((1,), float(flag), device=own.losses.device) for flag in (parts.interrupted(), failed)]
    numbers = torch.cat([own.losses.flatten(), *flags])
    parts.ranks.sum_gradients(parts.adapter.parameters(), numbers, parts.interrupted)
    return replace(own, losses=numbers[:-2].view(2, -1), flags=(numbers[-2], numbers[-1]))


def backward(parts: Parts, batch: Batch, total: int, counted: bool, there: Sequence[Tensor]) -> Tensor:
    """Forward and backward pass of a micro-batch: losses and weighted losses, float32 [2, B] on the device.

    Args:
        parts: of the run.
        batch: its masks and texts; its numbers are in `there`.
        total: samples of the whole step.
        counted: whether `there` begins with what each sample counts in the gradient.
        there: that, the data set's weights, and what `losses.inputs` gave, on the device.
    """
    count = [there[0]] if counted else []
    weights, *numbers = there[len(count) :]
    each = losses_there(parts.family, batch, numbers)
    weighted = each * weights
    gradient_of = weighted * count[0] if count else weighted
    (gradient_of.sum() / total * parts.adapter.loss_scale).backward()  # type: ignore[no-untyped-call]
    return torch.stack([each.detach(), weighted.detach()])


def clip(gradients: Sequence[Tensor], bound: float) -> Tensor:
    """Shorten the gradient to the norm `bound`; gives its norm before, still on the device.

    As torch.nn.utils.clip_grad_norm_ does it, for gradients that lie in one buffer too.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(list(gradients), torch.clamp(bound / (norm + 1e-6), max=1.0))
    return norm


def train_step(
    parts: Parts, limits: Limits, state: TrainState
) -> tuple[float, float, float, tuple[LossRecord, ...]] | None:
    """One optimizer step: (loss, observed loss, gradient norm, samples), None where it was not finite and left out.

    Raises:
        OutOfMemory: in the forward or backward pass; the state is that of before the step, and has been saved.
    """
    gathered: Gathered | None = None
    failure: OutOfMemory | None = None
    try:
        gathered = with_memory(f"at step {state.step + 1}", lambda: accumulate(parts, limits, state))
    except OutOfMemory as error:
        failure = error.with_traceback(None)
        parts.adapter.drop_gradients()
    if parts.ranks.world > 1:
        gathered = exchange(parts, limits, state, gathered)
    if gathered is None:
        give_up(parts, limits, state, failure)
    bound = limits.max_grad_norm if limits.max_grad_norm is not None else math.inf
    plain, values, grad_norm, flags = gathered.read(clip(parts.adapter.gradients(), bound))
    if flags:
        parts.ranks.stopped = flags[0] > 0
        if flags[1] > 0:
            give_up(parts, limits, state, failure)
    loss, observed_loss = sum(values) / len(values), parts.loss_baseline.observe(gathered.positions, values)
    samples = gathered.samples(state.step + 1, plain)
    state.micro_step += limits.gradient_accumulation_steps
    state.samples_seen += len(samples)
    state.guard = state.guard.update(loss, grad_norm)
    left_out = state.guard.leave_out
    if left_out:
        parts.notify(Notice(describe(state.step + 1, loss, grad_norm, gathered.ids)))
        if state.guard.diverged and math.isfinite(loss):
            lower_loss_scale(parts, state)
    else:
        parts.optimizer.observe(observed_loss)
        parts.optimizer.step()
        state.step += 1
    parts.optimizer.zero_grad()
    return None if left_out else (loss, observed_loss, grad_norm, samples)


def lower_loss_scale(parts: Parts, state: TrainState) -> None:
    """After steps whose gradients alone were not finite, in float16: go on with a smaller scale of the loss."""
    if parts.adapter.loss_scale <= 1.0:
        return
    parts.adapter.loss_scale = state.loss_scale = max(parts.adapter.loss_scale / LOSS_SCALE_STEP, 1.0)
    state.guard = replace(state.guard, in_a_row=0)
    if parts.graphs is not None:
        parts.graphs.drop()  # they hold the scale
    said = f"gradients were too large for float16 on {LIMIT} steps in a row"
    parts.notify(Notice(f"{said}: the loss is scaled by {state.loss_scale:g} from step {state.step + 1} on"))


def give_up(parts: Parts, limits: Limits, state: TrainState, failure: OutOfMemory | None) -> NoReturn:
    """Save, and end the run in all processes because one of them had no memory for its step.

    Raises:
        OutOfMemory: always.
    """
    parts.adapter.drop_gradients()
    if state.step % limits.save_every:
        parts.save(state)
    if parts.ranks.world == 1:
        assert failure is not None
        raise failure
    sizes = parts.ranks.meet([failure is not None, failure.asked_gib if failure is not None else None])
    rank, asked = next((rank, size) for rank, (failed, size) in enumerate(sizes) if failed)
    raise OutOfMemory(f"at step {state.step + 1} on rank {rank}", asked, everywhere=True)


def run_validation(parts: Parts, limits: Limits, state: TrainState) -> None:
    """Measure the validation, keep the best adapter, tell the observers.

    Within the optimizer's eval mode: schedule-free trains on other weights than those it means.
    """
    if parts.validation is not None:
        with parts.optimizer.eval_mode():
            _validate(parts, limits, parts.validation, state)
        change, parts.stop_rule.gain_change = parts.stop_rule.gain_change, Change.NONE
        if change:
            change_steps(parts, state, change, change.why)
    if parts.watch is not None:
        parts.watch(state)


def change_steps(parts: Parts, state: TrainState, change: Change, why: str) -> None:
    """Steps of another length, as the stop rule's gain says; shorter ones go on from the best weights."""
    assert parts.stop_rule.gain is not None
    what = f"step length {change} at step {state.step} (gain {parts.stop_rule.gain.value:.3g}): {why}"
    if change is Change.RAISED:
        parts.optimizer.rescale(change.factor)
    else:
        parts.adapter.load_state(state.best_adapter)
        parts.optimizer.restart(change.factor)
        what = f"{what}; training goes on from the weights of step {state.best_step}"
    parts.notify(Notice(what, level="info"))


def recover(parts: Parts, state: TrainState) -> bool:
    """After numbers that were not finite: whether the run goes on from its best weights, with shorter steps."""
    gain = parts.stop_rule.gain
    if gain is None or not state.best_adapter or not gain.update_divergence(state.step):
        return False
    state.guard = replace(state.guard, in_a_row=0)
    change_steps(parts, state, Change.LOWERED, f"loss or gradient was not finite on {LIMIT} steps in a row")
    return True


def run_sample(parts: Parts, step: int) -> None:
    """Draw the samples with the weights that the optimizer means; of several processes one draws."""
    if parts.graphs is not None:
        parts.graphs.drop()  # a picture takes memory, and drawing it much longer than recording them again
    with parts.ranks.together(), parts.optimizer.eval_mode():
        parts.sample(step)
        parts.ranks.meet(None)


def _validate(parts: Parts, limits: Limits, validation: Validation, state: TrainState) -> None:
    rule, plain_validation = parts.stop_rule, parts.plain_validation
    was_unfair = rule.unfair

    def progress(done: int, total: int) -> None:
        parts.notify(Phase("validating", done, total))

    def measured() -> tuple[list[float], list[float]]:
        plain = plain_validation.pictures(progress) if plain_validation else []
        return (plain if was_unfair else validation.pictures(progress)), plain

    progress(0, 1)
    with parts.ranks.together():
        pictures, plain_pictures = with_memory(f"at the validation of step {state.step}", measured)
    progress(1, 1)
    loss, plain = fmean(pictures), fmean(plain_pictures) if plain_pictures else None
    if not math.isfinite(loss) or not math.isfinite(plain or 0.0):
        parts.notify(Notice(f"the validation at step {state.step} was not finite and is left out"))
        rule.update_non_finite_validation(state.step)
        return
    if rule.update_validation(state.step, loss, plain, pictures, plain_pictures):
        state.best_step, state.best_loss = state.step, rule.observed_loss
        state.best_adapter = parts.adapter.state()
    if rule.unfair and not was_unfair:
        parts.notify(Notice(UNFAIR_SENTENCE))
    assert rule.base_loss is not None
    assert rule.best_step is not None
    assert rule.best_loss is not None
    drift = validation.drift() if state.step else 0.0
    paired = rule.paired
    parts.notify(
        ValidationEnd(
            step=state.step,
            loss=rule.observed_loss,
            scalar=rule.scalar,
            base_loss=rule.base_loss,
            drift=drift,
            best_step=rule.best_step,
            best_loss=rule.best_loss,
            forecast=rule.forecast(state.step, limits.max_steps, limits.validate_every),
            compared_step=paired.best_step if paired else None,
            difference=paired.difference if paired else None,
            difference_error=paired.error if paired else None,
            improvement_chance=paired.chance if paired else None,
            comparison=paired.words() if paired else "",
        )
    )


def before_first_step(parts: Parts, limits: Limits, state: TrainState) -> None:
    """Tell the emotion what the base's loss is, measure the base, draw its samples."""
    if parts.loss_baseline.start is not None:
        parts.optimizer.begin(parts.loss_baseline.start)
    if parts.stop_rule.base_loss is None:
        run_validation(parts, limits, state)
        if limits.sample_at_start:
            run_sample(parts, 0)


def fit(parts: Parts, limits: Limits, state: TrainState, clock: Callable[[], float] = time.monotonic) -> Outcome:
    """Train until the stop rule, the ceiling, a signal or non-finite numbers end it; `state` is changed in place."""
    if state.step == 0:
        before_first_step(parts, limits, state)
    if state.step and (sentence := parts.stop_rule.decide(state.step)):
        return Outcome(StopReason.SIGNAL, sentence)  # it had ended, but died before the hand-over
    while state.step < limits.max_steps:
        started = clock()
        step = train_step(parts, limits, state)
        if step is None:
            if state.guard.diverged and not recover(parts, state):
                return Outcome(
                    StopReason.DIVERGED,
                    f"loss or gradient was not finite on {LIMIT} steps in a row",
                )
            continue
        loss, observed_loss, grad_norm, samples = step
        step_s = clock() - started
        state.train_s += step_s
        tell(parts, limits, state, loss, observed_loss, grad_norm, step_s, samples)
        if state.step % limits.validate_every == 0 or state.step == limits.max_steps:
            run_validation(parts, limits, state)
        sentence = parts.stop_rule.decide(state.step)
        if limits.sample_every and (state.step % limits.sample_every == 0 or sentence):
            run_sample(parts, state.step)
        if state.step % limits.save_every == 0 or sentence or state.step == limits.max_steps:
            parts.save(state)
        if sentence:
            return Outcome(StopReason.SIGNAL, sentence)
        stopped = parts.interrupted() if parts.ranks.world == 1 else parts.ranks.stopped
        if stopped and state.step < limits.max_steps:
            if state.step % limits.save_every:
                parts.save(state)
            return Outcome(StopReason.INTERRUPTED, f"stopped by you after step {state.step}")
    return Outcome(
        StopReason.MAX_STEPS, f"the ceiling of {limits.max_steps} steps was reached{parts.stop_rule.evidence()}"
    )


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in use so far: of the GPU, else of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def device_memory_gib(device: torch.device) -> float:
    """How much memory a GPU has; 0 on other devices."""
    return torch.cuda.mem_get_info(device)[1] / 2**30 if device.type == "cuda" else 0.0


def tell(
    parts: Parts,
    limits: Limits,
    state: TrainState,
    loss: float,
    observed_loss: float,
    grad_norm: float,
    step_s: float,
    samples: tuple[LossRecord, ...] = (),
) -> None:
    """Feed the stop rule, what is known of single pictures, and the observers with one step."""
    optimizer, rule = parts.optimizer, parts.stop_rule
    if parts.watch is not None:
        state.suspects.note(samples)
    assert optimizer.reading is not None
    lights_up = optimizer.should_stop and not (rule.lit and rule.lit[-1])
    rule.update_step(optimizer.should_stop, optimizer.reading.pulse * optimizer.reading.drive)
    parts.notify(
        StepEnd(
            step=state.step,
            epoch=state.micro_step / max(parts.data.batches_per_epoch, 1),
            loss=loss,
            observed_loss=observed_loss,
            reading=optimizer.reading,
            ready=optimizer.should_stop,
            grad_norm=grad_norm,
            lr=float(optimizer.param_groups[0]["lr"]),
            step_s=step_s,
            stop_meter=rule.meter(state.step),
            expected_end=rule.expected_end(state.step, limits.max_steps, limits.validate_every),
            memory_gib=peak_memory_gib(parts.family.device),
            skipped=state.guard.skipped,
            gain=rule.gain.value if rule.gain else 1.0,
            samples=samples,
        )
    )
    if lights_up and limits.tell_ready:
        parts.notify(Notice(f"READY TO STOP: the optimizer's signal is lit at step {state.step}", level="info"))
