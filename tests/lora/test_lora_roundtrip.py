"""What a live model does with its LoRA, another program's model must do with the file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny_models import Trained, clip, output, randomised, tiny, trained
from torch import nn

from emotrain.lora.adapter import adapter_like, add_adapter
from emotrain.lora.check import self_check
from emotrain.lora.file import read_lora, save_lora

UNETS, TRANSFORMERS = ["sd15", "sd21", "sdxl"], ["sd3", "flux"]
# SD 2.1 is SD 1.5 with Linear layers in the place of 1x1 convolutions, which SDXL has too
MANY = [pytest.param(family, marks=pytest.mark.slow) if family == "sd21" else family for family in UNETS]
LAYOUTS = ["kohya", "diffusers"]


def pipeline(family: str, denoiser: nn.Module, **encoders: Any) -> Any:
    """The stock pipeline around a fresh model; parts that no LoRA needs are missing."""
    part = "unet" if family in UNETS else "transformer"
    if family in UNETS:
        scheduler: Any = DDIMScheduler(steps_offset=1, clip_sample=False)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler()
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, part: denoiser, "scheduler": scheduler, **encoders}
    if family in ("sd15", "sd21"):
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = {"text_encoder_2": encoders.get("text_encoder_2"), "tokenizer_2": None}
    if family == "sdxl":
        return StableDiffusionXLPipeline(**{**parts, **second})
    if family == "sd3":
        return StableDiffusion3Pipeline(**{**parts, **second}, text_encoder_3=None, tokenizer_3=None)
    return FluxPipeline(**{**parts, **second})


def loaded_in_diffusers(family: str, path: Path) -> torch.Tensor:
    model = tiny(family)
    pipeline(family, model).load_lora_weights(str(path))
    return output(family, model)


def saved(t: Trained, path: Path, layout: str, dtype: str = "fp32") -> None:
    save_lora(
        path, t.adapter.state(), alphas=t.adapter.alphas(), family=t.family, format=layout, dtype=dtype, metadata={}
    )


@cache
def whole(family: str) -> Trained:
    """With a LoRA on all modules; nobody changes it."""
    return trained(family)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MANY)
def test_a_unets_lora_in_diffusers_equals_the_live_one(family: str, layout: str, lora_path: Path) -> None:
    t = whole(family)
    saved(t, lora_path, layout)
    assert (loaded_in_diffusers(family, lora_path) - t.live).abs().max() <= 1e-6


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_transformers_lora_in_diffusers_equals_the_live_one(family: str, lora_path: Path) -> None:
    t = whole(family)
    saved(t, lora_path, "diffusers")
    assert (loaded_in_diffusers(family, lora_path) - t.live).abs().max() <= 1e-6


@pytest.mark.parametrize(("family", "targets"), [("sd15", "attn"), ("sd15", ["conv1", "attn2"]), ("flux", "attn-mlp")])
def test_any_mixture_of_targets_reloads_whole_in_diffusers(family: str, targets: Any, lora_path: Path) -> None:
    t = trained(family, targets=targets)
    saved(t, lora_path, "diffusers")
    assert (loaded_in_diffusers(family, lora_path) - t.live).abs().max() <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_ranks_and_an_odd_alpha_keep_their_strength_in_diffusers(layout: str, lora_path: Path) -> None:
    """Single attention ranks are where diffusers loses differing alphas."""
    t = trained("sd15", rank=6, alpha=5.0, conv_rank=2, rank_pattern={r"attn2\.to_k": 3, "mid_block": 12})
    saved(t, lora_path, layout)
    reach = (t.live - t.base).abs().max()
    assert (loaded_in_diffusers("sd15", lora_path) - t.live).abs().max() <= 1e-5 * max(reach, 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MANY + TRANSFORMERS)
def test_reading_our_own_file_gives_the_live_model(family: str, layout: str, lora_path: Path) -> None:
    t = whole(family)
    saved(t, lora_path, layout)
    self_check(lora_path, t.adapter.state(), t.adapter.alphas(), family)
    lora = read_lora(lora_path)
    assert (lora.family, lora.format) == (family, layout)
    model = tiny(family)
    adapter_like(model, lora.state, lora.alphas, family=family)
    assert (output(family, model) - t.live).abs().max() <= 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_rounding_stays_small_against_the_effect(dtype: str, bound: float, lora_path: Path) -> None:
    t = whole("flux")
    saved(t, lora_path, "diffusers", dtype)
    error = (loaded_in_diffusers("flux", lora_path) - t.live).abs().max()
    assert 0 < error <= bound * (t.live - t.base).abs().max() * 10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_text_encoders_travel_with_the_unet(family: str, layout: str, lora_path: Path) -> None:
    kinds = {"text_encoder": False} if family == "sd15" else {"text_encoder": False, "text_encoder_2": True}
    t = trained(family, targets="attn")
    state, alphas = t.adapter.file_state(), t.adapter.file_alphas()
    live = {}
    ids = torch.tensor([[48, 3, 4, 49]])
    for part, projected in kinds.items():
        encoder = clip(projected=projected)
        adapter = randomised(
            add_adapter(encoder, rank=4, alpha=1.0, targets="attn-mlp", family=family, seed=2, part=part), size=0.3
        )
        state |= adapter.file_state()
        alphas |= adapter.file_alphas()
        live[part] = encoder(ids)[0]
        assert (live[part] - clip(projected=projected)(ids)[0]).abs().max() > 1e-3
    save_lora(lora_path, state, alphas=alphas, family=family, format=layout, dtype="fp32", metadata={})
    self_check(lora_path, state, alphas, family)
    fresh = {part: clip(projected=projected) for part, projected in kinds.items()}
    model = tiny(family)
    pipeline(family, model, **fresh).load_lora_weights(str(lora_path))
    assert (output(family, model) - t.live).abs().max() <= 1e-6
    for part, encoder in fresh.items():
        assert (encoder(ids)[0] - live[part]).abs().max() <= 1e-6


@pytest.mark.slow
def test_kohyas_flux_layout_is_exact_in_diffusers_at_real_width(lora_path: Path) -> None:
    """diffusers' converter knows the width 3072 only, so one double and one single block of that width."""
    config = {
        "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 24, "pooled_projection_dim": 16, "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip

    def real_width() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return diffusers.FluxTransformer2DModel(**config).eval().requires_grad_(False)

    model = real_width()
    base = output("flux", model)
    adapter = randomised(add_adapter(model, rank=4, alpha=2.0, targets="all", family="flux", seed=1), size=0.02)
    live = output("flux", model)
    assert (live - base).abs().max() > 1e-3
    save_lora(
        lora_path, adapter.state(), alphas=adapter.alphas(), family="flux", format="kohya", dtype="fp32", metadata={}
    )
    self_check(lora_path, adapter.state(), adapter.alphas(), "flux")
    fresh = real_width()
    pipeline("flux", fresh).load_lora_weights(str(lora_path))
    assert (output("flux", fresh) - live).abs().max() <= 1e-6
