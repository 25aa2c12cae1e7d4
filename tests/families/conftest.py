"""Random models of the built-in sizes, and small ones of the other families, as diffusers folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import emotrain.assets.make_assets as maker


@pytest.fixture(scope="session")
def words_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of captions that the tokenizers are made from."""
    work = tmp_path_factory.mktemp("words")
    shutil.copytree(maker.ASSETS / "example", work / "base")
    (work / "names.json").write_text(json.dumps(["red apple", "green pear"]), encoding="utf-8")
    return work


@pytest.fixture(scope="session")
def tokenizers(words_dir: Path) -> dict[str, Any]:
    """`clip` (32 tokens) and `t5` (24 tokens)."""
    return {
        "clip": maker.make_clip_tokenizer(words_dir, 700),
        "t5": maker.make_t5_tokenizer(words_dir, 300),
    }


def scaled_vae() -> Any:
    """A random VAE whose scale and shift are not the identity."""
    vae = maker.build_vae()
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.0)
    return vae


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Any]) -> Path:
    """A random model of the size of builtin:tiny-sd."""
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sd"
    StableDiffusionPipeline(
        vae=scaled_vae(), text_encoder=maker.build_clip(tokenizers["clip"]), tokenizer=tokenizers["clip"],
        unet=maker.build_unet(), scheduler=maker.sd_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Any]) -> Path:
    """A random model of the size of builtin:tiny-flux."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "flux"
    vae = scaled_vae()
    vae.register_to_config(shift_factor=0.1)
    FluxPipeline(
        vae=vae, text_encoder=maker.build_clip(tokenizers["clip"]), tokenizer=tokenizers["clip"],
        text_encoder_2=maker.build_t5(tokenizers["t5"]), tokenizer_2=tokenizers["t5"],
        transformer=maker.build_flux(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
    ).save_pretrained(folder)  # fmt: skip
    return folder
