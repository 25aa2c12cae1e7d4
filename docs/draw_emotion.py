"""Draws the figures of docs/concepts/emotion.md and measures its table.

python docs/draw_emotion.py figures | table
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from pathlib import Path

from emotrain.pulse.draw import Panel, svg
from emotrain.pulse.replay import replay
from emotrain.pulse.signal import emo_drive, observe, start

DOCS = Path(__file__).parent
FIGURES = DOCS / "concepts" / "emotion"
PUBLISHED = DOCS.parent / "tests" / "golden" / "published_sdxl_loss.json"
NOISES = [step / 40 for step in range(33)]  # standard deviation of the loss, relative to its mean
SEEDS = 8


def drive() -> str:
    """The emoDrive curve of 3.6 and 3.7.0."""
    scalars = [index / 500 for index in range(-499, 500)]
    points = [(s, emo_drive(s, math.copysign(1 - abs(s), s))) for s in scalars]
    return svg([Panel("emoDrive (3.6, 3.7.0)", [("", points)], x_label="scalar")])


def published_run() -> str:
    """Loss, scalar and pulse of 3.9 over the published SDXL run."""
    rows = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    steps, losses = [row[0] for row in rows], [row[1] for row in rows]
    felt = replay(steps, losses)
    mark = [(float(s.first), "READY TO STOP") for s in felt.signals if s.first is not None]
    curves = {word: [(s, getattr(r, word)) for s, r in zip(steps, felt.readings, strict=True)]
              for word in ("scalar", "pulse", "d_est", "noise_est", "medium")}  # fmt: skip
    loss = list(zip(steps, losses, strict=True))
    return svg([
        Panel("loss, and its medium average", [("loss", loss), ("medium", curves["medium"])], marks=mark),
        Panel("scalar", [("", curves["scalar"])]),
        Panel("d and noise: ready when d - noise >= 0.3", [("d", curves["d_est"]), ("noise", curves["noise_est"])]),
        Panel("emoPulse", [("", curves["pulse"])], log=True),
    ])  # fmt: skip


def mean_pulse(noise: float, falling: bool, seed: int) -> float:
    """Mean pulse of steps 101 to 600 on a loss of 0.5, flat or halving every 200 steps, with log-normal noise."""
    generator = random.Random(seed)
    sigma = math.sqrt(math.log1p(noise * noise))
    state, pulses = start("3.9"), []
    for step in range(600):
        level = 0.5 * (0.5 ** (step / 200) if falling else 1.0)
        state, reading, _ = observe(state, level * math.exp(generator.gauss(0, sigma) - sigma * sigma / 2))
        pulses.append(reading.pulse)
    return statistics.mean(pulses[100:])


def noise() -> str:
    """Mean pulse against the noise of the loss."""
    curves = [
        (name, [(x, statistics.mean(mean_pulse(x, falling, seed) for seed in range(SEEDS))) for x in NOISES])
        for name, falling in (("flat loss", False), ("falling loss", True))
    ]
    title = f"mean emoPulse of 3.9 over 500 steps ({SEEDS} runs each)"
    return svg([Panel(title, curves, log=True, x_label="noise of the loss: standard deviation / mean")])


def table() -> str:
    """EmoSens, EmoAiry, EmoCats beside AdamW on one task: loss, state, cosine between the ways they went."""
    import torch

    from emotrain.optim import build_optimizer

    def train(name: str, lr: float | None, seed: int) -> tuple[float, float, torch.Tensor]:
        torch.manual_seed(seed)
        teacher = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
        student = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
        before = torch.nn.utils.parameters_to_vector(student.parameters()).detach()
        optimizer = build_optimizer(name, list(student.parameters()), lr=lr, **({} if lr else {"notify": False}))
        data = torch.Generator().manual_seed(seed)
        for _ in range(1500):
            inputs = torch.randn(16, 16, generator=data)
            loss = torch.nn.functional.mse_loss(student(inputs), teacher(inputs).detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.observe(loss)
            optimizer.step()
        inputs = torch.randn(4096, 16, generator=data)
        with torch.no_grad():
            end = torch.nn.functional.mse_loss(student(inputs), teacher(inputs)).item()
        held = optimizer.state_dict()["state"].values()
        size = sum(v.numel() for slots in held for v in slots.values() if v.numel() > 1) / before.numel()
        return end, size, torch.nn.utils.parameters_to_vector(student.parameters()).detach() - before

    kinds = {"EmoSens": None, "EmoAiry": None, "EmoCats": None, "AdamW 1e-3": 1e-3, "AdamW 1e-4": 1e-4}
    runs = {name: [train(name.split()[0].lower(), lr, seed) for seed in range(5)] for name, lr in kinds.items()}
    lines = ["| | loss at the end (5 seeds: median, range) | state / parameters | cosine to Sens | to Airy | to Cats |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, results in runs.items():
        ends = [end for end, _, _ in results]
        cosines = [
            statistics.median(
                torch.nn.functional.cosine_similarity(mine[2], theirs[2], dim=0).item()
                for mine, theirs in zip(results, runs[other], strict=True)
            )
            for other in ("EmoSens", "EmoAiry", "EmoCats")
        ]
        words = " | ".join(f"{cosine:.2f}" for cosine in cosines)
        spread = f"{statistics.median(ends):.4f} ({min(ends):.4f} to {max(ends):.4f})"
        lines.append(f"| {name} | {spread} | {results[0][1]:.0f} | {words} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table())
    else:
        FIGURES.mkdir(exist_ok=True)
        for figure in (drive, published_run, noise):
            (FIGURES / f"{figure.__name__}.svg").write_text(figure(), encoding="utf-8")
