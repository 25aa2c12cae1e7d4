"""Does LR 1.0 carry over to real widths? A teacher and a student LoRA at widths up to 1,536, no pretraining.

    python tests/bench/width.py [--widths 128 512 1536] [--depths 1 8] [--steps 200] [--report docs/benchmarks]

A frozen stack of residual blocks (norm, linear, GELU, linear; weights of variance 1/width, branches scaled by
1/sqrt(depth)) has a teacher: the same stack plus LoRAs of rank 8 on every linear. The student starts from the stack
alone with its own LoRA of rank 8 (alpha 8) and hears the mean squared error to the teacher's output plus noise.

As in fine-tuning, the teacher is near (its LoRAs change the output by a few percent of its size) and most of the loss
cannot be learned: the noise is ten times what the teacher changes. Its size is drawn anew each step (log-normal,
`--spread`), as timesteps change it: that sets how noisy a loss the optimizer uses. Rows have what activations have, a
direction in common (half of their square) and a spectrum that falls as 1/index. "gain auto" begins at three times the
step length and lowers it as a run does, by the loss on other rows with fixed noise every 10 steps; these have 65,536
values together, as one SDXL picture has.

Printed is the share of the teacher that is learned, without the noise: 1 - error / error of the stack alone, the best
of every 50 steps, which is what a stop rule would find. The coordinate check (Yang et al. 2022, Tensor Programs V,
arXiv:2203.03466, appendix D.1) is the root mean square of the change of the output after 10 steps, over that of the
teacher's change: it should not depend on the width. Two numbers in a cell are two seeds; widths from 1,024 on have one.

Shape letters: B rows, D width.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from emotrain.optim.protocol import OptimizerLike
from emotrain.optim.registry import build_optimizer
from emotrain.pulse.gain import FACTOR, START, Gain

RANK, ROWS, TEST_ROWS = 8, 32, 128
TEACHER, NOISE, COMMON = 0.03, 10.0, 0.7
EVERY, CHECKED = 50, 10
VALIDATED, VALIDATION_VALUES = 10, 65_536
WIDE = 1024  # from this width on one seed must do
WAYS: list[tuple[str, str, dict[str, object]]] = [
    ("emosens 1", "emosens", {"bias_correction": True}),
    ("emosens 1, gain auto", "emosens", {"bias_correction": True, "lr": START}),
    ("emosens 1, as published", "emosens", {}),
    ("emoairy 1", "emoairy", {}),
    ("emocats 1", "emocats", {}),
    *[(f"adamw {lr:g}", "adamw", {"lr": lr}) for lr in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)],
    ("prodigy 1", "prodigy", {"lr": 1.0}),
]


class Block(nn.Module):
    """Frozen weights and a LoRA on both of its linears; rows [B, D] -> the residual [B, D]."""

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
        return hidden


class Stack(nn.Module):
    """`depth` blocks; rows [B, D] -> [B, D]."""

    def __init__(self, width: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, generator) for _ in range(depth))

    def forward(self, rows: Tensor) -> Tensor:
        for block in self.blocks:
            rows = rows + block(rows) / math.sqrt(len(self.blocks))
        return rows


def teacher_of(student: Stack, width: int, generator: torch.Generator) -> Stack:
    """The student's stack with LoRAs of its own."""
    teacher = Stack(width, len(student.blocks), generator)
    for own, other in zip(teacher.blocks, student.blocks, strict=True):
        own.base = other.base
        for up in own.up:
            up.data = torch.randn(width, RANK, generator=generator) * TEACHER * math.sqrt(3 / RANK)
    return teacher


