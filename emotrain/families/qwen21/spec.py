"""Qwen-Image 2.1 (Alibaba 2026); facts (no torch)."""

from __future__ import annotations

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

MAX_TOKENS = 512  # the stock blocks have no limit
_BLOCK = "transformer_blocks.{i}"


def _recognise(shapes: Shapes) -> bool:
    """Whether a LoRA on attention alone is as wide as this model, and has no stream of its own for texts."""
    widths = {size for path, size in shapes.items() if path.endswith((".attn.to_q", ".attn.to_k", ".attn.to_v"))}
    others = (".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out", ".to_gate")
    return (
        widths == {(4096, 4096)}
        and all(path.startswith("transformer_blocks.") for path in shapes)
        and not any(path.endswith(others) for path in shapes)
    )


_NAMES = (
    *(f"{_BLOCK}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"{_BLOCK}.img_mlp.{name}" for name in ("proj", "gate_layer", "out")),
    "img_in", "txt_in.in_layer", "txt_in.out_layer", "modulation.1", "norm_out.linear", "proj_out",
    *(f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)),
)  # fmt: skip
NAMES = NameTable(
    # The original's are diffusers'; ComfyUI's files join two of them.
    rows=(
        *((name, (name,)) for name in _NAMES),
        (f"{_BLOCK}.img_mlp.gate_up", (f"{_BLOCK}.img_mlp.gate_layer", f"{_BLOCK}.img_mlp.proj")),
    ),
    heads=("txt_in.text_norm",),
)

QWEN21 = FamilySpec(
    name="qwen21",
    title="Qwen-Image 2.1",
    pipeline="QwenImage21ModularPipeline",
    denoiser_class="QwenImage21Transformer2DModel",
    model_class="QwenImage21",
    latent_channels=64,
    guidance=1.0,
    text_encoders=(
        TextEncoder(
            "text_encoder", "llm", 7_568_405_504, ("Qwen/Qwen-Image-2.1", "processor"), "Qwen2Tokenizer",
            max_tokens=MAX_TOKENS, width=("context_in_dim", 1), folders=("text_encoder", "processor"),
        ),
    ),
    variants={
        "qwen-image-2.1": Variant(
            7_115_124_736, {"attn": 128, "attn-mlp": 224, "all": 232}, "qwen-image-2.1", "Qwen/Qwen-Image-2.1"
        ),
    },
    lora=LoraFacts(
        targets={
            "attn": (r"transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_out\.0)",),
            "mlp": (r"transformer_blocks\.\d+\.img_mlp\.(?:proj|gate_layer|out)",),
            "rest": (
                r"img_in|txt_in\.(?:in|out)_layer|modulation\.1|norm_out\.linear|proj_out",
                r"time_text_embed\.timestep_embedder\.linear_[12]",
            ),
        },
        heads=("transformer_blocks.", "img_in", "txt_in.", "modulation.", "norm_out.", "proj_out", "time_text_embed."),
        marks=(r"transformer_blocks\.\d+\.img_mlp\.(?:proj|gate_layer|gate_up|out)(?:\..*)?",),
        recognise=_recognise,
        originals=NAMES,
        layout="diffusers",
        kohya_originals=False,
        comfyui_originals=False,
        loader="QwenImageLoraLoaderMixin",
        unread_layouts=("kohya",),
        base_version="qwen_image_2.1",
        stated=("qwen_image_2.1", "qwen-image-2.1", "qwen_image_21"),
    ),
    file=FileFacts(
        by_signs("qwen-image-2.1", "transformer_blocks.0.img_mlp.out.weight", "txt_in.text_norm.weight"),
        ("transformer_blocks.", "img_in.", "txt_in.", "modulation.", "norm_out.", "proj_out.", "time_text_embed."),
        check=same_sizes("Qwen-Image 2.1", "Qwen-Image 2.1", {"transformer_blocks": "num_layers"}),
    ),
    blocks=("QwenImage21TransformerBlock",),
    vae_class="AutoencoderKLQwenImage21",
    vae_scale=16,
    patch=1,
    elsewhere={"ai-toolkit qwen_image_21": "qwen-image-2.1"},
)  # fmt: skip
