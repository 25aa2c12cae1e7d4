"""From a reading to the step length of each parameter group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from emotrain.optim.batches import Length
from emotrain.pulse.reading import Reading
from emotrain.pulse.signal import pulse_at, tensor_pulses
from emotrain.pulse.state import EmotionState


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
