"""A third base for the benchmarks, trained differently: other pictures, other width, another prediction.

    python tests/bench/third_base.py WORK [--steps 1200]

Writes WORK/third, a diffusers folder: Stable Diffusion with a U-Net of 32 and 64 channels (the built-in tiny-sd has 48
and 96), a text encoder 96 wide, epsilon-prediction without zero terminal SNR as SD 1.5 has it. Its pictures are
computed, drawn in SETS, and it has never seen a style; the VAE and the tokenizer are tiny-sd's. It takes some 4
minutes of one idle core, and goes on where it was ended. The package does not ship it.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from make_assets import ASSETS, Progress, encode, ids_of, set_lr, template
from PIL import Image, ImageDraw

SEED = 11
BATCH = 8
PICTURES = 2400  # of each set a third
LARGE = 256  # pictures are drawn at this size
COLOURS = {
    "red": (205, 40, 45), "blue": (40, 80, 200), "green": (40, 150, 70), "yellow": (240, 205, 50),
    "purple": (130, 60, 160), "orange": (240, 130, 30), "pink": (245, 150, 180), "brown": (120, 75, 40),
    "teal": (30, 150, 150), "black": (30, 30, 35),
}  # fmt: skip
GROUNDS = {
    "white": (250, 250, 250), "grey": (185, 185, 190), "sand": (235, 215, 170), "sky": (175, 215, 245),
    "mint": (190, 235, 205), "night": (35, 40, 75),
}  # fmt: skip


def polygon(sides: int, inner: float, centre: tuple[float, float], radius: float, turn: float) -> list[Any]:
    """Corners of a regular polygon, or of a star where `inner` < 1."""
    return [
        (
            centre[0] + radius * (inner if k % 2 else 1.0) * math.cos(turn + math.pi * k / sides),
            centre[1] + radius * (inner if k % 2 else 1.0) * math.sin(turn + math.pi * k / sides),
        )
        for k in range(2 * sides)
    ]


SHAPES: dict[str, tuple[int, float]] = {
    "triangle": (3, 0.5),
    "square": (4, 0.707),
    "star": (5, 0.42),
    "spark": (8, 0.6),
}


def draw_shape(draw: ImageDraw.ImageDraw, rng: random.Random, x: float, radius: float) -> str:
    """One shape with its shadow, at x of the width."""
    name, colour = rng.choice(["circle", "ring", *SHAPES]), rng.choice(list(COLOURS))
    centre, fill = (x, rng.uniform(110, 146)), COLOURS[colour]
    box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
    dark = tuple(int(c * 0.6) for c in fill)
    if name in ("circle", "ring"):
        draw.ellipse(box, fill=fill if name == "circle" else None, outline=dark, width=6)
        if name == "ring":
            draw.ellipse(box, outline=fill, width=int(radius * 0.35))
    else:
        sides, inner = SHAPES[name]
        draw.polygon(polygon(sides, inner, centre, radius, rng.uniform(0, 1)), fill=fill, outline=dark, width=6)
    return f"{colour} {name}"


def shapes(draw: ImageDraw.ImageDraw, rng: random.Random) -> str:
    """One or two shapes side by side."""
    if rng.random() < 0.5:
        return draw_shape(draw, rng, 128, rng.uniform(60, 100))
    left, right = (draw_shape(draw, rng, x, rng.uniform(42, 58)) for x in (68, 188))
    return f"{left} and {right}"


def house(draw: ImageDraw.ImageDraw, rng: random.Random) -> str:
    """A house with a roof, a door and windows."""
    wall, roof = rng.sample(list(COLOURS), 2)
    w, top, floors = rng.uniform(60, 100), rng.uniform(85, 130), rng.choice([1, 2])
    left, right, bottom = 128 - w, 128 + w, 232
    draw.rectangle([0, bottom - 14, 255, 255], fill=(110, 160, 90))
    draw.rectangle([left, top, right, bottom], fill=COLOURS[wall])
    draw.polygon([(left - 14, top), (right + 14, top), (128, top - rng.uniform(40, 75))], fill=COLOURS[roof])
    draw.rectangle([116, bottom - 48, 144, bottom], fill=(70, 45, 30))
    for floor in range(floors):
        for x in (left + 14, right - 40):
            y = top + 12 + floor * 44
            draw.rectangle([x, y, x + 26, y + 26], fill=(225, 240, 250), outline=(40, 40, 40), width=4)
    return f"{wall} house with {roof} roof"


def flower(draw: ImageDraw.ImageDraw, rng: random.Random) -> str:
    """A flower on its stem, with leaves."""
    petal, heart = rng.sample(list(COLOURS), 2)
    count, lean, size = rng.choice([5, 6, 8]), rng.uniform(-30, 30), rng.uniform(24, 36)
    x, y = 128 + lean, rng.uniform(80, 105)
    draw.line([(128, 250), (128 + lean / 2, 180), (x, y)], fill=(40, 120, 50), width=12)
    for side in (-1, 1):
        ends = sorted((128 + lean / 2, 128 + lean / 2 + side * 62))
        draw.ellipse([ends[0], 180, ends[1], 208], fill=(60, 150, 70))
    for k in range(count):
        px, py = (x + 44 * math.cos(2 * math.pi * k / count), y + 44 * math.sin(2 * math.pi * k / count))
        draw.ellipse([px - size, py - size, px + size, py + size], fill=COLOURS[petal], outline=(60, 40, 50), width=3)
    draw.ellipse([x - 24, y - 24, x + 24, y + 24], fill=COLOURS[heart])
    return f"{petal} flower with {heart} heart"


SETS: dict[str, Callable[[ImageDraw.ImageDraw, random.Random], str]] = {
    "shapes": shapes,
    "house": house,
    "flower": flower,
}


def scene(kind: str, number: int) -> tuple[str, np.ndarray]:
    """Caption and uint8 [64, 64, 3] of picture `number` of a set."""
    rng = random.Random(f"{kind} {number}")
    ground = rng.choice(list(GROUNDS))
    picture = Image.new("RGB", (LARGE, LARGE), GROUNDS[ground])
    said = SETS[kind](ImageDraw.Draw(picture), rng)
    return f"{said} on {ground}", np.asarray(picture.resize((64, 64), Image.Resampling.LANCZOS))


def build() -> dict[str, Any]:
    """Untrained text encoder and U-Net; scheduler, tokenizer and VAE."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "tiny-sd" / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=96, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=96, attention_head_dim=(2, 4), norm_num_groups=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    vae = AutoencoderKL.from_pretrained(ASSETS / "tiny-sd" / "vae").float().eval().requires_grad_(False)
    return {"clip": CLIPTextModel(config), "denoiser": unet, "scheduler": scheduler, "tokenizer": tokenizer, "vae": vae}


