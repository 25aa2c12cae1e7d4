"""Launches, blocking reads and memory of one training step at real size, counted without a GPU.

    python tests/bench/launches.py sdxl [--size 1024] [--checkpointing] [--rank 16] [--preset NAME]

The model has its public config and fake tensors on a pretend CUDA device (`tests/gpu/pretend_cuda.py build` once), and
goes through the loop's own `train_step`. A launch is an operator that computes on the device and is no view. Fused
attention and RMS norms are counted as CUDA has them. What CUDA's kernels take in time is not known here.
Prints one line of JSON: launches by phase, casts, blocking reads, copies to the device, GiB resident and at the peak;
with a preset of that model what `emotrain plan` says of the same step, without what CUDA takes for itself.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "gpu")]
import pretend_cuda

pretend_cuda.install()

import real_size
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from emotrain.families.blocks import checkpoint_blocks
from emotrain.lora.adapter import add_adapter
from emotrain.optim.averaged import Averaged
from emotrain.optim.registry import build_optimizer
from emotrain.train import loop
from emotrain.train.loop import Limits, train_step
from emotrain.train.state import TrainState

GIB = 2**30
FREE = ("aten.empty", "aten.detach", "aten.new_empty", "prim", "aten._has", "aten.sym", "aten._unsafe_view", "aten.is_")
NUMBER = 0.37  # what a blocking read of a fake tensor gives


class Meter(TorchDispatchMode):
    """Counts what goes to the device, phase by phase, and the storages that live on it."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.seen = 0, dict[int, int]()
        self.clear()

    def clear(self) -> None:
        """Begin to count."""
        self.launches, self.reads, self.copies = collections.Counter[str](), collections.Counter[str](), 0
        self.casts, self.peak, self.phase = 0, self.live, "prepare"

    def read(self, kind: str) -> None:
        """The host waits for the device."""
        self.reads[f"{self.phase}: {kind}"] += 1

    def _track(self, tensor: Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, (storage.nbytes() + 511) // 512 * 512
        if key in self.seen:
            return
        self.seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.seen.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)]
        from_device = any(t.device.type == "cuda" for t in given)
        if func is torch.ops.aten._local_scalar_dense.default:
            if from_device:
                self.read("item")
            return NUMBER if given[0].is_floating_point() else 3
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        to_device = any(t.device.type == "cuda" for t in made)
        for tensor in made:
            self._track(tensor)
        name = str(func)
        if name.startswith(("aten._to_copy", "aten.copy_")):
            source = (given[1] if name.startswith("aten.copy_") and len(given) > 1 else given[0]).device.type
            if to_device and source == "cpu":
                self.copies += 1
            elif source == "cuda" and not to_device:
                self.read("copy")
            elif made and given[0].dtype != made[0].dtype:
                self.casts += 1
        if from_device or to_device:
            view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            if not view and not name.startswith(FREE):
                self.launches[self.phase] += 1
        return out


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The fused kernel that CUDA would take."""
    if query.dtype in (torch.bfloat16, torch.float16) and attn_mask is None and query.shape[-1] <= 256:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    grad = query.requires_grad or key.requires_grad
    return efficient(query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]


class RmsNorm(torch.autograd.Function):
    """The fused kernel: one launch forward, one backward (weights are frozen)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        return torch.relu(x)  # one launch of the right shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.relu(grad), None


def rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
    """In place of F.rms_norm, which takes itself apart where there is no CUDA."""
    return RmsNorm.apply(input, weight)  # type: ignore[no-untyped-call]


def install_fakes(meter: Meter) -> None:
    """Everything that fake tensors cannot do by themselves."""
    torch.cuda.is_available = lambda: True
    F.scaled_dot_product_attention = attention
    F.rms_norm = rms_norm
    real = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return real(self)
        if self.device.type == "cuda":
            meter.read("tolist")

        def filled(shape: list[int]) -> Any:
            return [filled(shape[1:]) for _ in range(shape[0])] if shape else NUMBER

        return filled(list(self.shape))

    def apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for key, parameter in self._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    moved = fn(parameter)
                wanted = parameter.requires_grad and moved.is_floating_point()
                self._parameters[key] = torch.nn.Parameter(moved.detach(), requires_grad=wanted)
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer)
        return self

    Tensor.tolist = tolist  # type: ignore[method-assign]
    torch.nn.Module._apply = apply


def phases(meter: Meter, optimizer: Averaged) -> None:
    """Name what is going on for the meter."""

    def before(owner: Any, name: str, phase: str, after: str | None = None) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            meter.phase = phase
            result = real(*args, **kwargs)
            meter.phase = after or meter.phase
            return result

        setattr(owner, name, call)

    before(loop, "losses_there", "forward", "backward")
    before(loop, "clip", "clip")
    before(optimizer, "observe", "optimizer")
    before(optimizer.inner, "step", "optimizer", "average")


def count(args: argparse.Namespace) -> dict[str, Any]:
    """One step of a real-size model; the second, when everything is allocated."""
    meter = Meter()
    install_fakes(meter)
    with FakeTensorMode(allow_non_fake_inputs=True), meter:
        device = torch.device("cuda")
        family = real_size.build(args.model, torch.bfloat16, device)
        family._identities = {"vae": "", "text": ""}
        family.free_encoders()
        adapter = add_adapter(
            family.denoiser, rank=args.rank, alpha=args.rank, targets="attn-mlp", family=family.name, seed=0
        )
        adapter.use_half_precision(torch.bfloat16)
        if args.checkpointing:
            checkpoint_blocks(family.denoiser)
        optimizer = Averaged(build_optimizer("emosens", adapter.parameters(), lr=None, notify=False))
        parts = real_size.loop_parts(family, adapter, optimizer, args.size)
        phases(meter, optimizer)
        state = TrainState()
        for _ in range(2):
            meter.clear()
            resident = meter.live
            train_step(parts, Limits(100, args.accumulation, 1.0, 0, 10, 10, 0), state)
        return {
            "model": args.model, "size": args.size, "checkpointing": args.checkpointing,
            "launches": meter.launches["forward"] + meter.launches["backward"], "by_phase": dict(meter.launches),
            "casts": meter.casts, "reads": dict(meter.reads), "copies_to_device": meter.copies,
            "resident_gib": round(resident / GIB, 2), "peak_gib": round(meter.peak / GIB, 2),
        }  # fmt: skip


def planned(args: argparse.Namespace, peak: float) -> dict[str, Any]:
    """What `emotrain plan` says of the step, and the peak as a share of it."""
    sets = {
        "network.targets": "attn-mlp", "network.rank": args.rank, "model.quantize": "none",
        "dataset": "builtin:example", "dataset.resolution": args.size, "dataset.buckets.upscale": "true",
        "train.gradient_checkpointing": str(args.checkpointing).lower(),
    }  # fmt: skip
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "emotrain", "plan", args.preset, "--json", *words]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]).stdout
    gib = sum(value for name, value in json.loads(said)["memory_gib"].items() if name != "CUDA itself")
    return {"planned_gib": round(gib, 2), "of_plan": round(peak / gib, 2)}


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--preset")
    args = parser.parse_args()
    found = count(args)
    if args.preset:
        found |= planned(args, found["peak_gib"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
