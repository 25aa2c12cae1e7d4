"""FLUX.2 (Black Forest Labs 2025): klein 4B and 9B, dev; facts (no torch)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from emotrain.families.spec import (
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

MAX_TOKENS = 512
_WIDTHS = {3072: "klein-4b", 4096: "klein-9b", 6144: "flux2-dev"}


def _variant_of(path: Path, shapes: Shapes) -> str | None:
    sign = shapes.get("double_stream_modulation_img.lin.weight")
    return None if sign is None else _WIDTHS.get(sign[-1], "klein-4b")


def _recognise(shapes: Shapes) -> bool:
    """Whether the feed-forward layers of a LoRA are gated, 3 wide: FLUX.1 has the same names, and plain ones, 4 wide.

    A LoRA on the attention of the double blocks alone does not tell.
    """
    for path, (inner, out) in shapes.items():
        if path.endswith((".linear1", ".to_qkv_mlp_proj")) and path.startswith("single_"):
            return out == 9 * inner
        if path.endswith((".linear2",)) and path.startswith("single_blocks."):
            return inner == 4 * out
        if re.search(r"\.(?:img|txt)_mlp\.0$", path):
            return out == 6 * inner
    return False


_SINGLE = "single_transformer_blocks.{i}"
NAMES = NameTable(
    rows=(
        *double_blocks("linear_in", "linear_out"),
        ("single_blocks.{i}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",)),
        ("single_blocks.{i}.linear2", (f"{_SINGLE}.attn.to_out",)),
        ("img_in", ("x_embedder",)),
        ("txt_in", ("context_embedder",)),
        ("time_in.in_layer", ("time_guidance_embed.timestep_embedder.linear_1",)),
        ("time_in.out_layer", ("time_guidance_embed.timestep_embedder.linear_2",)),
        ("guidance_in.in_layer", ("time_guidance_embed.guidance_embedder.linear_1",)),
        ("guidance_in.out_layer", ("time_guidance_embed.guidance_embedder.linear_2",)),
        ("double_stream_modulation_img.lin", ("double_stream_modulation_img.linear",)),
        ("double_stream_modulation_txt.lin", ("double_stream_modulation_txt.linear",)),
        ("single_stream_modulation.lin", ("single_stream_modulation.linear",)),
        ("final_layer.linear", ("proj_out",)),
        ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
    ),
    heads=("double_blocks.", "single_blocks.", "img_in", "txt_in", "time_in.", "guidance_in."),
    swaps=re.compile(r"final_layer\.adaLN_modulation\.1"),
)

_QWEN = TextEncoder(
    "text_encoder", "llm", 4_022_468_096, ("black-forest-labs/FLUX.2-klein-base-4B", "tokenizer"), "Qwen2Tokenizer",
    max_tokens=MAX_TOKENS, chat_template=True, width=("joint_attention_dim", 3),
)  # fmt: skip
_MISTRAL = TextEncoder(
    "text_encoder", "llm", 17_343_759_360, ("black-forest-labs/FLUX.2-dev", "tokenizer"), "PreTrainedTokenizerFast",
    max_tokens=MAX_TOKENS, chat_template=True, width=("joint_attention_dim", 3), layers_read=30,
)  # fmt: skip

FLUX2 = FamilySpec(
    name="flux2",
    title="FLUX.2",
    pipeline="Flux2KleinPipeline",
    other_pipelines=("Flux2Pipeline",),
    denoiser_class="Flux2Transformer2DModel",
    model_class="Flux2",
    latent_channels=128,
    guidance=4.0,
    text_encoders=(_QWEN,),
    variants={
        "klein-4b": Variant(
            3_875_544_576, {"attn": 80, "attn-mlp": 100, "all": 109}, "flux-2-klein-base-4b",
            "black-forest-labs/FLUX.2-klein-base-4B",
        ),
        "klein-9b": Variant(
            9_078_581_248, {"attn": 112, "attn-mlp": 144, "all": 153}, "flux-2-klein-base-9b",
            "black-forest-labs/FLUX.2-klein-base-9B", text_encoders=(replace(_QWEN, parameters=7_568_405_504),),
        ),
        "flux2-dev": Variant(
            32_223_281_152, {"attn": 160, "attn-mlp": 192, "all": 203}, "flux-2-dev",
            "black-forest-labs/FLUX.2-dev", text_encoders=(_MISTRAL,),
        ),
    },
    lora=LoraFacts(
        targets={
            "attn": (
                r"transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
                r"single_transformer_blocks\.\d+\.attn\.(?:to_qkv_mlp_proj|to_out)",
            ),
            "mlp": (r"transformer_blocks\.\d+\.ff(?:_context)?\.linear_(?:in|out)",),
            "rest": (
                r"double_stream_modulation_(?:img|txt)\.linear|single_stream_modulation\.linear",
                r"time_guidance_embed\.(?:timestep|guidance)_embedder\.linear_[12]",
                r"x_embedder|context_embedder|norm_out\.linear|proj_out",
            ),
        },
        heads=(
            "transformer_blocks.", "single_transformer_blocks.", "x_embedder", "context_embedder", "proj_out",
            "norm_out.", "time_guidance_embed.", "double_stream_modulation_", "single_stream_modulation.",
        ),
        marks=(
            r"single_transformer_blocks\.\d+\.attn\.(?:to_qkv_mlp_proj|to_out)(?:\..*)?",
            r"transformer_blocks\.\d+\.ff(?:_context)?\.linear_(?:in|out)",
            r"(?:double|single)_stream_modulation.*|time_guidance_embed\..*",
        ),
        recognise=_recognise,
        originals=NAMES,
        layout="diffusers",
        loader="Flux2LoraLoaderMixin",
        unread_layouts=("kohya", "comfyui"),
        lokr_layouts=("diffusers",),
        base_version="flux2",
        implementation="https://github.com/black-forest-labs/flux2",
        stated=("flux2", "flux-2", "flux.2", "klein"),
    ),
    file=FileFacts(
        _variant_of,
        (
            "img_in.", "txt_in.", "time_in.", "guidance_in.", "double_blocks.", "single_blocks.", "final_layer.",
            "double_stream_modulation_", "single_stream_modulation.",
        ),
        check=same_sizes(
            "FLUX.2", "FLUX.2 klein base, 4B or 9B, or on dev",
            {"double_blocks": "num_layers", "single_blocks": "num_single_layers"},
            width="double_stream_modulation_img.lin.weight",
        ),
    ),
    blocks=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    vae_class="AutoencoderKLFlux2",
    vae_scale=16,
    vae_patch=2,
    distilled=Distilled(4, words=("klein",), unless="base"),
    elsewhere={
        "ai-toolkit flux2_klein_4b": "klein-4b", "ai-toolkit flux2_klein_9b": "klein-9b",
        "ai-toolkit flux2": "flux2-dev", "onetrainer FLUX_2": "klein-4b", "diffusion-pipe flux2": "klein-4b",
    },
)  # fmt: skip
