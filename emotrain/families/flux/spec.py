"""FLUX.1 (Black Forest Labs 2024): facts (no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emotrain.errors import ModelError
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
    double_blocks,
    same_sizes,
)

T5_TOKENS = 512  # what the stock pipeline pads to


def _variant_of(path: Path, shapes: Shapes) -> str | None:
    if not any(re.match(r"double_blocks\.\d+\.img_attn\.qkv", name) for name in shapes):
        return None
    return "flux1-dev" if any(name.startswith("guidance_in.") for name in shapes) else "flux1-schnell"


def _check(path: Path, shapes: Shapes, config: Mapping[str, Any]) -> None:
    """Refuse edit models, which take more inputs, and pruned ones."""
    inputs = shapes.get("img_in.weight", (0, 0))[-1]
    wanted = int(config.get("in_channels", 64))
    if inputs != wanted:
        kind = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth"}.get(inputs, "an edit model or another model")
        raise ModelError(
            f"`{path}` is {kind}: it takes {inputs} inputs instead of {wanted}",
            "train on the text-to-image model, FLUX.1-dev or -schnell",
        )
    _same_sizes(path, shapes, config)


_same_sizes = same_sizes(
    "FLUX.1", "FLUX.1-dev or -schnell", {"double_blocks": "num_layers", "single_blocks": "num_single_layers"}
)


_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
NAMES = NameTable(
    rows=(
        *double_blocks("net.0.proj", "net.2"),
        ("double_blocks.{i}.img_mod.lin", (f"{_DOUBLE}.norm1.linear",)),
        ("double_blocks.{i}.txt_mod.lin", (f"{_DOUBLE}.norm1_context.linear",)),
        ("single_blocks.{i}.linear1", (*(f"{_SINGLE}.attn.to_{n}" for n in "qkv"), f"{_SINGLE}.proj_mlp")),
        ("single_blocks.{i}.linear2", (f"{_SINGLE}.proj_out",)),
        ("single_blocks.{i}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
        ("img_in", ("x_embedder",)),
        ("txt_in", ("context_embedder",)),
        ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
        ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
        ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
        ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
        ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
        ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
        ("final_layer.linear", ("proj_out",)),
        ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
    ),
    heads=("double_blocks.", "single_blocks.", "img_in", "txt_in", "time_in.", "vector_in.", "guidance_in."),
    swaps=re.compile(r"final_layer\.adaLN_modulation\.1"),
)

_MODULES = {"attn": 266, "attn-mlp": 418, "all": 494}
FLUX = FamilySpec(
    name="flux",
    title="FLUX.1",
    pipeline="FluxPipeline",
    denoiser_class="FluxTransformer2DModel",
    model_class="Flux",
    guidance=3.5,
    text_encoders=(
        TextEncoder(
            "text_encoder", "clip", 123_060_480, (CLIP_TOKENIZERS, "tokenizer"),
            prefixes=("text_encoders.clip_l.",), adds_tokens=False, lora_modules=72,
        ),
        TextEncoder(
            "text_encoder_2", "t5", 4_762_310_656, (T5_TOKENIZER, ""), "T5TokenizerFast",
            prefixes=("text_encoders.t5xxl.",), max_tokens=T5_TOKENS,
        ),
    ),
    variants={
        "flux1-dev": Variant(
            11_901_408_320, _MODULES, "flux-1-dev", "black-forest-labs/FLUX.1-dev"
        ),
        "flux1-schnell": Variant(11_891_178_560, _MODULES, "flux-1-schnell"),
    },
    lora=LoraFacts(
        targets={
            "attn": (
                r"transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
                r"single_transformer_blocks\.\d+\.attn\.to_[qkv]",
            ),
            "mlp": (
                r"transformer_blocks\.\d+\.ff(?:_context)?\.net\.(?:0\.proj|2)",
                r"single_transformer_blocks\.\d+\.proj_(?:mlp|out)",
            ),
            "rest": (
                r"transformer_blocks\.\d+\.norm1(?:_context)?\.linear",
                r"single_transformer_blocks\.\d+\.norm\.linear",
            ),
        },
        heads=(
            "transformer_blocks.", "single_transformer_blocks.", "x_embedder", "context_embedder", "proj_out",
            "norm_out.", "time_text_embed.",
        ),
        marks=(r"single_transformer_blocks\.\d+\.(?:attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)(?:\..*)?",),
        originals=NAMES,
        layout="diffusers",
        loader="FluxLoraLoaderMixin",
        loader_alphas="asked",
        unread_layouts=("comfyui",),
        base_version="flux1",
        implementation="https://github.com/black-forest-labs/flux",
        stated=("flux",),
    ),
    file=FileFacts(
        _variant_of,
        (
            "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "double_blocks.", "single_blocks.",
            "final_layer.",
        ),
        ("vae.", "first_stage_model."),
        _check,
    ),
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    packed_channels=4,
    patch=2,
    distilled=Distilled(4, words=("schnell",), variants=("flux1-schnell",)),
    elsewhere={
        "kohya lora_flux": "flux", "kohya Flux1": "flux", "kohya flux1_checkbox": "flux", "ai-toolkit flux": "flux",
        "ai-toolkit is_flux": "flux", "onetrainer FLUX_DEV_1": "flux", "diffusion-pipe flux": "flux",
    },
)  # fmt: skip
