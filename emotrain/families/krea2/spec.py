"""Krea 2 (Krea 2026): Raw is trained on, Turbo is for drawing; facts (no torch)."""

from __future__ import annotations

from emotrain.families.spec import (
    FamilySpec,
    FileFacts,
    LoraFacts,
    NameTable,
    TextEncoder,
    Variant,
    by_signs,
    same_sizes,
)

MAX_TOKENS = 512


_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
_FUSION = ("layerwise_blocks", "refiner_blocks")


def _rows(theirs: str, ours: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (
        *((f"{theirs}.attn.{name}", (f"{ours}.attn.{own}",)) for name, own in _ATTENTION.items()),
        *((f"{theirs}.mlp.{name}", (f"{ours}.ff.{name}",)) for name in ("gate", "up", "down")),
    )


NAMES = NameTable(
    rows=(
        *_rows("blocks.{i}", "transformer_blocks.{i}"),
        *(row for part in _FUSION for row in _rows(f"txtfusion.{part}.{{i}}", f"text_fusion.{part}.{{i}}")),
        ("txtfusion.projector", ("text_fusion.projector",)),
        ("first", ("img_in",)),
        ("tmlp.0", ("time_embed.linear_1",)),
        ("tmlp.2", ("time_embed.linear_2",)),
        ("tproj.1", ("time_mod_proj",)),
        ("txtmlp.1", ("txt_in.linear_1",)),
        ("txtmlp.3", ("txt_in.linear_2",)),
        ("last.linear", ("final_layer.linear",)),
        *(  # SimpleTuner's LyCORIS files join the three
            (f"{block}.attn.to_qkv", tuple(f"{block}.attn.to_{x}" for x in "qkv"))
            for block in ("transformer_blocks.{i}", *(f"text_fusion.{part}.{{i}}" for part in _FUSION))
        ),
    ),
    heads=("txtfusion.", "txtmlp.", "tmlp.", "tproj."),
)

KREA2 = FamilySpec(
    name="krea2",
    title="Krea 2",
    pipeline="Krea2Pipeline",
    denoiser_class="Krea2Transformer2DModel",
    model_class="Krea2",
    guidance=5.5,
    text_encoders=(
        TextEncoder(
            "text_encoder", "llm", 4_022_468_096, ("krea/Krea-2-Raw", "tokenizer"), "Qwen2Tokenizer",
            max_tokens=MAX_TOKENS, width=("text_hidden_dim", 1),
        ),
    ),
    variants={
        "krea2-raw": Variant(
            12_820_073_036, {"attn": 140, "attn-mlp": 224, "all": 264}, "krea-2-raw", "krea/Krea-2-Raw"
        ),
    },
    lora=LoraFacts(
        targets={
            "attn": (r"transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_gate|to_out\.0)",),
            "mlp": (r"transformer_blocks\.\d+\.ff\.(?:gate|up|down)",),
            "rest": (
                r"text_fusion\.\w+\.\d+\.(?:attn\.(?:to_[qkv]|to_gate|to_out\.0)|ff\.(?:gate|up|down))",
                r"text_fusion\.projector|img_in|time_embed\.linear_[12]|time_mod_proj|txt_in\.linear_[12]",
                r"final_layer\.linear",
            ),
        },
        heads=(
            "transformer_blocks.", "text_fusion.", "img_in", "time_embed.", "time_mod_proj", "txt_in.", "final_layer.",
        ),
        marks=(
            r"transformer_blocks\.\d+\.(?:attn\.(?:to_gate|to_qkv)|ff\.(?:gate|up|down))",
            r"blocks\.\d+\.(?:attn\.(?:w[qkvo]|gate)|mlp\.(?:gate|up|down))",
            r"(?:text_fusion|txtfusion)\..*",
        ),
        originals=NAMES,
        layout="diffusers",
        loader="Krea2LoraLoaderMixin",
        unread_layouts=("kohya",),
        base_version="krea2",
        stated=("krea2", "krea-2"),
    ),
    file=FileFacts(
        by_signs("krea2-raw", "txtfusion.projector.weight"),
        ("blocks.", "first.", "last.", "tmlp.", "tproj.", "txtmlp.", "txtfusion."),
        check=same_sizes("Krea 2", "Krea 2 Raw", {"blocks": "num_layers"}),
    ),
    blocks=("Krea2TransformerBlock",),
    vae_class="AutoencoderKLQwenImage",
    packed_channels=4,
    patch=2,
    elsewhere={
        "ai-toolkit krea2": "krea2", "onetrainer KREA_2": "krea2", "diffusion-pipe krea2": "krea2",
    },
)  # fmt: skip
