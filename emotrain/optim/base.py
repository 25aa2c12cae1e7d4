"""What all emo optimizers share: the loss goes in, the emotion sets the step length.

The method is muooon's (EmoNavi and EmoSens repositories, Apache-2.0). Here the loss is an argument: nothing is
patched, and it is the mean loss of the whole optimizer step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from emotrain.optim.kernels import Batch, Length, correction_at, fill, gather, refuse_sparse
from emotrain.optim.state import check_state, emotion_to_dict, load_tensors, reading_from_dict
from emotrain.pulse.signal import (
    SENSORS,
    EmotionState,
    Reading,
    Sensor,
    Watch,
    canonical_generation,
    observe,
    pulse_at,
    start,
    state_from_dict,
    tensor_pulses,
)

LOG = logging.getLogger("emotrain.optim")


class Writer(Protocol):
    """A TensorBoard SummaryWriter, or what looks like one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Note one number."""


class EmoOptimizer(torch.optim.Optimizer):
    """Base of the emo optimizers; a subclass gives the names below and `_update`.

    Args:
        params: parameters or groups of them; a group's own `lr` scales its pulse.
        lr: scales the pulse, 1.0 (generation 3.6: the learning rate itself, 1e-3).
        eps: added to the root of the second moment.
        betas: decay of the moments.
        weight_decay: share of the weights that decay takes, times the step length.
        use_shadow: keep a slow copy of the weights that pulls them back when the emotion is high.
        stopcoef: 3.9: the loss below which the stop signal may be lit.
        notify: log "READY TO STOP" when the stop signal turns on.
        writer: a TensorBoard-like object; gets `emoLR/*` and `emostate/*` once per step.
        generation: one of the class's `generations`, the first by default; "3.7" means 3.7.6.
        sensor: "faithful" or "intent", see `emotrain.pulse.signal.update_averages`.
        bias_correction: correct EmoSens's and EmoNavi's moments for their start at zero, which the published rule
            leaves out: its steps 3 to 50 are two to three times as long as its pulse says. No effect elsewhere.

    Raises:
        ValueError: a word out of its range.
    """

    name: ClassVar[str] = ""
    generations: ClassVar[tuple[str, ...]] = ("3.9",)
    watch: ClassVar[Watch] = "scalar"

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: float = 1e-8,
        betas: tuple[float, float] | None = None,
        weight_decay: float = 0.01,
        use_shadow: bool = False,
        *,
        stopcoef: float = 0.04,
        notify: bool = True,
        writer: Writer | None = None,
        generation: str | None = None,
        sensor: Sensor = "faithful",
        bias_correction: bool = False,
    ) -> None:
        self.generation = self._choose(generation)
        if sensor not in SENSORS:
            raise ValueError(f"sensor must be one of {', '.join(SENSORS)}, got {sensor!r}")
        if not stopcoef > 0.0:
            raise ValueError(f"stopcoef must be positive, got {stopcoef}")
        self.use_shadow = use_shadow
        self.stopcoef = stopcoef
        self.sensor = sensor
        self.bias_correction = bias_correction
        self.notify = notify
        self.writer = writer
        self.reading: Reading | None = None
        self._emotion = start(self.generation)
        self._observed = False
        lr = (1e-3 if self.generation == "3.6" else 1.0) if lr is None else lr
        betas = (0.9, 0.995) if betas is None else betas
        super().__init__(params, {"lr": lr, "eps": eps, "betas": tuple(betas), "weight_decay": weight_decay})

    @property
    def should_stop(self) -> bool:
        """Whether the stop signal is lit; whether a run ends is decided elsewhere."""
        return self._emotion.ready

    def begin(self, loss: float) -> None:
        """Tell what the loss is before the first step, as the mean of many: the averages begin there.

        Without it they begin at the first loss observed, as published.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            RuntimeError: a loss was observed already.
        """
        if self._emotion.step:
            raise RuntimeError(f"{type(self).__name__}.begin() was called after {self._emotion.step} steps")
        self._emotion = start(self.generation, loss)

    def observe(self, loss: float | Tensor) -> Reading:
        """Tell the optimizer the loss, once per optimizer step and before `step`.

        Args:
            loss: mean loss of the whole step: over all micro-batches and ranks, before any division for accumulation
                and any GradScaler factor. A tensor must have one element; reading it waits for the device.

        Returns:
            What was read from the loss (also in `reading`); `pulse` is the first group's.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; nothing has changed.
        """
        before = self._emotion
        state, self.reading, ready = observe(
            before,
            float(loss.detach()) if isinstance(loss, Tensor) else float(loss),
            scope=scope_of(self.param_groups[0], self.generation),
            sensor=self.sensor,
            stopcoef=self.stopcoef,
            watch=self.watch,
            num_tensors=self._count_gradients() if self.generation == "3.7.0" else 1,
        )
        if self.generation == "3.7.0":  # its pulse moves on in `step`, tensor by tensor
            state = replace(state, noise_est=before.noise_est, d_est=before.d_est)
        self._emotion, self._observed = state, True
        if ready and not before.ready:
            self._turned_on()
            if self.notify:
                LOG.warning("READY TO STOP: %s at step %d", type(self).__name__, self._emotion.step)
        return self.reading

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients.

        Args:
            closure: computes the loss and its gradients; its loss is observed unless `observe` was called for this
                step.

        Returns:
            What the closure returned, None without one.

        Raises:
            RuntimeError: no loss was observed for this step, or a gradient is sparse.
            NonFiniteLossError: the closure's loss is NaN or infinite; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if not self._observed:
                self.observe(loss)
        if not self._observed:
            raise RuntimeError(
                f"{type(self).__name__}.step() was called before observe(loss): call observe(mean_loss) once before "
                "each step(), or pass a closure: step(closure)"
            )
        members = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        grads: list[list[Tensor]] = [[p.grad for p in params] for params in members]
        refuse_sparse(grads)
        self._observed = False
        assert self.reading is not None
        lengths, self._emotion, reading = step_lengths(self.param_groups, members, self._emotion, self.reading)
        self.reading = reading
        self._prepare(members)
        factor, slots = self._decays_by_factor(), self._slots()
        for group, params, own, (eta, decay) in zip(self.param_groups, members, grads, lengths, strict=True):
            for originals, batch in gather(params, own, eta, decay):
                batch.as_factor = factor
                if slots or self.use_shadow:
                    fill([self.state[p] for p in originals], batch, originals, slots, self.use_shadow)
                if self.use_shadow:
                    follow_shadow(batch, reading)
                self._update(batch, group)
                batch.write_back()
        if self.writer is not None:
            write(self.writer, reading, self.should_stop, self._emotion.step)
        return loss

    def rescale(self, scale: float) -> None:
        for group in self.param_groups:
            group["scope"] *= scale
            group["lr"] *= scale

    restart = rescale

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; a group's own `lr` becomes its scope, then `lr` shows the pulse."""
        settings = {**self.defaults, **param_group}
        lr, eps, decay, (beta1, beta2) = (settings[k] for k in ("lr", "eps", "weight_decay", "betas"))
        if not lr > 0.0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not eps > 0.0:
            raise ValueError(f"eps must be positive, got {eps}")
        if not decay >= 0.0:
            raise ValueError(f"weight_decay must not be negative, got {decay}")
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            raise ValueError(f"betas must be in [0, 1), got {(beta1, beta2)}")
        super().add_param_group({**param_group, "scope": float(lr), "lr": float(lr)})

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: tensors are copied, and the emotion is in it as plain numbers."""
        packed = super().state_dict()
        packed["state"] = {
            index: {slot: value.detach().clone() for slot, value in slots.items()}
            for index, slots in packed["state"].items()
        }
        packed["emotion"] = emotion_to_dict(self.name, self._emotion, self.reading, self._observed, self._memory())
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly from `state_dict`, which is not touched.

        Raises:
            WrongStateError: it belongs to another optimizer, generation or set of parameters.
        """
        check_state(self, self.name, self.generation, state_dict)
        super().load_state_dict({**state_dict, "state": {}})
        load_tensors(self, state_dict)
        emotion = state_dict["emotion"]
        self._emotion = state_from_dict(emotion["state"])
        self.reading = reading_from_dict(emotion["reading"])
        self._observed = bool(emotion["observed_loss"])
        self._recall(emotion["memory"])

    def __getstate__(self) -> dict[str, Any]:
        """All but the writer, so that a copied optimizer goes on."""
        settings = ("generation", "use_shadow", "stopcoef", "sensor", "bias_correction", "notify")
        own = {key: getattr(self, key) for key in (*settings, "reading", "_emotion", "_observed")}
        return {**super().__getstate__(), **own, "writer": None}

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Nothing to do: the parameters are always the ones to look at and to train."""
        yield

    # What a subclass gives.

    def _slots(self) -> tuple[str, ...]:
        """Names of the state tensors that each parameter has (all zero at first)."""
        return ()

    def _update(self, batch: Batch, group: dict[str, Any]) -> None:
        """The update rule, in place on `batch`."""
        raise NotImplementedError

    def _decays_by_factor(self) -> bool:
        """Whether the published code writes decay as p *= 1 - decay, which rounds otherwise than p += -decay p."""
        return self.generation == "3.9"

    def _prepare(self, members: list[list[Tensor]]) -> None:
        """Called once per step before the updates, with each group's tensors that have gradients."""

    def _turned_on(self) -> None:
        """Called when the stop signal turns on."""

    def _memory(self) -> dict[str, float]:
        """Numbers besides the emotion that a resumed run needs."""
        return {}

    def _recall(self, memory: dict[str, float]) -> None:
        """The inverse of `_memory`."""

    # The parts of a step.

    @classmethod
    def _choose(cls, generation: str | None) -> str:
        if generation is None:
            return cls.generations[0]
        try:
            name = canonical_generation(generation)
        except ValueError:
            name = ""
        if name not in cls.generations:
            known = ", ".join(cls.generations)
            raise ValueError(f"{cls.__name__} has generation {known}, got {generation!r}")
        return name

    def _correction(self, group: dict[str, Any]) -> float:
        return correction_at(group["betas"], self._emotion.step) if self.bias_correction else 1.0

    def _count_gradients(self) -> int:
        return max(1, sum(p.grad is not None for group in self.param_groups for p in group["params"]))


