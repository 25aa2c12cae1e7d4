"""Everything that changes while the loop runs and is not a tensor of the adapter, the optimizer or a random generator.

A new variable of the loop belongs here, or a resumed run would not equal an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from emotrain.train.guard import Guard


@dataclass
class TrainState:
    """Counters and memories of one run, over all its resumes.

    `micro_step` names the next micro-batch: with the seed it fixes pictures, captions, noise and timesteps, so that no
    position of a sampler has to be saved.
    """

    step: int = 0  # optimizer steps done
    micro_step: int = 0  # micro-batches used, the skipped ones too
    samples_seen: int = 0
    guard: Guard = Guard()  # steps left out because of non-finite numbers
    resumes: int = 0
    train_s: float = 0.0  # seconds of pure training
    best_step: int | None = None
    best_loss: float | None = None
    best_adapter: dict[str, Tensor] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """Plain numbers, for JSON; the best adapter is saved as tensors beside it."""
        document = asdict(self)
        del document["best_adapter"]
        return document

    @classmethod
    def from_document(cls, document: dict[str, Any], best_adapter: dict[str, Tensor]) -> TrainState:
        """Inverse of `to_document`."""
        fields = {**document, "guard": Guard.from_dict(document["guard"])}
        return cls(**fields, best_adapter=best_adapter)
