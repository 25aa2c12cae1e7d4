"""What the emotion remembers between steps, and how that is written down (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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
