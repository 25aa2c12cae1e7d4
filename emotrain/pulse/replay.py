"""The readings and signals of an emo optimizer on any series of losses (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emotrain.pulse.signal import Reading, Sensor, Watch, canonical_generation, observe, start

# Each published stop signal: its name, the generation it runs in, and what it watches.
SIGNALS: tuple[tuple[str, str, Watch], ...] = (
    ("3.9", "3.9", "long"),
    ("3.6-3.7.6 navi/sens", "3.7.6", "long"),
    ("3.6-3.7.6 others", "3.7.6", "scalar"),
)


@dataclass(frozen=True)
class Signal:
    """When a stop signal was lit: its first step (None: never), on how many steps, and whether it was at the end."""

    name: str
    first: int | None
    num_lit: int
    at_end: bool


@dataclass(frozen=True)
class Replay:
    """Readings of one generation, one per logged loss, and all stop signals."""

    generation: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    readings: tuple[Reading, ...]
    signals: tuple[Signal, ...]

    def to_dict(self) -> dict[str, Any]:
        words = ("scalar", "trust", "pulse", "drive", "short", "medium", "long", "noise_est", "d_est")
        return {
            "generation": self.generation,
            "step": list(self.steps),
            "loss": list(self.losses),
            **{word: [getattr(reading, word) for reading in self.readings] for word in words},
            "signals": [
                {"name": s.name, "first": s.first, "num_lit": s.num_lit, "at_end": s.at_end} for s in self.signals
            ],
        }


def replay(
    steps: Sequence[int],
    losses: Sequence[float],
    *,
    generation: str = "3.9",
    lr: float | None = None,
    sensor: Sensor = "faithful",
    stopcoef: float = 0.04,
    num_tensors: int = 1,
    start_loss: float | None = None,
    gains: Sequence[float] = (),
) -> Replay:
    """Feed losses through a generation and through every stop signal.

    Args:
        steps: number of each logged step.
        losses: finite; each counts as one optimizer step.
        generation: of the readings.
        lr: the scope; None takes the generation's own, 1.0 (3.6: 1e-3).
        sensor: see `emotrain.pulse.signal.update_averages`.
        stopcoef: of the 3.9 signal.
        num_tensors: 3.7.0 only, see `emotrain.pulse.signal.observe`.
        start_loss: where the averages begin, see `emotrain.pulse.signal.start`.
        gains: factor on `lr` at each loss; empty: 1.

    Raises:
        ValueError: the generation is unknown, or steps, losses and gains differ in number.
        NonFiniteLossError: a loss is NaN or infinite.
    """
    name = canonical_generation(generation)
    scope = (1e-3 if name == "3.6" else 1.0) if lr is None else lr
    state, readings = start(name, start_loss), []
    for loss, gain in zip(losses, gains or [1.0] * len(losses), strict=True):
        state, reading, _ = observe(state, loss, scope=scope * gain, sensor=sensor, num_tensors=num_tensors)
        readings.append(reading)
    return Replay(
        generation=name,
        steps=tuple(steps),
        losses=tuple(losses),
        readings=tuple(readings),
        signals=tuple(_signal(spec, steps, losses, sensor, stopcoef, start_loss) for spec in SIGNALS),
    )


def _signal(
    spec: tuple[str, str, Watch],
    steps: Sequence[int],
    losses: Sequence[float],
    sensor: Sensor,
    stopcoef: float,
    start_loss: float | None,
) -> Signal:
    name, generation, watch = spec
    state, lit = start(generation, start_loss), []
    for step, loss in zip(steps, losses, strict=True):
        state, _, ready = observe(state, loss, sensor=sensor, stopcoef=stopcoef, watch=watch)
        if ready:
            lit.append(step)
    return Signal(name, lit[0] if lit else None, len(lit), state.ready)
