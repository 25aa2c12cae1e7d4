"""Qwen-Image (Alibaba 2025), its first version; facts (no torch)."""

from __future__ import annotations

import re

from emotrain.families.spec import (
    FamilySpec,
    FileFacts,
    LoraFacts,
    NameTable,
    Shapes,
    TextEncoder,
    Variant,
    by_signs,
    same_sizes,
)

MAX_TOKENS = 512


def _recognise(shapes: Shapes) -> bool:
    """Whether a LoRA on attention alone has more blocks than FLUX.1 and SD3, whose names are the same."""
    numbers = [int(found[1]) for path in shapes if (found := re.match(r"transformer_blocks\.(\d+)\.attn\.to_q", path))]
    return max(numbers, default=0) >= 38


_BLOCK = "transformer_blocks.{i}"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_NAMES = (
    *(f"{_BLOCK}.attn.{name}" for name in _ATTENTION),
    *(f"{_BLOCK}.{stream}_mlp.net.{name}" for stream in ("img", "txt") for name in ("0.proj", "2")),
    *(f"{_BLOCK}.{stream}_mod.1" for stream in ("img", "txt")),
    "img_in", "txt_in", "norm_out.linear", "proj_out",
    *(f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)),
)  # fmt: skip
NAMES = NameTable(rows=tuple((name, (name,)) for name in _NAMES), heads=("txt_norm",))  # the original's are diffusers'

QWEN = FamilySpec(
    name="qwen",
    title="Qwen-Image",
    pipeline="QwenImagePipeline",
    denoiser_class="QwenImageTransformer2DModel",
    model_class="QwenImage",
    guidance=4.0,
    text_encoders=(
        TextEncoder(
            "text_encoder", "llm", 7_070_619_136, ("Qwen/Qwen-Image", "tokenizer"), "Qwen2Tokenizer",
            max_tokens=MAX_TOKENS, width=("joint_attention_dim", 1),
        ),
    ),
    variants={
        "qwen-image": Variant(
            20_430_401_088, {"attn": 480, "attn-mlp": 720, "all": 846}, "qwen-image", "Qwen/Qwen-Image"
        ),
    },
    lora=LoraFacts(
        targets={
            "attn": (r"transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",),
            "mlp": (r"transformer_blocks\.\d+\.(?:img|txt)_mlp\.net\.(?:0\.proj|2)",),
            "rest": (
                r"transformer_blocks\.\d+\.(?:img|txt)_mod\.1",
                r"img_in|txt_in|norm_out\.linear|proj_out|time_text_embed\.timestep_embedder\.linear_[12]",
            ),
        },
        heads=("transformer_blocks.", "img_in", "txt_in", "norm_out.", "proj_out", "time_text_embed."),
        marks=(r"transformer_blocks\.\d+\.(?:img|txt)_(?:mlp|mod)\..*",),
        recognise=_recognise,
        originals=NAMES,
        layout="comfyui",
        comfyui_originals=False,
        loader="QwenImageLoraLoaderMixin",
        base_version="qwen_image",
        stated=("qwen",),
    ),
    file=FileFacts(
        by_signs("qwen-image", "transformer_blocks.0.img_mlp.net.0.proj.weight", "txt_norm.weight"),
        ("transformer_blocks.", "img_in.", "txt_in.", "txt_norm.", "norm_out.", "proj_out.", "time_text_embed."),
        check=same_sizes("Qwen-Image", "Qwen-Image", {"transformer_blocks": "num_layers"}, inputs="img_in.weight"),
    ),
    blocks=("QwenImageTransformerBlock",),
    vae_class="AutoencoderKLQwenImage",
    packed_channels=4,
    patch=2,
    elsewhere={
        "ai-toolkit qwen_image": "qwen-image", "onetrainer QWEN": "qwen-image",
        "diffusion-pipe qwen_image": "qwen-image",
    },
)  # fmt: skip
