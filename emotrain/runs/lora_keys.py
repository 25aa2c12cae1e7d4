"""The names that a LoRA file of a public model has, found on the meta device: no weights are read."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from emotrain.errors import ConfigError
from emotrain.families.registry import FAMILIES, configs, family_of_variant
from emotrain.lora import names, targets
from emotrain.lora.formats import LAYOUTS, layout_of, to_layout
from emotrain.runs.activation_memory import build_on_meta

KNOWN = tuple(dict.fromkeys(name for family, spec in FAMILIES.items() for name in (family, *spec.variants)))


def lora_keys(
    family: str, *, target_set: str = "attn-mlp", text_encoder: bool = False, format: str = "auto"
) -> dict[str, Any]:
    """Tensor names of a LoRA file at the model's real size.

    Args:
        family: a family, or a variant such as sd35-large.
        target_set: attn, attn-mlp or all.
        text_encoder: with the CLIP text encoders.
        format: auto, kohya, diffusers or comfyui.

    Returns:
        `keys`; `modules`, how many LoRA modules they are in this format (fused ones count once); `adapted`, how many
        layers per part they reach; `family`, `variant`, `format`, `targets`.

    Raises:
        ConfigError: an unknown family or format.
    """
    if family not in KNOWN:
        raise ConfigError(f"`{family}` is not a known family", f"one of {', '.join(KNOWN)}")
    if format not in ("auto", *LAYOUTS):
        raise ConfigError(f"`{format}` is not a known format", f"one of auto, {', '.join(LAYOUTS)}")
    base = family if family in FAMILIES else str(family_of_variant(family))
    variant = family if family not in FAMILIES else next(iter(FAMILIES[base].variants))
    layout = layout_of(base, format)
    state = _names_of(
        build_on_meta(base, configs(base)["denoiser"][variant], torch.float32), target_set, base, targets.part_of(base)
    )
    if text_encoder:
        for part, encoder in _clips(base).items():
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
        out, inner, *kernel = targets.whole_shape(held[path])
        name = names.canonical(path, part)
        state[name + names.DOWN] = torch.zeros((1, inner, *kernel))
        state[name + names.UP] = torch.zeros((out, 1, *(1 for _ in kernel)))
    return state


def _clips(family: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for encoder in FAMILIES[family].trainable_encoders:
        kind, config = configs(family)["text_encoders"][encoder.name]
        with torch.device("meta"):
            found[encoder.name] = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
    return found
