"""What an emo optimizer reads from the losses at one step: plain floats (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


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
