"""Does LR 1.0 carry over to real widths? A teacher and a student LoRA at widths from 128 to 1,536, no pretraining.

    python tests/bench/width.py [--widths 128 384 768 1536] [--steps 300] [--seeds 2] [--report docs/benchmarks]

A frozen block (norm, linear, GELU, linear, residual; weights of variance 1/width) has a teacher: the same block plus
LoRAs of rank 8. The student starts from the block alone with an own LoRA of rank 8 (alpha 8) and hears the mean squared
error to the teacher's output plus noise, as a diffusion loss has a part that cannot be learned, whose size is drawn
anew each step (log-normal, `--spread`), as timesteps change it: that sets how noisy a loss the emotion hears. Printed
is the share of the teacher that is learned after `--steps` steps: 1 - error / error of the block alone, without the
noise. The coordinate check (Yang et al. 2022, Tensor Programs V, arXiv:2203.03466, appendix D.1) is the root mean
square of the change of the block's output after 10 steps, over that of the teacher's change: it should not depend on
the width.

Shape letters: B rows, D width.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from emotrain.optim.registry import build_optimizer

RANK, ROWS, NOISE = 8, 64, 1.0
WAYS: list[tuple[str, float | None]] = [
    ("emosens", None),
    ("emoairy", None),
    ("emocats", None),
    *[("adamw", lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)],
    ("prodigy", 1.0),
]


class Block(nn.Module):
    """Frozen weights and a LoRA on both of its linears; rows [B, D] -> [B, D]."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = [torch.randn(width, width, generator=generator) / math.sqrt(width) for _ in range(2)]
        bound = 1 / math.sqrt(width)  # kaiming uniform with a = sqrt(5), as LoRA layers are begun
        self.down = nn.ParameterList(
            nn.Parameter((torch.rand(RANK, width, generator=generator) * 2 - 1) * bound) for _ in range(2)
        )
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(width, RANK)) for _ in range(2))

    def forward(self, rows: Tensor) -> Tensor:
        hidden = nn.functional.rms_norm(rows, rows.shape[-1:])
        for place, base in enumerate(self.base):
            hidden = hidden @ base.T + hidden @ self.down[place].T @ self.up[place].T
            hidden = nn.functional.gelu(hidden) if place == 0 else hidden
        return rows + hidden


def teacher_of(student: Block, width: int, generator: torch.Generator) -> Block:
    """The student's block with LoRAs that change its output by about a third of its own size."""
    teacher = Block(width, generator)
    teacher.base = student.base
    for up in teacher.up:
        up.data = torch.randn(width, RANK, generator=generator) * 0.3 * math.sqrt(3 / RANK)
    return teacher


def learn(name: str, lr: float | None, width: int, steps: int, seed: int, spread: float) -> tuple[float, float, float]:
    """(share learned, coordinate check, mean step length) of one optimizer at one width."""
    generator = torch.Generator().manual_seed(seed)
    student = Block(width, generator)
    teacher = teacher_of(student, width, generator)
    test = torch.randn(256, width, generator=generator)
    with torch.no_grad():
        wanted, before = teacher(test), student(test)
    optimizer = build_optimizer(name, list(student.parameters()), lr=lr)
    scale = float((wanted - before).pow(2).mean())  # the loss of the block alone is 1 + NOISE
    lengths, moved = [], 0.0
    for step in range(steps):
        rows = torch.randn(ROWS, width, generator=generator)
        with torch.no_grad():
            target = teacher(rows)
            size = NOISE * math.exp(spread * float(torch.randn((), generator=generator)))
            target += torch.randn(target.shape, generator=generator) * math.sqrt(scale * size)
        loss = (student(rows) - target).pow(2).mean() / scale
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.observe(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        lengths.append(optimizer.reading.pulse if lr is None and optimizer.reading else lr or 0.0)
        if step == 9:
            with torch.no_grad(), optimizer.eval_mode():
                moved = math.sqrt(float((student(test) - before).pow(2).mean()) / scale)
    with torch.no_grad(), optimizer.eval_mode():
        error = float((student(test) - wanted).pow(2).mean())
    return 1 - error / scale, moved, sum(lengths) / len(lengths)


def table(widths: list[int], steps: int, seeds: int, spread: float) -> list[str]:
    """One row per optimizer, one column per width."""
    heads = [f"learned, width {width}" for width in widths] + [f"moved at 10, {width}" for width in widths]
    lines = ["| optimizer, LR | " + " | ".join(heads) + " | mean step lengths |", "|" + " --- |" * (len(heads) + 2)]
    for name, lr in WAYS:
        learned, moved, lengths = [], [], []
        for width in widths:
            tries = [learn(name, lr, width, steps, seed, spread) for seed in range(seeds)]
            means = [sum(values) / seeds for values in zip(*tries, strict=True)]
            learned.append(f"{means[0]:.1%}")
            moved.append(f"{means[1]:.2f}")
            lengths.append(f"{means[2]:.1e}")
        own = " ".join(lengths) if lr is None else "-"
        lines.append(f"| {name} {lr or 1.0:g} | " + " | ".join([*learned, *moved]) + f" | {own} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 384, 768, 1536])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--spread", type=float, nargs="+", default=[0.5, 0.0], help="0: the loss has hardly any noise")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for spread in args.spread:
        lines += ["", f"## Spread {spread:g}", "", *table(args.widths, args.steps, args.seeds, spread)]
    if args.report:
        head = [
            "# LR 1.0 at real widths",
            "",
            "`python tests/bench/width.py`",
            "",
            *(__doc__ or "").splitlines()[4:],
            "",
        ]
        (args.report / "width.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
