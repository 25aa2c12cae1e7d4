"""What one optimizer step costs: CPU time beside torch's fused AdamW, bytes of state, dispatched calls.

    OMP_NUM_THREADS=1 python tests/bench/optimizer_step.py [--rounds N] [--models sd15 sdxl flux] [--report FILE]

The LoRA shapes (rank 16) of SD 1.5 and SDXL (attention) and FLUX.1 (attention and feed-forward) are written out here.
All optimizers step in turn, in random order, on the same parameters and gradients (their signs turned between two
steps), so that each starts with a cold cache as after a backward pass. Process CPU time, not wall time; ratios are
taken within a round. On a CUDA device: events around the step.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emotrain.optim import build_optimizer

RANK = 16
Shape = tuple[int, int]


def lora(linears: list[Shape]) -> list[Shape]:
    """A [rank, in] and B [out, rank] of each linear layer (in, out)."""
    return [shape for width_in, width_out in linears for shape in ((RANK, width_in), (width_out, RANK))]


def unet(blocks: list[tuple[int, int]], context: int) -> list[Shape]:
    """Attention of a UNet: (channels, number of transformer blocks), each with self- and cross-attention."""
    linears: list[Shape] = []
    for channels, count in blocks:
        block = [(channels, channels)] * 4  # self: q, k, v, out
        block += [(channels, channels), (context, channels), (context, channels), (channels, channels)]
        linears += block * count
    return lora(linears)


def flux() -> list[Shape]:
    """FLUX.1: 19 double and 38 single blocks, attention and feed-forward."""
    width = 3072
    double = [(width, width)] * 8 + [(width, 4 * width), (4 * width, width)] * 2
    single = [(width, width)] * 3 + [(width, 4 * width), (5 * width, width)]
    return lora(double * 19 + single * 38)


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "sd15": lambda: unet([(320, 5), (640, 5), (1280, 6)], 768),
    "sdxl": lambda: unet([(640, 10), (1280, 60)], 2048),
    "flux": flux,
}

Build = Callable[[list[torch.nn.Parameter]], Any]
OPTIMIZERS: dict[str, Build] = {
    "AdamW fused (torch)": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "AdamW foreach (torch)": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
    "EmoSens 3.9": lambda p: build_optimizer("emosens", p),
    "EmoCats 3.9": lambda p: build_optimizer("emocats", p),
    "EmoAiry 3.9": lambda p: build_optimizer("emoairy", p),
    "EmoNavi 3.6": lambda p: build_optimizer("emonavi", p),
    "EmoTion 3.9": lambda p: build_optimizer("emotion", p),
    "EmoVoid 3.9": lambda p: build_optimizer("emovoid", p),
    "EmoSens 3.7.0": lambda p: build_optimizer("emosens", p, generation="3.7.0"),
    "Prodigy": lambda p: build_optimizer("prodigy", p, lr=1.0),
    "Schedule-free AdamW": lambda p: build_optimizer("schedulefree", p, lr=1e-4),
}
BASE = "AdamW fused (torch)"


class Count(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def step(optimizer: Any, loss: float) -> None:
    """One step, with the loss where the optimizer takes one."""
    if hasattr(optimizer, "observe"):
        optimizer.observe(loss)
    optimizer.step()


def timed(optimizer: Any, loss: float, device: str) -> float:
    """Milliseconds of one step: CPU time of this process, or device time."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        step(optimizer, loss)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    begin_s = time.process_time()
    step(optimizer, loss)
    return 1e3 * (time.process_time() - begin_s)


def state_bytes(optimizer: Any) -> int:
    """Bytes of the state tensors (counters of one element are left out)."""
    inner = getattr(optimizer, "inner", optimizer)
    tensors = [v for slots in inner.state.values() for v in slots.values() if isinstance(v, Tensor)]
    return sum(v.numel() * v.element_size() for v in tensors if v.numel() > 1)


def parameters(shapes: list[Shape], device: str) -> list[torch.nn.Parameter]:
    """Random parameters with gradients."""
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    return params


def dispatched(build: Build, num_tensors: int, device: str) -> int:
    """Calls that one step dispatches after a warm-up, on small equal tensors."""
    optimizer = build(parameters([(4, 4)] * num_tensors, device))
    for _ in range(3):
        step(optimizer, 0.5)
    with Count() as count:
        step(optimizer, 0.5)
    return count.calls


