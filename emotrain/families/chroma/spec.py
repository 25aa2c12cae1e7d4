"""Chroma (lodestones 2025): FLUX.1-schnell, pruned and trained on; facts (no torch)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from emotrain.errors import ModelError
from emotrain.families.flux.spec import FLUX
from emotrain.families.flux.spec import NAMES as FLUX_NAMES
from emotrain.families.spec import (
    T5_TOKENIZER,
    TEXTS_BEGIN,
    VAE_BEGINS,
    Distilled,
    FamilySpec,
    FileFacts,
    Shapes,
    TextEncoder,
    Variant,
    same_sizes,
)

MAX_TOKENS = 512
GUIDANCE = "distilled_guidance_layer."  # makes the modulation of all blocks


def _variant_of(path: Path, shapes: Shapes) -> str | None:
    if not any(name.startswith(GUIDANCE) for name in shapes):
        return None
    if any(name.startswith(("nerf_", "img_in_patch.")) for name in shapes):
        raise ModelError(
            f"`{path}` is Chroma Radiance, which draws pixels without a VAE and which emotrain does not train",
            "train on Chroma1-HD or -Base",
        )
    return "chroma"


_MODULATED = (".norm1.linear", ".norm1_context.linear", ".norm.linear")
_GONE = ("time_text_embed.", "norm_out.")  # FLUX.1 has them, and Chroma the guidance layer in their place
_LAYERS = (f"{GUIDANCE}in_proj", f"{GUIDANCE}out_proj")
NAMES = replace(
    FLUX_NAMES,
    rows=(
        *(row for row in FLUX_NAMES.rows if not row[1][0].endswith(_MODULATED) and not row[1][0].startswith(_GONE)),
        *((name, (name,)) for name in _LAYERS),
        *(
            (f"{GUIDANCE}layers.{{i}}.{theirs}", (f"{GUIDANCE}layers.{{i}}.{ours}",))
            for theirs, ours in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
        ),
    ),
    heads=(GUIDANCE,),
    swaps=None,
)

CHROMA = FamilySpec(
    name="chroma",
    title="Chroma",
    pipeline="ChromaPipeline",
    denoiser_class="ChromaTransformer2DModel",
    model_class="Chroma",
    guidance=5.0,
    text_encoders=(
        TextEncoder(
            "text_encoder", "t5", 4_762_310_656, (T5_TOKENIZER, ""), "T5TokenizerFast", prefixes=TEXTS_BEGIN,
            max_tokens=MAX_TOKENS, width=("joint_attention_dim", 1),
        ),
    ),
    variants={
        "chroma": Variant(
            8_899_983_424, {"attn": 266, "attn-mlp": 418, "all": 421}, "chroma", "lodestones/Chroma1-HD"
        ),
    },
    lora=replace(
        FLUX.lora,
        targets={
            **FLUX.lora.targets,
            "rest": (r"x_embedder|context_embedder|proj_out",),
        },
        heads=(
            "transformer_blocks.", "single_transformer_blocks.", "x_embedder", "context_embedder", "proj_out", GUIDANCE,
        ),
        marks=(r"distilled_guidance_layer\..*",),
        originals=NAMES,
        alike=FLUX.name,
        base_version="chroma",
        implementation="https://github.com/lodestone-rock/flow",
        stated=("chroma",),
    ),
    file=FileFacts(
        _variant_of,
        ("img_in.", "txt_in.", "double_blocks.", "single_blocks.", "final_layer.", GUIDANCE),
        VAE_BEGINS,
        check=same_sizes(
            "Chroma", "Chroma1-HD or -Base", {"double_blocks": "num_layers", "single_blocks": "num_single_layers"},
            inputs="img_in.weight",
        ),
    ),
    blocks=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
    packed_channels=4,
    patch=2,
    distilled=Distilled(words=("flash",)),
    elsewhere={
        "kohya chroma": "chroma", "ai-toolkit chroma": "chroma", "onetrainer CHROMA_1": "chroma",
        "diffusion-pipe chroma": "chroma",
    },
)  # fmt: skip
