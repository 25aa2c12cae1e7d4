"""How often a checkpoint waits for the device: copies from it, counted on pretend CUDA.

python tests/gpu/pretend_cuda.py run tests/gpu/saves.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import pretend_cuda
import torch

from emotrain.families.loading import load_family
from emotrain.lora.adapter import add_adapter
from emotrain.optim.averaged import Averaged
from emotrain.optim.registry import build_optimizer
from emotrain.pulse.stopping import StopRule
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.state import TrainState, capture, restore

MOST = 4  # the LoRA, the optimizer's states, and a few of the driver's own


def main() -> None:
    """One save of a LoRA of many modules, and what it holds."""
    family = load_family("builtin:tiny-flux", dtype="bf16", device="cuda")
    family.place_denoiser()
    adapter = add_adapter(family.denoiser, rank=4, targets="attn-mlp", family="flux", seed=0)
    adapter.use_half_precision(torch.bfloat16)
    optimizer = Averaged(build_optimizer("emosens", adapter.parameters(), lr=None, notify=False))
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.observe(1.0)
    optimizer.step()
    with tempfile.TemporaryDirectory() as work:
        store = CheckpointStore(Path(work))
        before = pretend_cuda.counts()
        tensors, documents = capture(TrainState(step=1), adapter, optimizer, StopRule("off", 1, False), [])
        store.save(1, tensors, documents)
        after = pretend_cuda.counts()
        kept, _ = store.load(1)
        restored = {name: tensor.clone() for name, tensor in adapter.state().items()}
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.zero_()
        restore(kept.tensors, kept.documents, adapter, optimizer, StopRule("off", 1, False))
        assert all(torch.equal(value, restored[name]) for name, value in adapter.state().items())
    copies, tensors_there = after["d2h"] - before["d2h"], sum(len(named) for named in tensors.values())
    print(f"{copies} copies from the device for {tensors_there} tensors of {adapter.num_modules} modules")
    sys.exit(copies > MOST or not tensors_there > 10 * MOST)


if __name__ == "__main__":
    main()