def measure(shapes: list[Shape], rounds: int, device: str) -> dict[str, tuple[float, ...]]:
    """Per optimizer: median ms, median ratio to fused AdamW and its quartile range, state per parameter byte."""
    params = parameters(shapes, device)
    grads = [param.grad for param in params]
    size = sum(p.numel() * p.element_size() for p in params)
    optimizers = {name: build(params) for name, build in OPTIMIZERS.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_number in range(rounds + 2):
        names = list(optimizers)
        random.shuffle(names)
        for name in names:
            torch._foreach_neg_(grads)
            spent = timed(optimizers[name], 0.5 + 0.1 * random.random(), device)
            if round_number >= 2:
                times[name].append(spent)
    result = {}
    for name, spent in times.items():
        ratios = [x / base for x, base in zip(spent, times[BASE], strict=True)]
        spread = statistics.quantiles(ratios, n=4)
        result[name] = (statistics.median(spent), statistics.median(ratios), spread[2] - spread[0],
                        state_bytes(optimizers[name]) / size)  # fmt: skip
    return result


def passes(rounds: int) -> list[str]:
    """What bounds EmoCats on the CPU: its four kernels one by one, beside fused AdamW, in ns per value.

    In the cache: the same 65,536 values each time. From memory: 200 times as many, each value once a round.
    """
    lines = ["| kernel | in the cache | from memory |", "|---|---|---|"]
    found: dict[str, list[float]] = {}
    for count in (1, 200):
        p, g, m, v, u = ([torch.rand(65_536) for _ in range(count)] for _ in range(5))
        plain = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "is_first_step": False}
        adam = {"amsgrad": False, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        same: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01, "maximize": False}
        late = [torch.full((), 1e12)] * count
        kernels: dict[str, Callable[[], Any]] = {
            "fused AdamW, all of it": lambda: torch._fused_adamw_(p, g, m, v, [], late, **adam, **same),  # noqa: B023
            "u = b1 m + (1-b1) g": lambda: torch._foreach_lerp(m, g, 0.1),  # noqa: B023
            "m = b2 m + (1-b2) g": lambda: torch._foreach_lerp_(m, g, 0.005),  # noqa: B023
            "u = sign(u)": lambda: torch._foreach_sign_(u),  # noqa: B023
            "decay, p -= eta u (fused SGD)": lambda: torch._fused_sgd_(p, u, [], **plain, **same),  # noqa: B023
        }
        for name, kernel in kernels.items():
            times = []
            for _ in range(rounds * 200 // count):
                begin_s = time.process_time()
                kernel()
                times.append(time.process_time() - begin_s)
            found.setdefault(name, []).append(1e9 * statistics.median(times) / (65_536 * count))
    return lines + [f"| {name} | {near:.2f} | {far:.2f} |" for name, (near, far) in found.items()]


def report(models: list[str], rounds: int, device: str) -> str:
    """The whole measurement as Markdown."""
    lines = [f"- torch {torch.__version__}, {torch.get_num_threads()} thread(s), {processor(device)}"]
    lines += [f"- {name} {package(name)}" for name in ("prodigyopt", "schedulefree")]
    lines.append(f"- {rounds} rounds, {'device' if device == 'cuda' else 'process CPU'} time, ratios within a round\n")
    for model in models:
        shapes = MODELS[model]()
        million = sum(a * b for a, b in shapes) / 1e6
        lines.append(f"## {model}: {len(shapes)} tensors, {million:.2f} M parameters\n")
        lines += ["| optimizer | ms | ratio | quartile range | state / parameters |", "|---|---|---|---|---|"]
        for name, (ms, ratio, spread, state) in measure(shapes, rounds, device).items():
            lines.append(f"| {name} | {ms:.1f} | {ratio:.2f} | {spread:.2f} | {state:.2f} |")
        lines.append("")
    if device == "cpu":
        lines += ["## The kernels of EmoCats, ns per value\n", *passes(rounds), ""]
    lines += ["## Calls dispatched per step\n", "| optimizer | 100 tensors | 1000 tensors |", "|---|---|---|"]
    for name, build in OPTIMIZERS.items():
        lines.append(f"| {name} | {dispatched(build, 100, device)} | {dispatched(build, 1000, device)} |")
    return "\n".join(lines) + "\n"


def processor(device: str) -> str:
    """The device's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor()


def package(name: str) -> str:
    """A package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Measure and print, or write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=tuple(OPTIMIZERS), help="beside fused AdamW")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--report", type=Path)
    words = parser.parse_args()
    if words.only:
        for name in set(OPTIMIZERS) - {BASE, *words.only}:
            del OPTIMIZERS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    text = report(words.models, words.rounds, words.device)
    if words.report:
        words.report.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
