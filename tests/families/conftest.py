"""Random models of the built-in sizes, and small ones of the other families, as diffusers folders."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import make_assets as maker
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


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


def clip_with_projection(tokenizer: Any, width: int) -> Any:
    """A random CLIP text encoder with a projection, as SDXL and SD3 have."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=32, projection_dim=width,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Any]) -> Path:
    """A small random SDXL: text width 128 + 64, epsilon."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, layers_per_block=2, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=16,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4), cross_attention_dim=192, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=scaled_vae(), text_encoder=maker.build_clip(tokenizers["clip"]), tokenizer=tokenizers["clip"],
        text_encoder_2=clip_with_projection(tokenizers["clip"], 64), tokenizer_2=tokenizers["clip"],
        unet=unet, scheduler=DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Any]) -> Path:
    """A small random SD3: CLIP 48 + 64, T5 128."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "sd3"
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=64,
        pooled_projection_dim=48 + 64, pos_embed_max_size=24, qk_norm="rms_norm",
    )  # fmt: skip
    vae = scaled_vae()
    vae.register_to_config(shift_factor=0.2)
    StableDiffusion3Pipeline(
        vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_with_projection(tokenizers["clip"], 48), tokenizer=tokenizers["clip"],
        text_encoder_2=clip_with_projection(tokenizers["clip"], 64), tokenizer_2=tokenizers["clip"],
        text_encoder_3=maker.build_t5(tokenizers["t5"]), tokenizer_3=tokenizers["t5"],
    ).save_pretrained(folder)  # fmt: skip
    return folder
