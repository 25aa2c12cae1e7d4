"""Run folders as runs leave them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from emotrain.config.load import load_preset
from emotrain.runs.folder import RunFolder, create_run

STEPS = [
    {"step": step, "loss": 1.0 / step, "scalar": 0.1, "trust": 0.9, "pulse": 1e-4, "step_s": 0.5}
    for step in range(1, 31)
]
VALIDATIONS = [
    {"step": step, "loss": 0.8 - step / 100, "base_loss": 0.8, "best_step": step, "best_loss": 0.8 - step / 100}
    for step in (0, 10, 20)
]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(runs_dir: Path, name: str = "mika", **info: Any) -> RunFolder:
    """A run's folder as a run of 30 steps leaves it; `info` goes into run.json."""
    preset = load_preset("quickstart", ("dataset.trigger=mika_ch",), name)
    folder = create_run(
        runs_dir,
        name,
        preset.to_dict(),
        seed=42,
        device="cpu",
        base_sha256="b" * 64,
        held_out=["a"],
        extends="quickstart",
    )
    ended = {
        "stop_reason": "signal",
        "stop_sentence": "it got no better",
        "steps": 30,
        "best_step": 20,
        "best_loss": 0.6,
    }
    folder.update_info(**{**ended, "base_loss": 0.8, **info})
    folder.metrics_path.write_text(lines(STEPS))
    (folder.path / "validation.jsonl").write_text(lines(VALIDATIONS))
    losses = [
        {"step": step, "samples": [[f"example/{word}.png", 0.5, 0.1 + k]]}
        for step in range(1, 31)
        for k, word in enumerate(("camera", "rose"))
    ]
    (folder.path / "picture_losses.jsonl").write_text(lines(losses))
    folder.samples_dir.mkdir()
    for step in (0, 20):
        draw(folder.samples_dir / f"step-{step:08d}-1.png", step)
    draw(folder.samples_dir / "lora-1.png", 20)
    return folder


def draw(path: Path, step: int, prompt: str = "mika_ch, rocket", seed: int = 7_000_000_001) -> None:
    info = PngInfo()
    said = {"prompt": prompt, "negative": "", "seed": seed, "steps": 20, "width": 64, "height": 64}
    info.add_itxt("emotrain", json.dumps(said))
    Image.new("RGB", (64, 64), (step, 90, 90)).save(path, pnginfo=info)
