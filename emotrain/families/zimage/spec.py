"""Z-Image (Tongyi 2025): Base, Turbo and De-Turbo; facts (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emotrain.errors import ModelError
from emotrain.families.spec import FamilySpec, FileFacts, LoraFacts, NameTable, Shapes, TextEncoder, Variant, by_signs

MAX_TOKENS = 512
_REFINERS = ("noise_refiner", "context_refiner")


def _check(path: Path, shapes: Shapes, config: Mapping[str, Any]) -> None:
    """Refuse Lumina 2, which has the same names and another width."""
    width = shapes["cap_embedder.1.weight"][0]
    if width != int(config["dim"]):
        kind = "Lumina 2" if width == 2304 else "a model of another kind"
        raise ModelError(
            f"`{path}` is {kind}: its blocks are {width} wide, and Z-Image's {config['dim']}", "train on Z-Image"
        )


def _rows(block: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    same = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
    return (
        (f"{block}.{{i}}.attention.qkv", tuple(f"{block}.{{i}}.attention.{n}" for n in ("to_q", "to_k", "to_v"))),
        (f"{block}.{{i}}.attention.out", (f"{block}.{{i}}.attention.to_out.0",)),
        *((f"{block}.{{i}}.{name}", (f"{block}.{{i}}.{name}",)) for name in same),
    )


NAMES = NameTable(
    rows=(
        *(row for block in ("layers", *_REFINERS) for row in _rows(block)),
        ("x_embedder", ("all_x_embedder.2-1",)),
        ("final_layer.linear", ("all_final_layer.2-1.linear",)),
        ("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
        ("cap_embedder.1", ("cap_embedder.1",)),
        ("t_embedder.mlp.0", ("t_embedder.mlp.0",)),
        ("t_embedder.mlp.2", ("t_embedder.mlp.2",)),
    ),
    heads=("layers.", "noise_refiner.", "context_refiner."),
)

ZIMAGE = FamilySpec(
    name="zimage",
    title="Z-Image",
    pipeline="ZImagePipeline",
    denoiser_class="ZImageTransformer2DModel",
    model_class="ZImage",
    guidance=4.0,
    text_encoders=(
        TextEncoder(
            "text_encoder", "llm", 4_022_468_096, ("Tongyi-MAI/Z-Image-Turbo", "tokenizer"), "Qwen2Tokenizer",
            max_tokens=MAX_TOKENS, chat_template=True, width=("cap_feat_dim", 1),
        ),
    ),
    variants={
        "z-image": Variant(
            6_154_908_736, {"attn": 120, "attn-mlp": 210, "all": 276}, "z-image", "Tongyi-MAI/Z-Image"
        ),
        "z-image-turbo": Variant(
            6_154_908_736, {"attn": 120, "attn-mlp": 210, "all": 276}, "z-image-turbo",
            "Tongyi-MAI/Z-Image-Turbo",
        ),
    },
    lora=LoraFacts(
        targets={
            "attn": (r"layers\.\d+\.attention\.(?:to_[qkv]|to_out\.0)",),
            "mlp": (r"layers\.\d+\.feed_forward\.w[123]",),
            "rest": (
                r"layers\.\d+\.adaLN_modulation\.0",
                r"(?:noise|context)_refiner\.\d+\.(?:attention\.(?:to_[qkv]|to_out\.0)|feed_forward\.w[123])",
                r"noise_refiner\.\d+\.adaLN_modulation\.0",
                r"all_x_embedder\.2-1|all_final_layer\.2-1\.(?:linear|adaLN_modulation\.1)",
                r"cap_embedder\.1|t_embedder\.mlp\.[02]",
            ),
        },
        heads=(
            "layers.", "noise_refiner.", "context_refiner.", "all_x_embedder.", "all_final_layer.", "cap_embedder.",
            "t_embedder.",
        ),
        marks=(r"(?:layers|noise_refiner|context_refiner)\.\d+\.(?:attention|feed_forward)\..*",),
        originals=NAMES,
        layout="comfyui",
        comfyui_originals=False,
        loader="ZImageLoraLoaderMixin",
        unread_layouts=("kohya",),
        lokr_layouts=("comfyui", "diffusers"),
        base_version="zimage",
        stated=("zimage", "z-image", "z_image"),
    ),
    file=FileFacts(
        by_signs("z-image", "cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"),
        (
            "layers.", "noise_refiner.", "context_refiner.", "x_embedder.", "final_layer.", "cap_embedder.",
            "t_embedder.", "x_pad_token", "cap_pad_token", "norm_final.",
        ),
        check=_check,
    ),
    blocks=("ZImageTransformerBlock",),
    patch=2,
    elsewhere={
        "ai-toolkit zimage": "zimage", "ai-toolkit zimage:turbo": "zimage-turbo", "onetrainer Z_IMAGE": "zimage",
        "diffusion-pipe z_image": "zimage",
    },
)  # fmt: skip
