"""The names that a LoRA file of a public model has, found on the meta device: no weights are read."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from emotrain.errors import ConfigError
from emotrain.families.table import public_configs
from emotrain.lora import names, targets
from emotrain.lora.formats import layout_of, to_layout

# the family's name -> the variant it stands for, and where its text encoders are listed
_VARIANTS = {
    "sd15": ("sd15", "sd15"),
    "sd21": ("sd21", "sd21"),
    "sdxl": ("sdxl", "sdxl"),
    "sd3": ("sd3-medium", "sd3"),
    "sd3-medium": ("sd3-medium", "sd3"),
    "sd35-medium": ("sd35-medium", "sd3"),
    "sd35-large": ("sd35-large", "sd3"),
    "flux": ("flux1-dev", "flux1"),
    "flux1-dev": ("flux1-dev", "flux1"),
    "flux1-schnell": ("flux1-schnell", "flux1"),
}
_FAMILY_OF_TEXT = {"flux1": "flux"}
KNOWN = tuple(_VARIANTS)


def lora_keys(
    family: str, *, target_set: str = "attn-mlp", text_encoder: bool = False, format: str = "auto"
) -> dict[str, Any]:
    """Tensor names of a LoRA file at the model's real size.

    Args:
        family: sd15, sd21, sdxl, sd3, flux, or a variant such as sd35-large.
        target_set: attn, attn-mlp or all.
        text_encoder: with the CLIP text encoders.
        format: auto, kohya or diffusers.

    Returns:
        `keys`; `modules`, how many LoRA modules they are in this format (fused ones count once); `adapted`, how many
        layers per part they reach; `family`, `variant`, `format`, `targets`.

    Raises:
        ConfigError: an unknown family or format.
    """
    if family not in _VARIANTS:
        raise ConfigError(f"`{family}` is not a known family", f"one of {', '.join(_VARIANTS)}")
    if format not in ("auto", "kohya", "diffusers"):
        raise ConfigError(f"`{format}` is not a known format", "one of auto, kohya, diffusers")
    variant, texts = _VARIANTS[family]
    base = _FAMILY_OF_TEXT.get(texts, texts)
    layout = layout_of(base, format)
    state = _names_of(_denoiser(variant), target_set, base, targets.part_of(base))
    if text_encoder:
        for part, encoder in _clips(texts).items():
            state.update(_names_of(encoder, "attn-mlp", "clip", part))
    adapted: dict[str, int] = {}
    for path in names.module_names(state):
        part = path.split(".", 1)[0]
        adapted[part] = adapted.get(part, 0) + 1
    keys = list(to_layout(state, {}, base, layout))
    return {
        "family": base,
        "variant": variant,
        "format": layout,
        "targets": target_set,
        "modules": sum(key.endswith((".lora_down.weight", names.DOWN)) for key in keys),
        "adapted": adapted,
        "keys": keys,
    }


def _names_of(model: nn.Module, target_set: str, kind: str, part: str) -> dict[str, Tensor]:
    """A LoRA of rank 1 for the targets, of zeros: shapes decide where fused layers are split."""
    held = targets.layers(model)
    state: dict[str, Tensor] = {}
    for path in targets.select(model, target_set, kind):
        layer = held[path]
        out, inner = targets.shape_of(layer)
        kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else ()
        name = names.canonical(path, part)
        state[name + names.DOWN] = torch.zeros((1, inner, *kernel))
        state[name + names.UP] = torch.zeros((out, 1, *(1 for _ in kernel)))
    return state


def _denoiser(variant: str) -> nn.Module:
    entry = public_configs()["denoiser"][variant]
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, entry["class"]).from_config(entry["config"])
    return model


def _clips(family: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for part, (kind, config) in public_configs()["text_encoders"][family].items():
        if kind.startswith("CLIP"):
            with torch.device("meta"):
                found[part] = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
    return found