class Rows:
    """Draws rows [B, D] of root mean square about 1."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        self.generator = generator
        sizes = (torch.arange(width) + 1.0) ** -0.5
        self.sizes = (sizes / sizes.pow(2).mean().sqrt())[torch.randperm(width, generator=generator)]
        self.common = torch.randn(width, generator=generator)

    def draw(self, count: int) -> Tensor:
        own = torch.randn(count, len(self.sizes), generator=self.generator) * self.sizes
        return math.sqrt(1 - COMMON**2) * own + COMMON * self.common


class Measured:
    """Lowers the gain of a run as the validation says."""

    def __init__(self, student: Stack, teacher: Stack, rows: Tensor, scale: float) -> None:
        self.student, self.rows, self.gain = student, rows, Gain()
        with torch.no_grad():
            target = teacher(rows)
            noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(5))
            self.target = target + noise * math.sqrt(scale * NOISE)
            self.base = self.lowest = float((student(rows) - self.target).pow(2).mean())
        self.best = [p.detach().clone() for p in student.parameters()]

    @torch.no_grad()
    def validate(self, step: int, optimizer: OptimizerLike) -> None:
        """After a step; puts the best weights back where the gain is lowered."""
        loss = float((self.student(self.rows) - self.target).pow(2).mean())
        is_best = loss < self.lowest
        if is_best:
            self.lowest, self.best = loss, [p.detach().clone() for p in self.student.parameters()]
        if self.gain.update_validation(step, is_best=is_best, best_loss=self.lowest, base_loss=self.base):
            for parameter, best in zip(self.student.parameters(), self.best, strict=True):
                parameter.copy_(best)
            optimizer.restart(1.0 / FACTOR)


def learn(
    name: str, words: dict[str, object], width: int, depth: int, steps: int, seed: int, spread: float
) -> tuple[float, float, float]:
    """(share learned, coordinate check, mean step length) of one optimizer at one width."""
    generator = torch.Generator().manual_seed(seed)
    student = Stack(width, depth, generator)
    teacher = teacher_of(student, width, generator)
    rows = Rows(width, generator)
    test = rows.draw(TEST_ROWS)
    with torch.no_grad():
        wanted, before = teacher(test), student(test)
    optimizer = build_optimizer(name, list(student.parameters()), **words)
    scale = float((wanted - before).pow(2).mean())  # the loss of the stack alone is 1 + NOISE
    measured = None
    if words.get("lr") == START:
        others = Rows(width, torch.Generator().manual_seed(seed + 1000))
        others.sizes, others.common = rows.sizes, rows.common
        measured = Measured(student, teacher, others.draw(VALIDATION_VALUES // width), scale)
    lengths, moved, learned = [], 0.0, 0.0
    for step in range(1, steps + 1):
        batch = rows.draw(ROWS)
        with torch.no_grad():
            target = teacher(batch)
            size = NOISE * math.exp(spread * float(torch.randn((), generator=generator)))
            target += torch.randn(target.shape, generator=generator) * math.sqrt(scale * size)
        loss = (student(batch) - target).pow(2).mean() / scale
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        reading = optimizer.observe(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        lengths.append(reading.pulse)
        if measured is not None and step % VALIDATED == 0:
            measured.validate(step, optimizer)
        if step == CHECKED or step % EVERY == 0:
            with torch.no_grad(), optimizer.eval_mode():
                now = student(test)
            moved = math.sqrt(float((now - before).pow(2).mean()) / scale) if step == CHECKED else moved
            learned = max(learned, 1 - float((now - wanted).pow(2).mean()) / scale) if step % EVERY == 0 else learned
    return learned, moved, sum(lengths) / len(lengths)


def table(widths: list[int], depth: int, steps: int, seeds: int, spread: float, ways: list[str]) -> list[str]:
    """One row per optimizer, one column per width."""
    heads = [f"learned, width {width}" for width in widths] + [f"moved at 10, {width}" for width in widths]
    lines = ["| optimizer, LR | " + " | ".join(heads) + " | mean step lengths |", "|" + " --- |" * (len(heads) + 2)]
    for label, name, words in (way for way in WAYS if not ways or way[0] in ways):
        learned, moved, lengths = [], [], []
        for width in widths:
            tries = [
                learn(name, words, width, depth, steps, seed, spread) for seed in range(seeds if width < WIDE else 1)
            ]
            means = [sum(values) / len(tries) for values in zip(*tries, strict=True)]
            learned.append(" ".join(f"{one[0]:.0%}" for one in tries))
            moved.append(f"{means[1]:.2f}")
            lengths.append(f"{means[2]:.1e}")
        said = " ".join(lengths) if name.startswith("emo") else "-"
        lines.append(f"| {label} | " + " | ".join([*learned, *moved]) + f" | {said} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512, 1536])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--spread", type=float, nargs="+", default=[0.5, 0.1], help="0.1: the loss has little noise")
    parser.add_argument("--ways", nargs="+", default=[], help="some of the rows")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for depth in args.depths:
        for spread in args.spread:
            title = f"Depth {depth}, spread {spread:g}"
            print(title)
            lines += ["", f"## {title}", "", *table(args.widths, depth, args.steps, args.seeds, spread, args.ways)]
    if args.report:
        about = (__doc__ or "").split("\n\n", 2)[2].splitlines()
        head = ["# LR 1.0 at real widths", "", "`python tests/bench/width.py`", "", *about]
        (args.report / "width.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