def scope_of(group: dict[str, Any], generation: str) -> float:
    """The learning rate given by the user; in 3.6 it is `lr` itself, so that a scheduler can move it."""
    return float(group["lr"] if generation == "3.6" else group["scope"])


def step_lengths(
    groups: list[dict[str, Any]], members: list[list[Tensor]], emotion: EmotionState, reading: Reading
) -> tuple[list[tuple[Length, Length]], EmotionState, Reading]:
    """Step length and decay of each group; each group's `lr` is set to its pulse, for loggers.

    Args:
        groups: the optimizer's parameter groups.
        members: their parameters that have gradients.
        emotion: after this step's loss.
        reading: of this step.

    Returns:
        Per group eta and decay (3.7.0: one of each per tensor), the emotion and the reading (both change in 3.7.0
        only, whose pulse moves on with every tensor; the reading then shows the last tensor's).
    """
    lengths: list[tuple[Length, Length]] = []
    for group, params in zip(groups, members, strict=True):
        scope, weight_decay = scope_of(group, emotion.generation), group["weight_decay"]
        if emotion.generation == "3.7.0":
            pulses, emotion = tensor_pulses(emotion, reading.trust, [scope] * len(params))
            lengths.append(([x * reading.drive for x in pulses], [x * weight_decay for x in pulses]))
            if pulses:
                group["lr"] = pulses[-1]
                reading = replace(reading, pulse=pulses[-1], noise_est=emotion.noise_est, d_est=emotion.d_est)
        else:
            group["lr"] = scope if emotion.generation == "3.6" else pulse_at(emotion, scope)
            lengths.append((group["lr"] * reading.drive, group["lr"] * weight_decay))
    return lengths, emotion, reading