def train(work: Path, steps: int) -> dict[str, Any]:
    """The parts with averaged weights."""
    parts = build()
    scenes = [scene(kind, number) for kind in SETS for number in range(PICTURES // len(SETS))]
    captions = [caption for caption, _ in scenes]
    latents = encode(parts["vae"], np.stack([picture for _, picture in scenes])) * parts["vae"].config.scaling_factor
    modules = {key: parts[key] for key in ("clip", "denoiser")}
    params = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    progress, running = Progress(work, "third", modules, optimizer), 0.0
    while progress.step < steps:
        step = progress.step
        generator = torch.Generator().manual_seed(SEED * 5_000_011 + step)
        rows = torch.randint(len(captions), (BATCH,), generator=generator)
        rng = random.Random(SEED * 3_000_017 + step)
        texts = [template(captions[int(row)], rng) for row in rows]
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        noisy = parts["scheduler"].add_noise(latents[rows], noise, timesteps)
        ids = ids_of(parts["tokenizer"], texts, parts["tokenizer"].model_max_length)
        set_lr(optimizer, 2e-3, step, steps)
        loss = F.mse_loss(parts["denoiser"](noisy, timesteps, parts["clip"](ids).last_hidden_state).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        progress.step += 1
        progress.average(0.998)
        running += (loss.item() - running) / min(progress.step, 200)
        if progress.step % 200 == 0:
            progress.report(running, steps)
            progress.save()
    progress.save()
    for key, module in modules.items():
        module.load_state_dict(progress.ema[key])
    return parts


def main() -> None:
    """Train it and write the folder."""
    from diffusers import StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    parts = train(args.work, args.steps)
    target = args.work / "third"
    shutil.rmtree(target, ignore_errors=True)
    StableDiffusionPipeline(
        vae=parts["vae"], text_encoder=parts["clip"], tokenizer=parts["tokenizer"], unet=parts["denoiser"],
        scheduler=parts["scheduler"], safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(target, safe_serialization=True)  # fmt: skip
    print(target)


if __name__ == "__main__":
    main()
