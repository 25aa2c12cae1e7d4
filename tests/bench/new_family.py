"""Does a newer family learn? A small Z-Image with random weights overfits four pictures, through the command line.

    python tests/bench/new_family.py [--steps 300] [--seeds 1] [--work DIR] [--report docs/benchmarks]

The denoiser (128 wide, 4 blocks and 2 refiners) and the text encoder (Qwen3 of 32 channels) are random; the VAE is the
built-in models', so that a latent is a picture. Nothing pretrained helps: all that is learned is in the LoRA (rank 64,
every layer). `emotrain run` trains it on four of the built-in pictures, each with its name for a caption, and draws
these names. Distances are root mean squares over the pixels, in 0..1, to the pictures as the VAE shows them. A model
that had learned one mean picture for all captions would be as near to the others as to its own. The validation is that
of flipped training pictures, since none are held out, so that it does not show
overfitting.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "families"))

from newer_models import qwen, qwen_tokenizer  # noqa: E402

from emotrain.cli.app import main as emotrain  # noqa: E402
from emotrain.families import load_family  # noqa: E402
from emotrain.families.table import ASSETS  # noqa: E402

PICTURES = ("balloon", "camera", "rose", "watermelon")


def model(folder: Path, seed: int) -> Path:
    """A small random Z-Image around the built-in VAE."""
    import diffusers

    torch.manual_seed(seed)
    denoiser = diffusers.ZImageTransformer2DModel(
        in_channels=8, dim=128, n_layers=4, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32,
        axes_dims=[8, 12, 12], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    for parameter in denoiser.parameters():
        if float(parameter.detach().abs().max()) == 0.0:
            torch.nn.init.normal_(parameter, std=0.05)
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL.from_pretrained(ASSETS / "tiny-flux" / "vae"),
        text_encoder=qwen(32),
        tokenizer=qwen_tokenizer(),
        transformer=denoiser,
    ).save_pretrained(folder)
    return folder


def train(work: Path, steps: int, seed: int) -> Path:
    """One run; its folder."""
    pictures = work / "pictures"
    pictures.mkdir(parents=True)
    for name in PICTURES:
        shutil.copy(ASSETS / "example" / f"{name}.png", pictures)
        (pictures / f"{name}.txt").write_text(name)
    base = model(work / "model", seed)
    (work / "overfit.yaml").write_text(
        f"model: {base}\ndataset:\n  resolution: 64\n  buckets: {{step: 64, min: 64}}\n"
        "  captions: {dropout: 0.0, variants: 1}\n  folders: [{path: ./pictures}]\n"
        "network: {rank: 64, targets: all}\n"
        f"train: {{micro_batch_size: 4, max_steps: {steps}, seed: {seed}}}\n"
        f'validate: {{fraction: 0, every: 50}}\nstop: {{mode: "off"}}\nsave: {{every: {steps}}}\n'
        f"sample: {{every: {steps}, steps: 20, guidance: 1.0, prompts: [{', '.join(PICTURES)}]}}\n"
        "log: {tensorboard: false}\n"
    )
    code = emotrain(["run", str(work / "overfit.yaml"), "--plain", "--runs-dir", str(work / "runs")])
    assert code == 0, code
    return work / "runs" / "overfit"


def decoded(work: Path) -> dict[str, np.ndarray]:
    """The pictures as the VAE shows them, the nearest that a sample can come to."""
    family = load_family(str(work / "model"), device="cpu")
    found = {}
    for name in PICTURES:
        with Image.open(work / "pictures" / f"{name}.png") as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1)
        shown = family.decode_latents(family.encode_images(pixels.permute(2, 0, 1)[None]))[0]
        found[name] = ((shown / 2 + 0.5).clamp(0, 1)).permute(1, 2, 0).numpy()
    return found


def drawn(run: Path, step: int) -> dict[str, np.ndarray]:
    """The samples of a step, 0..1."""
    found = {}
    for number, name in enumerate(PICTURES, 1):
        with Image.open(run / "samples" / f"step-{step:08d}-{number}.png") as picture:
            found[name] = np.asarray(picture, dtype=np.float32) / 255
    return found


def distances(samples: dict[str, np.ndarray], pictures: dict[str, np.ndarray]) -> tuple[float, float, int]:
    """Root mean square to the own picture and to the others, in levels of 0..1; how many are nearest to their own."""
    table = np.array([[math.sqrt(((samples[a] - pictures[b]) ** 2).mean()) for b in PICTURES] for a in PICTURES])
    own = table.diagonal()
    others = (table.sum(1) - own) / (len(PICTURES) - 1)
    return float(own.mean()), float(others.mean()), int((table.argmin(1) == np.arange(len(PICTURES))).sum())


def measure(work: Path, steps: int, seed: int) -> dict[str, Any]:
    """One row of the table."""
    run = train(work, steps, seed)
    pictures, info = decoded(work), json.loads((run / "run.json").read_text())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = (distances(drawn(run, step), pictures) for step in (0, steps))
    few = max(1, len(losses) // 10)
    return {
        "seed": seed, "base": info["base_loss"], "best": info["best_loss"], "start": info["start_loss"],
        "first": sum(losses[:few]) / few, "last": sum(losses[-few:]) / few, "before": before, "after": after,
    }  # fmt: skip


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """The table."""
    heads = (
        "seed", "base's training loss", "last tenth's", "validation, base", "validation, best",
        "to its own picture, before", "after", "to the others, after", "nearest to its own",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        own, others, nearest = row["after"]
        cells = [
            str(row["seed"]), f"{row['start']:.3f}", f"{row['last']:.3f}", f"{row['base']:.3f}", f"{row['best']:.3f}",
            f"{row['before'][0]:.3f}", f"{own:.3f}", f"{others:.3f}", f"{nearest} of {len(PICTURES)}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="new-family-"))
    lines = lines_of([measure(work / str(seed), args.steps, seed) for seed in range(args.seeds)])
    print("\n".join(lines))
    if args.report:
        about = (__doc__ or "").split("\n\n", 2)[2].splitlines()
        command = f"`python tests/bench/new_family.py --steps {args.steps} --seeds {args.seeds}`"
        text = ["# A newer family learns", "", command, "", *about, "", *lines]
        (args.report / "new_family.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
