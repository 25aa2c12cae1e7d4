"""The emotion of an emo optimizer on plain floats: sensors, generations, stop signals (no torch).

The method is muooon's (EmoNavi and EmoSens repositories, Apache-2.0); the code is written from its formulas. All
arithmetic is float64 in the order written here: one branch of the sensors is decided by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from emotrain.errors import DivergedError

Sensor = Literal["faithful", "intent"]
Watch = Literal["long", "scalar"]

SENSORS: tuple[Sensor, ...] = ("faithful", "intent")
WINDOW = 32  # values the stop signal of 3.6 to 3.7.6 looks back on
_EDGE = math.nextafter(1.0, 0.0)  # tanh rounds to 1 from 19.1 on; a scalar stays inside (-1, 1)


class NonFiniteLossError(DivergedError, ValueError):
    """A loss that is NaN or infinite; the averages have not been touched."""


@dataclass(frozen=True)
class Averages:
    """Moving averages of the loss with the weights 0.30, 0.05 and 0.01; all start at one loss."""

    short: float
    medium: float
    long: float


@dataclass(frozen=True)
class EmotionState:
    """All that the emotion remembers from step to step.

    `noise_est` and `d_est` are emoPulse's noise and signal, `history` and `chain` its slow parts; `recent` the last
    values the windowed stop signal looks at; `ready` whether the signal is lit.
    """

    generation: str
    step: int = 0
    averages: Averages | None = None
    noise_est: float = 0.0
    d_est: float = 0.0
    history: float = 1.0
    chain: float = 0.0
    recent: tuple[float, ...] = ()
    ready: bool = False


@dataclass(frozen=True)
class Reading:
    """The emotion of one optimizer step.

    `scalar` in (-1, 1), positive while the loss falls; `trust` = copysign(1 - |scalar|, scalar); `pulse` is the step
    length; `drive` the 3.6 and 3.7.0 multiplier (1 elsewhere); `short`, `medium`, `long` the loss averages; `noise_est`
    and `d_est` the two sides of emoPulse's signal-to-noise ratio. Those with a tag are curves in TensorBoard.
    """

    scalar: Annotated[float, "emo/scalar"]
    trust: Annotated[float, "emo/trust"]
    pulse: Annotated[float, "emo/pulse"]
    drive: float
    short: float
    medium: float
    long: float
    noise_est: float
    d_est: float


@dataclass(frozen=True)
class Rhythm:
    """The constants of emoPulse in the generations that take it from a signal-to-noise ratio."""

    up: float
    down: float
    floor: float
    first: bool  # the history moves in the first step too
    chained: bool
    lowest: float
    highest: float
    scoped: bool  # `highest` is multiplied by the scope


RHYTHMS = {
    "3.7.6": Rhythm(1.05, 0.98, 1e-3, False, False, 1e-6, 3e-3, False),
    "3.9": Rhythm(1.50, 0.80, 1e-10, True, True, 1e-8, 3e-3, True),
}
GENERATIONS = ("3.6", "3.7.0", "3.7.6", "3.9")


def canonical_generation(generation: str) -> str:
    """The full name of a generation: "3.7" means its finished form, 3.7.6.

    Raises:
        ValueError: the name is unknown.
    """
    name = "3.7.6" if generation == "3.7" else generation
    if name not in GENERATIONS:
        raise ValueError(f"generation must be one of {', '.join(GENERATIONS)}, got {generation!r}")
    return name


def state_to_dict(state: EmotionState) -> dict[str, Any]:
    """Plain numbers, strings and lists, ready for JSON."""
    plain = asdict(state)
    plain["averages"] = [] if state.averages is None else list(asdict(state.averages).values())
    plain["recent"] = list(state.recent)
    return plain


def state_from_dict(plain: Mapping[str, Any]) -> EmotionState:
    """The inverse of `state_to_dict`; `plain` is not touched."""
    words = dict(plain)
    averages = words.pop("averages")
    return EmotionState(
        **{**words, "recent": tuple(words["recent"])},
        averages=Averages(*averages) if averages else None,
    )


def start(generation: str = "3.9", loss: float | None = None) -> EmotionState:
    """The emotion before the first step.

    Args:
        generation: see `canonical_generation`.
        loss: what the loss is before training, the mean of many; the averages begin there. None, as published: they
            begin at the first loss, whose luck `long` then carries for a hundred steps.

    Raises:
        NonFiniteLossError: `loss` is NaN or infinite.
    """
    name = canonical_generation(generation)
    averages = None if loss is None else _hear(None, loss)
    if name in RHYTHMS:
        return EmotionState(name, averages=averages, noise_est=1.0, d_est=0.02)
    return EmotionState(name, averages=averages)


def update_averages(
    averages: Averages | None, loss: float, sensor: Sensor = "faithful"
) -> tuple[Averages, float, float]:
    """The sensors: what one more loss says against its moving averages.

    Works for any series of losses: the optimizer's own, a validation validation's, a foreign log's.

    Args:
        averages: what came back from the last call, None before the first.
        loss: mean loss of one whole step, finite.
        sensor: "faithful" keeps the published branch, whose two sides are equal up to rounding; "intent" takes the
            medium average only where it is the quieter of the two.

    Returns:
        The new averages, scalar in (-1, 1) (positive while the loss falls) and trust = copysign(1 - |scalar|,
        scalar).

    Raises:
        NonFiniteLossError: the loss is NaN or infinite.
    """
    observed_loss = _hear(averages, loss)
    scalar = _scalar(observed_loss, sensor)
    return observed_loss, scalar, _trust(scalar)


def observe(
    state: EmotionState,
    loss: float,
    *,
    scope: float = 1.0,
    sensor: Sensor = "faithful",
    stopcoef: float = 0.04,
    watch: Watch = "scalar",
    num_tensors: int = 1,
) -> tuple[EmotionState, Reading, bool]:
    """One step of the emotion.

    Args:
        state: the emotion after the last step.
        loss: mean loss of the whole optimizer step.
        scope: the learning rate given by the user (3.6: the learning rate itself).
        sensor: see `update_averages`.
        stopcoef: 3.9 only, the loss below which it may be ready.
        watch: what the windowed signal of 3.6 to 3.7.6 looks at, tanh of the long ratio or the scalar.
        num_tensors: 3.7.0 only, how many tensors have a gradient; its pulse depends on it. The reading's pulse is the
            last tensor's.

    Returns:
        The new state, the reading, and whether the stop signal is lit.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; `state` is still good.
    """
    averages = _hear(state.averages, loss)
    scalar = _scalar(averages, sensor)
    trust = _trust(scalar)
    state = replace(state, step=state.step + 1, averages=averages)
    drive, pulse = 1.0, scope
    if state.generation in RHYTHMS:
        state = _beat(state, scalar, trust)
        pulse = pulse_at(state, scope)
    else:
        drive = emo_drive(scalar, trust)
        if state.generation == "3.7.0":
            pulses, state = tensor_pulses(state, trust, [scope] * num_tensors)
            pulse = pulses[-1]
    state = _signal(state, _tanh(_ratios(averages)[0]) if watch == "long" else scalar, stopcoef)
    reading = Reading(
        scalar=scalar,
        trust=trust,
        pulse=pulse,
        drive=drive,
        short=averages.short,
        medium=averages.medium,
        long=averages.long,
        noise_est=state.noise_est,
        d_est=state.d_est,
    )
    return state, reading, state.ready


def emo_drive(scalar: float, trust: float) -> float:
    """The multiplier of 3.6 and 3.7.0: wakes up in the middle of the scale, calms down at its end."""
    strength = abs(scalar)
    if 0.25 < strength < 0.5:
        return 8.0 * abs(trust) * (1.0 + 0.1 * trust)
    return 1.0 - strength if strength > 0.75 else 1.0


def pulse_at(state: EmotionState, scope: float) -> float:
    """EmoPulse of 3.7.6 and 3.9 for one scope (learning rate given by the user), within its bounds."""
    rhythm = RHYTHMS[state.generation]
    chain = max(math.pow(100.0, state.chain), 1e-2) if rhythm.chained else 1.0
    highest = scope * rhythm.highest if rhythm.scoped else rhythm.highest
    return max(rhythm.lowest, min(state.history * scope * chain * 1e-4, highest))


def tensor_pulses(state: EmotionState, trust: float, scopes: Sequence[float]) -> tuple[list[float], EmotionState]:
    """EmoPulse of 3.7.0, which moves on once per parameter tensor with a gradient.

    Args:
        state: the emotion before these tensors.
        trust: of this step.
        scopes: the learning rate of each tensor, in the optimizer's order.

    Returns:
        One pulse per tensor, and the state after the last.
    """
    noise, d = state.noise_est, state.d_est
    pulses = []
    for scope in scopes:
        noise = 0.8 * noise + 0.2 * abs(trust)
        d = 0.9 * d + 0.1 * max(trust, 0.0)
        pulses.append(min(min(d, 20.0 * scope) / max(noise, 1e-10), 1e-3))
    return pulses, replace(state, noise_est=noise, d_est=d)


def _hear(averages: Averages | None, loss: float) -> Averages:
    if not math.isfinite(loss):
        raise NonFiniteLossError(
            f"the loss is {loss}",
            "leave this batch out, or lower the learning rate if it comes back; the optimizer has not been touched",
        )
    if averages is None:
        averages = Averages(loss, loss, loss)
    return Averages(
        0.30 * loss + 0.70 * averages.short,
        0.05 * loss + 0.95 * averages.medium,
        0.01 * loss + 0.99 * averages.long,
    )


def _ratios(averages: Averages) -> tuple[float, float, float, float]:
    base_l, base_m = max(averages.long, 1e-5), max(averages.medium, 1e-5)
    diff = averages.long - averages.short
    return diff / base_l, diff / base_m, base_l, base_m


def _scalar(averages: Averages, sensor: Sensor) -> float:
    r_l, r_m, base_l, base_m = _ratios(averages)
    if sensor not in SENSORS:
        raise ValueError(f"sensor must be one of {', '.join(SENSORS)}, got {sensor!r}")
    if abs(r_l) < 0.05:
        return _tanh(r_l)
    if sensor == "intent":
        return _tanh(r_m if abs(r_m) < abs(r_l) else r_l)
    # both sides are |diff| up to rounding: the last bit decides
    return _tanh(r_m if abs(r_m) * base_m < abs(r_l) * base_l else r_l)


def _tanh(x: float) -> float:
    return max(-_EDGE, min(math.tanh(x), _EDGE))


def _trust(scalar: float) -> float:
    return math.copysign(1.0 - abs(scalar), scalar)


def _beat(state: EmotionState, scalar: float, trust: float) -> EmotionState:
    rhythm = RHYTHMS[state.generation]
    noise = 0.97 * state.noise_est + 0.03 * abs(scalar)
    d = 0.97 * state.d_est + 0.03 * abs(trust)
    history, chain = state.history, state.chain
    if rhythm.chained:
        chain = 0.7 * chain + 0.3 * scalar
    if rhythm.first or state.step > 1:
        x = ((abs(max(noise, rhythm.floor) - d) + 0.1) / (abs(scalar - trust) + 0.1)) ** 2
        if x >= history and trust >= 0.5:
            history = min(x, rhythm.up * history)
        elif -0.5 <= trust <= 0.5:
            history = rhythm.down * x
    return replace(state, noise_est=noise, d_est=d, history=history, chain=chain)


def _signal(state: EmotionState, watched: float, stopcoef: float) -> EmotionState:
    if state.generation == "3.9":
        averages = state.averages
        assert averages is not None
        lit = state.d_est - state.noise_est >= 0.3 and averages.medium <= stopcoef
        return replace(state, ready=lit)
    recent = (*state.recent, watched)[-WINDOW:]
    ready = state.ready
    if len(recent) == WINDOW and not ready:
        mean = sum(recent) / WINDOW
        quiet = sum(abs(value) for value in recent) / WINDOW < 0.05
        ready = quiet and sum((value - mean) ** 2 for value in recent) / WINDOW < 0.005
    return replace(state, recent=recent, ready=ready)
