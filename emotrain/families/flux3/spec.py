"""FLUX.3 klein base (Black Forest Labs 2026); facts (no torch)."""

from __future__ import annotations

import re
from pathlib import Path

from emotrain.errors import ModelError
from emotrain.families.spec import FamilySpec, FileFacts, LoraFacts, NameTable, Shapes, TextEncoder, Variant, same_sizes

PAD = 80  # captions are filled up to a multiple of that many tokens
MAX_TOKENS = 7 * PAD  # the stock blocks take up to 8192
_SIGN = "early_stream_modulations.image.lin.weight"


def _variant_of(path: Path, shapes: Shapes) -> str | None:
    if _SIGN not in shapes:
        return None
    if any(name.startswith("ref_time_in.") for name in shapes):
        raise ModelError(
            f"`{path}` is FLUX.3 klein distilled to few steps, which emotrain does not train",
            "train on FLUX.3 klein base",
        )
    return "flux3-klein"


_LAYERS = {
    "q_proj": "attn.to_q", "k_proj": "attn.to_k", "v_proj": "attn.to_v", "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in", "mlp_out": "ff.linear_out",
}  # fmt: skip
_BLOCKS = {
    "single_blocks.{i}": "single_transformer_blocks.{i}", "txt_mode_blocks.{i}": "txt_mode_blocks.{i}",
    "content_mode_blocks.image.{i}": "mode_blocks.image.{i}",
    "content_mode_blocks.image_cond.{i}": "mode_blocks.image_cond.{i}",
}  # fmt: skip
_STREAMS = ("image", "image_cond", "txt")
NAMES = NameTable(
    rows=(
        *(
            (f"{block}.{layer}", (f"{own}.{name}",))
            for block, own in _BLOCKS.items()
            for layer, name in _LAYERS.items()
        ),
        *(
            (f"{kind}_stream_modulations.{stream}.lin", (f"{kind}_stream_modulations.{stream}.linear",))
            for kind in ("early", "single")
            for stream in _STREAMS
        ),
        *((f"emb_in.{stream}", (f"x_embedders.{stream}",)) for stream in _STREAMS[:2]),
        ("txt_in", ("context_embedder",)),
        ("time_in.in_layer", ("timestep_embedder.linear_1",)),
        ("time_in.out_layer", ("timestep_embedder.linear_2",)),
        ("final_layer.image.linear", ("proj_out",)),
        ("final_layer.image.adaLN_modulation.1", ("norm_out.linear",)),
    ),
    heads=("content_mode_blocks.", "txt_mode_blocks.", "emb_in."),
    swaps=re.compile(r"final_layer\.image\.adaLN_modulation\.1"),
)
_TRAINED = r"(?:single_transformer_blocks|txt_mode_blocks|mode_blocks\.image)\.\d+"  # no picture is a condition

FLUX3 = FamilySpec(
    name="flux3",
    title="FLUX.3",
    pipeline="Flux3ModularPipeline",
    denoiser_class="Flux3Transformer2DModel",
    model_class="Flux3",
    latent_channels=128,
    guidance=3.5,
    text_encoders=(
        TextEncoder(
            "text_encoder", "llm", 4_022_468_096, ("black-forest-labs/flux-3-image-klein-base", "tokenizer"),
            "Qwen2Tokenizer", max_tokens=MAX_TOKENS, chat_template=True, width=("joint_attention_dim", 8),
        ),
    ),
    variants={
        "flux3-klein": Variant(
            5_538_458_368, {"attn": 152, "attn-mlp": 228, "all": 228}, "flux-3-klein",
            "black-forest-labs/flux-3-image-klein-base",
        ),
    },
    lora=LoraFacts(
        targets={
            "attn": (_TRAINED + r"\.attn\.(?:to_[qkv]|to_out\.0)",),
            "mlp": (_TRAINED + r"\.ff\.linear_(?:in|out)",),
            "rest": (),  # diffusers reads a LoRA of the blocks alone
        },
        heads=(
            "single_transformer_blocks.", "txt_mode_blocks.", "mode_blocks.", "x_embedders.", "context_embedder",
            "timestep_embedder.", "proj_out", "norm_out.", "early_stream_modulations.", "single_stream_modulations.",
        ),
        marks=(
            r"(?:txt_mode_blocks|(?:content_)?mode_blocks\.\w+)\.\d+\..*",
            r"single_blocks\.\d+\.(?:[qkv]_proj|attn_out|mlp_in|mlp_out)",
            r"single_transformer_blocks\.\d+\.(?:attn\.to_out\.0|ff\.linear_(?:in|out))",
        ),
        originals=NAMES,
        layout="comfyui",
        loader="Flux3LoraLoaderMixin",
        unread_layouts=("kohya",),
        base_version="flux3",
        stated=("flux3", "flux-3", "flux.3"),
    ),
    file=FileFacts(
        _variant_of,
        (
            "emb_in.", "txt_in.", "time_in.", "content_mode_blocks.", "txt_mode_blocks.", "single_blocks.",
            "final_layer.", "early_stream_modulations.", "single_stream_modulations.", "repa_projectors.",
        ),
        check=same_sizes("FLUX.3 klein", "FLUX.3 klein base", {"single_blocks": "num_single_layers"}, width=_SIGN),
    ),
    blocks=("Flux3ModeTransformerBlock", "Flux3SingleTransformerBlock"),
    vae_class="AutoencoderKLFlux2",
    vae_scale=16,
    vae_patch=2,
    elsewhere={"ai-toolkit flux3": "flux3-klein"},
)  # fmt: skip
