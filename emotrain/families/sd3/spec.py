"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): facts (no torch)."""

from __future__ import annotations

import re
from pathlib import Path

from emotrain.families.spec import (
    CLIP_TOKENIZERS,
    T5_TOKENIZER,
    Distilled,
    FamilySpec,
    FileFacts,
    LoraFacts,
    NameTable,
    Shapes,
    TextEncoder,
    Variant,
)

T5_TOKENS = 256  # what the stock pipeline pads to


def _variant_of(path: Path, shapes: Shapes) -> str | None:
    blocks = {name.split(".")[1] for name in shapes if re.match(r"joint_blocks\.\d+\.x_block", name)}
    if not blocks:
        return None
    if any(".x_block.attn2." in name for name in shapes):
        return "sd35-medium"
    return "sd35-large" if len(blocks) > 24 or any(".ln_q." in name for name in shapes) else "sd3-medium"


_BLOCK = "transformer_blocks.{i}"
_QKV, _ADD_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
NAMES = NameTable(
    rows=(
        ("joint_blocks.{i}.x_block.attn.qkv", tuple(f"{_BLOCK}.attn.{n}" for n in _QKV)),
        ("joint_blocks.{i}.context_block.attn.qkv", tuple(f"{_BLOCK}.attn.{n}" for n in _ADD_QKV)),
        ("joint_blocks.{i}.x_block.attn2.qkv", tuple(f"{_BLOCK}.attn2.{n}" for n in _QKV)),
        ("joint_blocks.{i}.x_block.attn.proj", (f"{_BLOCK}.attn.to_out.0",)),
        ("joint_blocks.{i}.context_block.attn.proj", (f"{_BLOCK}.attn.to_add_out",)),
        ("joint_blocks.{i}.x_block.attn2.proj", (f"{_BLOCK}.attn2.to_out.0",)),
        ("joint_blocks.{i}.x_block.mlp.fc1", (f"{_BLOCK}.ff.net.0.proj",)),
        ("joint_blocks.{i}.x_block.mlp.fc2", (f"{_BLOCK}.ff.net.2",)),
        ("joint_blocks.{i}.context_block.mlp.fc1", (f"{_BLOCK}.ff_context.net.0.proj",)),
        ("joint_blocks.{i}.context_block.mlp.fc2", (f"{_BLOCK}.ff_context.net.2",)),
        ("joint_blocks.{i}.x_block.adaLN_modulation.1", (f"{_BLOCK}.norm1.linear",)),
        ("joint_blocks.{i}.context_block.adaLN_modulation.1", (f"{_BLOCK}.norm1_context.linear",)),
        ("context_embedder", ("context_embedder",)),
        ("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
        ("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
        ("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
        ("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
        ("final_layer.linear", ("proj_out",)),
        ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
    ),
    heads=("joint_blocks.", "t_embedder.", "y_embedder."),
    swaps=re.compile(r"final_layer\.adaLN_modulation\.1|.*context_block\.adaLN_modulation\.1"),
)

SD3 = FamilySpec(
    name="sd3",
    title="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    denoiser_class="SD3Transformer2DModel",
    model_class="StableDiffusion3",
    guidance=5.0,
    text_encoders=(
        TextEncoder(
            "text_encoder", "clip", 123_650_304, (CLIP_TOKENIZERS, "tokenizer"),
            prefixes=("text_encoders.clip_l.",), lora_modules=72,
        ),
        TextEncoder(
            "text_encoder_2", "clip", 694_659_840, (CLIP_TOKENIZERS, "tokenizer_2"),
            prefixes=("text_encoders.clip_g.",), adds_tokens=False, lora_modules=192,
        ),
        TextEncoder(
            "text_encoder_3", "t5", 4_762_310_656, (T5_TOKENIZER, ""), "T5TokenizerFast",
            prefixes=("text_encoders.t5xxl.",), max_tokens=T5_TOKENS, optional=True,
        ),
    ),
    variants={
        "sd3-medium": Variant(
            2_028_328_000, {"attn": 191, "attn-mlp": 285, "all": 333}, "stable-diffusion-3-m"
        ),
        "sd35-medium": Variant(
            2_243_171_520, {"attn": 243, "attn-mlp": 337, "all": 385}, "stable-diffusion-3-5-medium",
            "stabilityai/stable-diffusion-3.5-medium",
        ),
        "sd35-large": Variant(
            8_056_627_520, {"attn": 303, "attn-mlp": 453, "all": 529}, "stable-diffusion-3-5-large"
        ),
    },
    lora=LoraFacts(
        targets={
            "attn": (
                r"transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
                r"transformer_blocks\.\d+\.attn2\.(?:to_[qkv]|to_out\.0)",
            ),
            "mlp": (r"transformer_blocks\.\d+\.ff(?:_context)?\.net\.(?:0\.proj|2)",),
            "rest": (r"transformer_blocks\.\d+\.norm1(?:_context)?\.linear",),
        },
        heads=("transformer_blocks.", "x_embedder", "context_embedder", "proj_out", "norm_out.", "time_text_embed."),
        marks=(r"transformer_blocks\.\d+\.attn2\..*",),
        originals=NAMES,
        layout="diffusers",
        loader="SD3LoraLoaderMixin",
        unread_layouts=("kohya", "comfyui"),
        base_version="sd3",
        stated=("sd3", "stable-diffusion-3"),
    ),
    file=FileFacts(
        _variant_of,
        (
            "x_embedder.", "context_embedder.", "t_embedder.", "y_embedder.", "pos_embed", "joint_blocks.",
            "final_layer.",
        ),
        ("first_stage_model.",),
    ),
    blocks=("JointTransformerBlock",),
    patch=2,
    distilled=Distilled(4),
    elsewhere={
        "kohya lora_sd3": "sd3", "kohya sd3_checkbox": "sd3", "ai-toolkit sd3": "sd3", "ai-toolkit is_v3": "sd3",
        "onetrainer STABLE_DIFFUSION_3": "sd3", "onetrainer STABLE_DIFFUSION_35": "sd3", "diffusion-pipe sd3": "sd3",
    },
)  # fmt: skip
