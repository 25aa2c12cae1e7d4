"""What is known of each model family without opening a file (no torch).

The module counts are those of the public configs (`configs.json` beside this file), counted on the meta device;
a test counts them again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

FamilyName = Literal["sd15", "sd21", "sdxl", "sd3", "flux"]


@dataclass(frozen=True)
class Variant:
    """One public model of a family.

    `config` names its entry in configs.json; `modules` is how many modules a LoRA has per named set of targets.
    """

    config: str
    parameters: int
    modules: dict[str, int]


@dataclass(frozen=True)
class FamilyInfo:
    """One family: sizes in pixels, `max_tokens` of its longest text encoder.

    `layer_width_max` is the narrower side of its widest layer: the largest rank that adds something.
    """

    title: str
    pipeline: str
    denoiser: str
    resolution: int
    bucket_step: int
    max_tokens: int
    latent_channels: int
    vae_scale: int
    layer_width_max: int
    text_encoders: tuple[str, ...]
    text_modules: tuple[tuple[str, int], ...]  # CLIP encoders that can be trained, with their module counts
    guidance: float
    variants: dict[str, Variant]


FAMILIES: dict[str, FamilyInfo] = {
    "sd15": FamilyInfo(
        "Stable Diffusion 1.x", "StableDiffusionPipeline", "unet", 512, 64, 77, 4, 8, 1280,
        ("text_encoder",), (("text_encoder", 72),), 5.0,
        {"sd15": Variant("sd15", 859_520_964, {"attn": 128, "attn-mlp": 192, "all": 278})},
    ),
    "sd21": FamilyInfo(
        "Stable Diffusion 2.x", "StableDiffusionPipeline", "unet", 768, 64, 77, 4, 8, 1280,
        ("text_encoder",), (("text_encoder", 138),), 5.0,
        {"sd21": Variant("sd21", 865_910_724, {"attn": 128, "attn-mlp": 192, "all": 278})},
    ),
    "sdxl": FamilyInfo(
        "Stable Diffusion XL", "StableDiffusionXLPipeline", "unet", 1024, 64, 77, 4, 8, 1280,
        ("text_encoder", "text_encoder_2"), (("text_encoder", 72), ("text_encoder_2", 192)), 6.0,
        {"sdxl": Variant("sdxl", 2_567_463_684, {"attn": 560, "attn-mlp": 722, "all": 788})},
    ),
    "sd3": FamilyInfo(
        "Stable Diffusion 3", "StableDiffusion3Pipeline", "transformer", 1024, 64, 256, 16, 8, 2432,
        ("text_encoder", "text_encoder_2", "text_encoder_3"), (("text_encoder", 72), ("text_encoder_2", 192)), 5.0,
        {
            "sd3-medium": Variant("sd3-medium", 2_028_328_000, {"attn": 191, "attn-mlp": 285, "all": 333}),
            "sd35-medium": Variant("sd35-medium", 2_243_171_520, {"attn": 243, "attn-mlp": 337, "all": 385}),
            "sd35-large": Variant("sd35-large", 8_056_627_520, {"attn": 303, "attn-mlp": 453, "all": 529}),
        },
    ),
    "flux": FamilyInfo(
        "FLUX.1", "FluxPipeline", "transformer", 1024, 64, 512, 16, 8, 3072,
        ("text_encoder", "text_encoder_2"), (("text_encoder", 72),), 3.5,
        {
            "flux1-dev": Variant("flux1-dev", 11_901_408_320, {"attn": 266, "attn-mlp": 418, "all": 494}),
            "flux1-schnell": Variant("flux1-schnell", 11_891_178_560, {"attn": 266, "attn-mlp": 418, "all": 494}),
        },
    ),
}  # fmt: skip

PIPELINES = {info.pipeline: name for name, info in FAMILIES.items() if name != "sd21"}


@cache
def public_configs() -> dict[str, Any]:
    """configs.json: sizes of denoisers, VAEs, text encoders and schedulers of the public models, by variant."""
    loaded: dict[str, Any] = json.loads((Path(__file__).parent / "configs.json").read_text(encoding="utf-8"))
    return loaded
