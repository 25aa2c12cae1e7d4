"""What of each family's passes a CUDA graph could not hold: waits for the host and copies, counted on pretend CUDA.

    python tests/gpu/pretend_cuda.py run tests/gpu/captures.py

A line of JSON for each model; exit 1 where one that is expected to be recorded asks for the host.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[0] / "families"), str(HERE.parents[0] / "bench"), str(HERE.parents[1])]

import models
import pretend_cuda
import real_size
import torch
from newer_models import pipeline_of
from stages import CUDA, Trainer
from torch import Tensor

from emotrain.batch import send
from emotrain.families.loading import load_family
from emotrain.train.graphs import Graphs, Work

HOST = ("syncs", "h2d", "d2h", "pageable")


class Counting(Graphs):
    """Counts what a pass asks of the host, its inputs being there."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(CUDA, lambda: trainer.adapter.half_gradients, print)
        self.found: list[dict[str, int]] = []

    def run(self, key: Hashable, tensors: Sequence[Tensor], work: Work) -> Tensor:
        """The pass as it is."""
        there = send(tensors, CUDA)
        before = pretend_cuda.counts()
        result = work(there)
        after = pretend_cuda.counts()
        self.found.append({name: after[name] - before[name] for name in HOST})
        return result


def asked(family: Any, size: int, *, checkpointing: bool) -> dict[str, Any]:
    """Of the second pass: the first may fill tables that are kept."""
    trainer = Trainer(family, size, checkpointing=checkpointing)
    counting = Counting(trainer)
    trainer.parts = replace(trainer.parts, graphs=counting)
    for _ in range(2):
        trainer.step()
    return {"checkpointing": checkpointing, "recordable": bool(trainer.adapter.half_gradients), **counting.found[-1]}


def main() -> None:
    """All families, tiny."""
    wrong = False
    for checkpointing in (False, True):
        for variant, size in (("sd15", 64), ("sdxl", 128), ("flux1-dev", 128)):
            family = real_size.build(variant, torch.bfloat16, CUDA, models.change(variant, True))
            row = {"model": variant, **asked(family, size, checkpointing=checkpointing)}
            wrong = wrong or any(row[name] for name in HOST)
            print(json.dumps(row), flush=True)
        for kind in ("zimage", "flux2", "krea2", "qwen"):
            with tempfile.TemporaryDirectory() as work:
                pipeline_of(kind).save_pretrained(work)
                family = load_family(work, dtype="bf16", device="cuda")
                row = {"model": kind, **asked(family, 64, checkpointing=checkpointing)}
            print(json.dumps(row), flush=True)
            wrong = wrong or any(row[name] for name in HOST)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
