"""A model at its real size with random weights: a few training steps, a file, and what it took.

    python tests/bench/real_size.py [--model sd15] [--size 256] [--steps 2] [--dtype fp32] [--device cpu]

Prints seconds a step, peak memory of the process (and of the GPU), the number of modules, and whether the
file holds the live weights. Needs no download; SD 1.5 in fp32 takes about 5 GiB of memory.
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from emotrain.batch import Batch, Conditioning
from emotrain.diffusion import build_objective
from emotrain.families.blocks import checkpoint_blocks
from emotrain.families.common import LoadedFamily, Parts
from emotrain.families.loading import DTYPES, family_class
from emotrain.families.registry import FAMILIES, configs, family_of_variant
from emotrain.families.sniff import latent_channels
from emotrain.families.table import ASSETS
from emotrain.lora.adapter import Adapter, add_adapter
from emotrain.lora.check import self_check
from emotrain.lora.file import save_lora
from emotrain.optim.registry import build_optimizer
from emotrain.train.loop import Parts as LoopParts
from emotrain.train.losses import LossBaseline, timesteps_at

Change = Callable[[str, dict[str, Any]], dict[str, Any]]  # part (unet, vae, text_encoder...), its config -> another


def build(
    variant: str, dtype: torch.dtype, device: torch.device, change: Change = lambda part, config: config
) -> LoadedFamily:
    """The family with random weights and without text encoders; `change` makes it smaller."""
    import diffusers

    family = str(family_of_variant(variant))
    spec, public = FAMILIES[family], configs(family)
    kind, words = public["scheduler"][variant]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # twice the memory otherwise, for a moment
    try:
        with device:
            own = change(spec.denoiser, public["denoiser"][variant])
            denoiser = getattr(diffusers, spec.denoiser_class).from_config(own)
    finally:
        torch.set_default_dtype(before)
    vae = getattr(diffusers, spec.vae_class).from_config(change("vae", public["vae"])).to(device)
    scheduler = getattr(diffusers, kind)(**{key: value for key, value in words.items() if key != "prediction_type"})
    return family_class(family)(
        Parts(
            name=family, variant=variant, prediction="flow" if spec.flow else "epsilon",
            denoiser=denoiser, vae=vae, text_encoders=[], scheduler=scheduler, device=device, dtype=dtype,
        )
    )  # fmt: skip


def text_of(family: LoadedFamily) -> dict[str, torch.Tensor]:
    """Random embeddings of the right shapes."""
    tokens = sum(encoder.max_tokens for encoder in FAMILIES[family.name].text_encoders if encoder.adds_tokens)
    generator = torch.Generator().manual_seed(1)
    shapes = family.text_shapes(family.denoiser.config, tokens)
    return {name: torch.randn(1, *shape, generator=generator) for name, shape in shapes.items()}


def loop_parts(family: LoadedFamily, adapter: Adapter, optimizer: Any, size: int) -> LoopParts:
    """What the loop's `train_step` needs, with one batch of `size` pixels that comes again and again."""
    side = size // family.vae_scale
    zeros, sizes, text = torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), size), text_of(family)
    channels = latent_channels(family.name, dict(family.vae.config))

    class Data:
        batches_per_epoch = 10

        def batch(self, number: int) -> Batch:
            latents, sized = torch.zeros(1, channels, side, side), Conditioning(sizes, zeros, sizes)
            return Batch(latents, dict(text), sized, torch.ones(1), None, ("a",), 0, ("t",))

    nothing: Any = None
    return LoopParts(
        family=family, objective=build_objective(family.prediction, family.scheduler_config), adapter=adapter,
        optimizer=optimizer, data=Data(), stop_rule=nothing, loss_baseline=LossBaseline(), validation=None,
        notify=print, save=nothing, sample=nothing, interrupted=nothing,
    )  # fmt: skip


def main() -> None:
    """Build, train, save, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    variants = [name for info in FAMILIES.values() for name in info.variants]
    parser.add_argument("--model", choices=variants, default="sd15")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    started = time.monotonic()
    family = build(args.model, dtype, device)
    picture = Image.open(ASSETS / "example" / "rose.png").convert("RGB").resize((args.size, args.size))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents, text = family.encode_images(pixels).to(device), text_of(family)
    family.free_encoders()
    adapter = add_adapter(
        family.denoiser, rank=args.rank, alpha=args.rank, targets="attn-mlp", family=family.name, seed=0
    )
    if args.checkpointing:
        checkpoint_blocks(family.denoiser)
    expected = FAMILIES[family.name].variants[args.model].modules["attn-mlp"]
    assert adapter.num_modules == expected, f"{adapter.num_modules} modules instead of {expected}"
    adapter.use_half_precision(dtype)
    optimizer = build_optimizer("emosens", adapter.parameters(), lr=None)
    objective = build_objective(family.prediction, family.scheduler_config)
    zeros, sizes = torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), args.size)
    built = time.monotonic() - started
    times, losses = [], []
    for step in range(args.steps):
        started = time.monotonic()
        u = torch.tensor([(step + 0.5) / args.steps])
        timesteps = timesteps_at(family, objective, u, latents).to(device)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step)).to(device)
        noisy = objective.add_noise(latents, noise, timesteps)
        output = family.predict(noisy, timesteps, text, Conditioning(sizes, zeros, sizes))
        loss = (output - objective.target(latents, noise, timesteps)).pow(2).mean()
        loss.backward()
        adapter.collect_gradients()
        optimizer.observe(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.monotonic() - started)
        losses.append(float(loss.detach()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        state, alphas = adapter.state(), adapter.alphas()
        save_lora(path, state, alphas=alphas, family=family.name, metadata={})
        self_check(path, state, alphas, family.name)
        size = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)
    print(f"{args.model} {args.dtype} {args.size} px on {device}, torch {torch.__version__}, {platform.machine()}")
    print(f"{torch.get_num_threads()} threads; built in {built:.0f} s")
    print(f"{adapter.num_modules} modules, {adapter.num_parameters:,} trained parameters, rank {args.rank}")
    print(f"seconds a step: {', '.join(f'{t:.1f}' for t in times)}; losses {', '.join(f'{x:.4f}' for x in losses)}")
    print(f"peak memory {peak:.2f} GiB; file of {size / 1e6:.1f} MB holds the live weights")
    if device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
