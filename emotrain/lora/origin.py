"""What a LoRA was made for: the family behind its names, widths and metadata; names of original checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from emotrain.errors import ModelError
from emotrain.families.registry import FAMILIES
from emotrain.families.unet import LORA_HEADS, TEXT_WIDTHS

# Text encoders have these beside the words of the families.
_TEXT_WORDS = ("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file belongs."""

    part: str  # "" for the denoiser, or text_encoder, text_encoder_2
    path: str  # dotted, in diffusers' or in the original's names
    stem: str = field(compare=False)  # the key as the file has it, without its role
    dialect: str = field(compare=False)  # whose key it is

    def suffixes(self, keys: Iterable[str]) -> list[str]:
        """What follows the stem in the file's keys."""
        return [key.removeprefix(self.stem) for key in keys if key.startswith((self.stem + ".", self.stem + "_lora."))]


UNETS = {name for name, spec in FAMILIES.items() if spec.denoiser == "unet"}


def detect_family(halves: Mapping[Place, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> str:
    """The family, from names first, widths next, and metadata where both leave it open (tiny models, and Chroma)."""
    found, stated = _by_names(halves, metadata), stated_family(metadata)
    return stated if stated is not None and _alike(stated, found) else found


def _by_names(halves: Mapping[Place, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> str:
    paths = [place.path for place in halves if not place.part]
    if not paths:
        return _text_only(halves, metadata)
    for name, spec in FAMILIES.items():
        if any(re.fullmatch(mark, path) for mark in spec.lora.marks for path in paths):
            return name
    widths = {
        place.path: (int(found["down"].shape[1]), int(found["up"].shape[0]))
        for place, found in halves.items()
        if "down" in found and "up" in found and found["down"].ndim > 1
    }
    for name, spec in FAMILIES.items():
        if spec.lora.recognise(widths):
            return name
    original = {family for path in paths for family in families_of_original(path)}
    if original & UNETS or any(path.startswith(LORA_HEADS) for path in paths):
        return _unet_family(halves, metadata)
    if len(original) == 1:
        return original.pop()
    return _transformer_family(halves, metadata, original)


def stated_family(metadata: Mapping[str, str]) -> str | None:
    """The family that a file's metadata names, if any."""
    if (own := metadata.get("emotrain.family")) in FAMILIES:
        return own
    told = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    words = [(word, name) for name, spec in FAMILIES.items() for word in spec.lora.stated]
    for word, family in sorted(words, key=lambda row: -len(row[0])):  # `stable-diffusion-xl-v1` is no `...-v1`
        if word in told:
            return "sd21" if family == "sd15" and metadata.get("ss_v2") == "True" else family
    return None


def require_family(found: str, wanted: str, where: str) -> None:
    """Raise a ModelError that says what was found and what is wanted, where a LoRA is for another family."""
    if common_family(found, wanted) is None:
        raise ModelError(f"{where} is a LoRA for {found}, the model is {wanted}")


def common_family(one: str, other: str) -> str | None:
    """What two LoRAs are for together: a family takes those of the one whose names its files have. None if apart."""
    if one == other or _alike(one, other):
        return one
    return other if _alike(other, one) else None


def _alike(one: str, other: str) -> bool:
    """Whether the files of a family have another's names."""
    return FAMILIES[one].lora.alike == other


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
            known = TEXT_WIDTHS.get(int(down.shape[1]) if down.ndim > 1 else 0)
            if known is not None:
                return known
            break
    if stated in UNETS:
        return stated
    if any(place.part == "text_encoder_2" or ".transformer_blocks.1." in place.path for place in halves):
        return "sdxl"
    if any(place.dialect == "kohya" and families_of_original(place.path) for place in halves if not place.part):
        return "sdxl"
    return "sd15"


def _transformer_family(
    halves: Mapping[Place, Mapping[str, Tensor]], metadata: Mapping[str, str], among: set[str]
) -> str:
    """Where several families have such names: what the metadata say, then the width."""
    stated = stated_family(metadata)
    if stated is not None and stated not in UNETS:
        return stated
    if len(among) > 1:  # FLUX.1 and FLUX.2: the elder where nothing tells
        return sorted(among)[0]
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


def families_of_original(path: str) -> tuple[str, ...]:
    """The families that have an original name of this kind; none for a diffusers name."""
    return tuple(name for name, spec in FAMILIES.items() if path.startswith(spec.lora.originals.heads))


@cache
def _word() -> re.Pattern[str]:
    words = {*_TEXT_WORDS, *(word for spec in FAMILIES.values() for word in spec.lora.originals.words)}
    return re.compile("(?:(" + "|".join(sorted(words, key=lambda w: (-len(w), w))) + ")|([^_]+))(?:_|$)")


def dotted(name: str) -> str:
    """A name whose dots became underscores, with its dots again.

    >>> dotted("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0")
    'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    words, place = [], 0
    while place < len(name):
        found = _word().match(name, place)
        if found is None:
            return name
        words.append(found.group(1) or found.group(2))
        place = found.end()
    return ".".join(words)
