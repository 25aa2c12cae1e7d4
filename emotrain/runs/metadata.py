"""What a LoRA file says about the run that made it: no path, no user name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emotrain.train.loop import Outcome

if TYPE_CHECKING:
    from emotrain.runs.start import Session


def lora_metadata(session: Session, step: int, outcome: Outcome) -> dict[str, str]:
    """Header strings of the file that holds the weights of `step`."""
    return {"emotrain.step": str(step), "emotrain.stop_reason": str(outcome.reason)}