def follow_shadow(batch: Batch, reading: Reading) -> None:
    """One step of the shadow, before the update; all generations, after muooon's EmoNavi and EmoSens (Apache-2.0).

    ratio = 1 - |scalar| where |scalar| > 0.625, else 0. With ratio > 0: p = (1-ratio) p + |trust| shadow; otherwise
    shadow += 0.1 |trust| (p - shadow).

    Args:
        batch: with state "shadow"; its params and shadows are changed in place.
        reading: of this step.
    """
    shadows, trust = batch.state["shadow"], abs(reading.trust)
    ratio = 1.0 - abs(reading.scalar) if abs(reading.scalar) > 0.625 else 0.0
    if ratio > 0.0:
        torch._foreach_mul_(batch.params, 1.0 - ratio)
        torch._foreach_add_(batch.params, torch._foreach_mul(shadows, trust))
    else:
        torch._foreach_lerp_(shadows, batch.params, 0.1 * trust)


def write(writer: Writer, reading: Reading, should_stop: bool, step: int) -> None:
    """One step's numbers; the tags are those of muooon's option guide, `trust` and `stop` are ours."""
    numbers = {
        "emoLR/base": reading.pulse,
        "emoLR/Turbo": reading.pulse * reading.drive,
        "emostate/emoDrive": reading.drive,
        "emostate/scalar": reading.scalar,
        "emostate/trust": reading.trust,
        "emostate/stop": float(should_stop),
    }
    for tag, number in numbers.items():
        writer.add_scalar(tag, number, step)
