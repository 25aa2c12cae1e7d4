"""A picture, noised half-way by the training code, comes back through each built-in model's sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.diffusion import build_objective
from emotrain.families.common import DrawRequest
from emotrain.families.flux.model import pack
from emotrain.families.loading import load_family
from emotrain.families.sampling import draw_sample
from emotrain.families.table import ASSETS

CAPTIONS = ["tiger face", "octopus"]


def pictures(family: Any) -> Tensor:
    """Float32 [2, 3, 64, 64] in -1..1: what the model knows, drawn by the stock pipeline."""
    nothing = family.encode_texts([""])
    requests = [
        DrawRequest(family.encode_texts([caption]), nothing, 64, 64, seed, steps=10)
        for seed, caption in enumerate(CAPTIONS)
    ]
    arrays = [np.array(draw_sample(family, request)) for request in requests]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def through_ddim(family: Any, noisy: Tensor, start: int, text: TextEmbeds) -> Tensor:
    """The second half of the model's own DDIM schedule."""
    scheduler = family.fresh_scheduler()
    scheduler.set_timesteps(20)
    zeros = torch.zeros(len(noisy), 2, dtype=torch.int64)
    for t in scheduler.timesteps[scheduler.timesteps <= start]:
        times = t.float().expand(len(noisy))
        output = family.predict(noisy, times, text, Conditioning(zeros, zeros, zeros))
        noisy = scheduler.step(output, t, noisy).prev_sample
    return noisy


def through_flux(family: Any, noisy: Tensor, start: float, text: TextEmbeds) -> Tensor:
    """The stock pipeline, begun at sigma `start`."""
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    tokens = pipeline(
        prompt_embeds=text["prompt_embeds"], pooled_prompt_embeds=text["pooled_prompt_embeds"],
        latents=pack(noisy), sigmas=[float(s) for s in np.linspace(start, start / 10, 10)],
        width=64, height=64, output_type="latent", guidance_scale=0.0,
    ).images  # fmt: skip
    return family.unpack_sampled(tokens, 64, 64)


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-flux"])
def test_a_picture_noised_half_way_comes_back(name: str) -> None:
    if not (Path(ASSETS) / name / "model_index.json").is_file():
        pytest.skip("the model is not there")
    family = load_family(f"builtin:{name}", device="cpu")
    objective = build_objective(family.prediction, family.scheduler_config)
    clean, text = family.encode_images(pictures(family)), family.encode_texts(CAPTIONS)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(100))
    half = 0.5 if family.prediction == "flow" else 549.0
    noisy = objective.add_noise(clean, noise, torch.full((len(clean),), half))
    with torch.no_grad():
        if family.prediction == "flow":
            back = through_flux(family, noisy, half, text)
        else:
            back = through_ddim(family, noisy, int(half), text)
    lost = (noisy - clean).pow(2).mean((1, 2, 3))
    left = (back - clean).pow(2).mean((1, 2, 3))
    assert (left < 0.5 * lost).all()
    # Each is nearest to its own picture.
    distances = (back[:, None] - clean[None]).pow(2).mean((2, 3, 4))
    assert torch.equal(distances.argmin(1), torch.arange(len(clean)))
