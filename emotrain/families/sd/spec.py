"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv:2112.10752): facts (no torch)."""

from __future__ import annotations

from emotrain.families.spec import CLIP_TOKENIZERS, Distilled, FamilySpec, FileFacts, LoraFacts, TextEncoder, Variant
from emotrain.families.unet import BLOCKS, FILE_HEADS, LORA_HEADS, TARGETS, SgmNames, variant_of

_MODULES = {"attn": 128, "attn-mlp": 192, "all": 278}


def _lora(base_version: str, stated: tuple[str, ...]) -> LoraFacts:
    return LoraFacts(
        targets=TARGETS,
        heads=LORA_HEADS,
        originals=SgmNames(plain=(0,)),
        layout="kohya",
        loader="StableDiffusionLoraLoaderMixin",
        loader_alphas="always",
        unread_layouts=("comfyui",),
        kohya_originals=False,
        kohya_text="lora_te",
        base_version=base_version,
        stated=stated,
    )


SD15 = FamilySpec(
    name="sd15",
    title="Stable Diffusion 1.x",
    folder="sd",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    model_class="StableDiffusion",
    resolution=512,
    latent_channels=4,
    guidance=5.0,
    flow=False,
    clip_skip=1,
    text_encoders=(
        TextEncoder(
            "text_encoder", "clip", 123_060_480, (CLIP_TOKENIZERS, "tokenizer"),
            prefixes=("cond_stage_model.transformer.",), lora_modules=72,
        ),
    ),
    variants={
        "sd15": Variant(
            859_520_964, _MODULES, "stable-diffusion-v1", "stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    },
    lora=_lora("sd_v1", ("sd_v1", "sd_1.5", "stable-diffusion-v1")),
    file=FileFacts(variant_of("sd15"), FILE_HEADS, ("first_stage_model.",)),
    blocks=BLOCKS,
    distilled=Distilled(4),
    elsewhere={
        "ai-toolkit sd1": "sd15", "ai-toolkit sd15": "sd15", "onetrainer STABLE_DIFFUSION_15": "sd15",
    },
)  # fmt: skip

SD21 = FamilySpec(
    name="sd21",
    title="Stable Diffusion 2.x",
    folder="sd",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    model_class="StableDiffusion",
    resolution=768,
    latent_channels=4,
    guidance=5.0,
    flow=False,
    clip_skip=1,
    text_encoders=(
        TextEncoder(
            "text_encoder", "clip", 340_387_840, (CLIP_TOKENIZERS, "tokenizer_2"),
            prefixes=("cond_stage_model.model.",), lora_modules=138,
        ),
    ),
    variants={"sd21": Variant(865_910_724, _MODULES, "stable-diffusion-v2")},
    lora=_lora("sd_v2", ("sd_v2", "stable-diffusion-v2")),
    file=FileFacts(variant_of("sd21"), FILE_HEADS, ("first_stage_model.",)),
    blocks=BLOCKS,
    distilled=Distilled(4),
    elsewhere={
        "kohya v2": "", "ai-toolkit sd2": "", "ai-toolkit is_v2": "", "onetrainer STABLE_DIFFUSION_20": "",
        "onetrainer STABLE_DIFFUSION_20_BASE": "", "onetrainer STABLE_DIFFUSION_21": "",
        "onetrainer STABLE_DIFFUSION_21_BASE": "",
    },
)  # fmt: skip
