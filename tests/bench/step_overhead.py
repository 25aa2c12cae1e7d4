"""What the training loop costs on top of the arithmetic.

A half-width SD 1.5 UNet (160, 320, 640, 640) with random weights at 256 px, latents and embeddings ready, LoRA rank
16 on attention, batch 1: a step of emotrain's loop with all observers against a bare forward, backward and fused
AdamW step.
Both act in turn in one process; CPU time, medians of paired ratios. Peak memory: one process for each.

    python tests/bench/step_overhead.py [--rounds 12] [--report docs/benchmarks/step_overhead.md]
"""

from __future__ import annotations

import argparse
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from emotrain.batch import Batch, Conditioning
from emotrain.diffusion import build_objective
from emotrain.lora.adapter import Adapter, add_adapter
from emotrain.observers.console import ConsoleLines
from emotrain.observers.dashboard import Dashboard, make_console
from emotrain.observers.metrics_log import MetricsLog
from emotrain.observers.tensorboard import TensorBoard
from emotrain.optim import EmoSens
from emotrain.optim.averaged import Averaged
from emotrain.pulse.stopping import StopRule
from emotrain.train.events import RunStart
from emotrain.train.loop import Limits, Parts, tell, train_step
from emotrain.train.losses import LossBaseline
from emotrain.train.state import TrainState

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


class Family:
    """A UNet with random weights behind the Protocol's `predict`."""

    name, device, dtype = "sd15", torch.device("cpu"), torch.float32
    trained_encoders: frozenset[str] = frozenset()

    def __init__(self) -> None:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        self.denoiser = UNet2DConditionModel(
            sample_size=32, block_out_channels=(160, 320, 640, 640), cross_attention_dim=768, attention_head_dim=8
        ).requires_grad_(False)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], conditioning: Any) -> Tensor:
        return self.denoiser(noisy, timesteps, text["prompt_embeds"]).sample

    def num_image_tokens(self, height: int, width: int) -> int:
        return height * width


class Data:
    """One cached picture."""

    batches_per_epoch = 1

    def __init__(self) -> None:
        zeros = torch.zeros(1, 2, dtype=torch.int64)
        self.one = Batch(
            torch.randn(1, 4, 32, 32), {"prompt_embeds": torch.randn(1, 77, 768)},
            Conditioning(zeros, zeros, zeros), torch.ones(1), None, ("picture",), 0,
        )  # fmt: skip

    def batch(self, micro_step: int) -> Batch:
        return self.one


def build() -> tuple[Family, Adapter, Data]:
    family = Family()
    adapter = add_adapter(family.denoiser, rank=16, targets="attn", family="sd15", seed=1)
    return family, adapter, Data()


class Bare:
    """Forward, backward, fused AdamW."""

    def __init__(self, family: Family, adapter: Adapter, data: Data) -> None:
        self.family, self.adapter, self.data = family, adapter, data
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        batch = self.data.one
        noise = torch.randn(batch.latents.shape)
        prediction = self.family.predict(batch.latents + noise, torch.tensor([500.0]), batch.text, None)
        (prediction - noise).pow(2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours:
    """A step of the loop with every observer that a run has."""

    def __init__(self, family: Family, adapter: Adapter, data: Data, folder: Path) -> None:
        console = make_console(io.StringIO(), {})
        dashboard = Dashboard(console, capture_stderr=False)
        self.observers: list[Any] = [dashboard, ConsoleLines(10, stream=io.StringIO()), MetricsLog(folder)]
        self.observers.append(TensorBoard(folder / "tensorboard"))
        self.state, self.limits = TrainState(), Limits(10**6, 1, 1.0, 1, 10**6, 10**6, 0)
        self.parts = Parts(
            family=family, objective=build_objective("epsilon", SCHEDULER), adapter=adapter,
            optimizer=Averaged(EmoSens(adapter.parameters(), bias_correction=True)),
            data=data, stop_rule=StopRule(), loss_baseline=LossBaseline(), validation=None,
            notify=self.notify, save=lambda state: None, sample=lambda step: None,
            interrupted=lambda: False,
        )  # fmt: skip
        self.notify(RunStart("bench", folder, 0, 10**6, 1, "emosens", 1, adapter.num_modules, 1, "cpu"))

    def notify(self, event: Any) -> None:
        for observer in self.observers:
            observer.handle(event)

    def step(self) -> None:
        started = time.monotonic()
        done = train_step(self.parts, self.limits, self.state)
        assert done is not None
        loss, observed_loss, grad_norm, samples = done
        tell(self.parts, self.limits, self.state, loss, observed_loss, grad_norm, time.monotonic() - started, samples)

    def close(self) -> None:
        for observer in self.observers:
            observer.close()


def peak(kind: str) -> float:
    """Peak memory in MiB of a process that makes 3 steps of one kind."""
    command = [sys.executable, __file__, "--only", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def only(kind: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        parts = build()
        loop = Bare(*parts) if kind == "bare" else Ours(*parts, Path(work))
        for _ in range(3):
            loop.step()
        if isinstance(loop, Ours):
            loop.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=["bare", "ours"])
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        only(args.only)
        return
    with tempfile.TemporaryDirectory() as work:
        parts = build()
        loops: dict[str, Any] = {"bare": Bare(*parts), "ours": Ours(*parts, Path(work))}
        times: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(args.rounds + 2):
            order = list(loops) if turn % 2 else list(loops)[::-1]
            for name in order:
                started = time.process_time()
                loops[name].step()
                if turn >= 2:
                    times[name].append(time.process_time() - started)
        loops["ours"].close()
    ratios = sorted(ours / bare for ours, bare in zip(times["ours"], times["bare"], strict=True))
    memory = {name: peak(name) for name in loops}
    lines = [
        f"CPU time of a step, {args.rounds} paired rounds: bare {median(times['bare']) * 1000:.0f} ms,"
        f" emotrain {median(times['ours']) * 1000:.0f} ms; ratio median {median(ratios):.3f}"
        f" (quartiles {ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f})",
        f"peak memory: bare {memory['bare']:.0f} MiB, emotrain {memory['ours']:.0f} MiB;"
        f" ratio {memory['ours'] / memory['bare']:.3f}",
    ]
    print("\n".join(lines))
    if args.report:
        head = "# Overhead of a step\n\n`python tests/bench/step_overhead.py`\n\n"
        args.report.write_text(head + "\n\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
