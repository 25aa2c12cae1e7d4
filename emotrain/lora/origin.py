"""What a LoRA was made for: the family behind its names, widths and metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from emotrain.errors import ModelError
from emotrain.lora.originals import family_of_original
from emotrain.lora.targets import TRANSFORMER_FAMILIES, UNET_FAMILIES

_TEXT_WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}  # of attn2.to_k in a UNet: the text encoders' outputs
UNET_HEADS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
TRANSFORMER_HEADS = (
    "transformer_blocks.", "single_transformer_blocks.", "x_embedder", "context_embedder", "proj_out", "norm_out.",
    "time_text_embed.",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file belongs.

    Attributes:
        part: "" for the denoiser, or text_encoder, text_encoder_2.
        path: dotted, in diffusers' or in the original's names.
        stem: the key as the file has it, without its role.
        dialect: whose key it is.
    """

    part: str
    path: str
    stem: str = field(compare=False)
    dialect: str = field(compare=False)

    def suffixes(self, keys: Iterable[str]) -> list[str]:
        """What follows the stem in the file's keys."""
        return [key.removeprefix(self.stem) for key in keys if key.startswith((self.stem + ".", self.stem + "_lora."))]


def detect_family(halves: Mapping[Place, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> str:
    """The family, from names first, widths next, and metadata where both leave it open (tiny models)."""
    paths = [place.path for place in halves if not place.part]
    if not paths:
        return _text_only(halves, metadata)
    if any(path.startswith("single_transformer_blocks.") for path in paths):
        return "flux"
    for path in paths:
        origin = family_of_original(path)
        if origin in TRANSFORMER_FAMILIES:
            return origin
    if any(path.startswith(UNET_HEADS) or family_of_original(path) == "unet" for path in paths):
        return _unet_family(halves, metadata)
    return _transformer_family(halves, metadata)


def stated_family(metadata: Mapping[str, str]) -> str | None:
    """The family that a file's metadata names, if any."""
    if (own := metadata.get("emotrain.family")) in UNET_FAMILIES + TRANSFORMER_FAMILIES:
        return own
    told = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    for word, family in (
        ("sdxl", "sdxl"), ("stable-diffusion-xl", "sdxl"), ("flux", "flux"), ("sd3", "sd3"),
        ("stable-diffusion-3", "sd3"), ("sd_v2", "sd21"), ("stable-diffusion-v2", "sd21"), ("sd_v1", "sd15"),
        ("sd_1.5", "sd15"), ("stable-diffusion-v1", "sd15"),
    ):  # fmt: skip
        if word in told:
            return "sd21" if family == "sd15" and metadata.get("ss_v2") == "True" else family
    return None


def require_family(found: str, wanted: str, where: str) -> None:
    """Raise a ModelError that says what was found and what is wanted, where a LoRA is for another family."""
    if found != wanted:
        raise ModelError(f"{where} is a LoRA for {found}, the model is {wanted}")


def peft_alpha(metadata: Mapping[str, str], place: Place, rank: int) -> float | None:
    """Alpha of a module by `lora_adapter_metadata` (the peft configuration that diffusers keeps), or None without it.

    Raises:
        ModelError: metadata that is not what diffusers writes, or one that asks for DoRA.
    """
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError("its lora_adapter_metadata is not JSON") from error
    prefix = place.part or place.stem.split(".", 1)[0]
    own: dict[str, Any] = {}
    if isinstance(config, dict):
        own = {k.removeprefix(f"{prefix}."): v for k, v in config.items() if k.startswith(f"{prefix}.")}
    if not own:
        return None
    if own.get("use_dora"):
        raise ModelError("it is a DoRA, which is not supported (lora_adapter_metadata)")
    try:
        alpha = float(_by_pattern(own.get("alpha_pattern") or {}, place.path, own["lora_alpha"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError("its lora_adapter_metadata has no usable lora_alpha") from error
    return alpha * rank**0.5 if own.get("use_rslora") else alpha


def _by_pattern(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    for pattern, value in patterns.items():
        plain = pattern.removeprefix("^")
        if path == plain or (not pattern.startswith("^") and path.endswith(f".{plain}")):
            return value
    return otherwise


def _unet_family(halves: Mapping[Place, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> str:
    stated = stated_family(metadata)
    for place, found in halves.items():
        if not place.part and re.search(r"\.attn2\.to_[kv]$", place.path) and (down := found.get("down")) is not None:
            known = _TEXT_WIDTHS.get(int(down.shape[1]) if down.ndim > 1 else 0)
            if known is not None:
                return known
            break
    if stated in UNET_FAMILIES:
        return stated
    if any(place.part == "text_encoder_2" or ".transformer_blocks.1." in place.path for place in halves):
        return "sdxl"
    if any(place.dialect == "kohya" and family_of_original(place.path) == "unet" for place in halves if not place.part):
        return "sdxl"
    return "sd15"


def _transformer_family(halves: Mapping[Place, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> str:
    if any(".attn2." in place.path for place in halves):
        return "sd3"
    stated = stated_family(metadata)
    if stated in TRANSFORMER_FAMILIES:
        return stated
    widths = {
        int(found["down"].shape[1])
        for place, found in halves.items()
        if place.path.endswith((".to_q", ".to_k", ".to_v", ".add_q_proj"))
        and "down" in found
        and found["down"].ndim > 1
    }
    return "flux" if 3072 in widths else "sd3"


def _text_only(halves: Mapping[Place, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> str:
    stated = stated_family(metadata)
    if stated is not None:
        return stated
    if any(place.part == "text_encoder_2" for place in halves):
        return "sdxl"
    widths = {int(found["down"].shape[1]) for found in halves.values() if "down" in found and found["down"].ndim > 1}
    return "sd21" if 1024 in widths else "sd15"
