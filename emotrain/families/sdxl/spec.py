"""Stable Diffusion XL and its descendants (arXiv:2307.01952): facts (no torch)."""

from __future__ import annotations

from emotrain.families.spec import CLIP_TOKENIZERS, Distilled, FamilySpec, FileFacts, LoraFacts, TextEncoder, Variant
from emotrain.families.unet import BLOCKS, FILE_HEADS, LORA_HEADS, TARGETS, SgmNames, variant_of

SDXL = FamilySpec(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    model_class="StableDiffusionXL",
    latent_channels=4,
    guidance=6.0,
    flow=False,
    clip_skip=2,
    text_encoders=(
        TextEncoder(
            "text_encoder", "clip", 123_060_480, (CLIP_TOKENIZERS, "tokenizer"),
            prefixes=("conditioner.embedders.0.transformer.",), lora_modules=72,
        ),
        TextEncoder(
            "text_encoder_2", "clip", 694_659_840, (CLIP_TOKENIZERS, "tokenizer_2"),
            prefixes=("conditioner.embedders.1.model.",), adds_tokens=False, lora_modules=192,
        ),
    ),
    variants={
        "sdxl": Variant(
            2_567_463_684, {"attn": 560, "attn-mlp": 722, "all": 788}, "stable-diffusion-xl-v1-base",
            "stabilityai/stable-diffusion-xl-base-1.0",
        )
    },
    lora=LoraFacts(
        targets=TARGETS,
        heads=LORA_HEADS,
        originals=SgmNames(),
        layout="kohya",
        loader="StableDiffusionXLLoraLoaderMixin",
        loader_alphas="always",
        unread_layouts=("comfyui",),
        base_version="sdxl_base_v1-0",
        implementation="https://github.com/Stability-AI/generative-models",
        stated=("sdxl", "stable-diffusion-xl"),
    ),
    file=FileFacts(variant_of("sdxl"), FILE_HEADS, ("first_stage_model.",)),
    blocks=BLOCKS,
    tag_presets={"epsilon": "illustrious", "v_prediction": "noobai-vpred"},
    distilled=Distilled(4),
    elsewhere={
        "kohya sdxl": "sdxl", "ai-toolkit sdxl": "sdxl", "ai-toolkit is_xl": "sdxl",
        "onetrainer STABLE_DIFFUSION_XL_10_BASE": "sdxl", "diffusion-pipe sdxl": "sdxl",
    },
)  # fmt: skip
