"""Which modules of a denoiser or text encoder get a LoRA: named sets, chosen by path, never by class name.

The sets are regular expressions that must match a module's whole path, so that `proj_out` of a block is never mistaken
for the `proj_out` of the model. Their counts on the public configurations are in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from torch import nn

from emotrain.errors import ConfigError
from emotrain.families.registry import FAMILIES

TargetSet = Literal["attn", "attn-mlp", "all"]
Targets = str | Sequence[str]

_CLIP: dict[str, tuple[str, ...]] = {
    "attn": (r"(?:text_model\.)?encoder\.layers\.\d+\.self_attn\.(?:[qkv]|out)_proj",),
    "mlp": (r"(?:text_model\.)?encoder\.layers\.\d+\.mlp\.fc[12]",),
    "rest": (),
}
_BEFORE, _AFTER = r"(?:.*\.)?(?:", r")(?:\..*)?"
_MEMBERS = {"attn": ("attn",), "attn-mlp": ("attn", "mlp"), "all": ("attn", "mlp", "rest")}


def patterns(targets: Targets, family: str) -> tuple[str, ...]:
    r"""The regular expressions of a named set, or the given ones made to match whole path segments.

    A pattern of the user's may leave out the path's beginning and end (`attn2\.to_k`, `mid_block` for all of its
    layers), never cut a segment in two.

    Args:
        targets: `attn`, `attn-mlp`, `all`, or regular expressions of module paths.
        family: a name of `families.registry`, or clip for a text encoder.

    Raises:
        ConfigError: an unknown set, or a pattern that is not a regular expression.
        ValueError: an unknown family.
    """
    if family != "clip" and family not in FAMILIES:
        raise ValueError(f"family must be clip or one of {', '.join(FAMILIES)}, got {family}")
    sets = _CLIP if family == "clip" else FAMILIES[family].lora.targets
    if isinstance(targets, str):
        if targets not in _MEMBERS:
            raise ConfigError(
                f"network.targets is `{targets}`, which is not a set of modules",
                "use attn, attn-mlp, all, or a list of regular expressions",
            )
        return tuple(p for member in _MEMBERS[targets] for p in sets[member])
    return tuple(_segments(p) for p in targets)


def select(model: nn.Module, targets: Targets, family: str) -> tuple[str, ...]:
    """Paths of the Linear and Conv2d layers that the targets name, in the model's order.

    Raises:
        ConfigError: a pattern that matches no layer (a half-trained model would go unnoticed).
    """
    names = tuple(layers(model))
    chosen: set[str] = set()
    for pattern in patterns(targets, family):
        rule = re.compile(pattern)
        found = {name for name in names if rule.fullmatch(name)}
        if not found and not isinstance(targets, str):
            raise ConfigError(
                f"network.targets: `{_plain(pattern)}` matches no layer of this {family} model",
                f"paths look like `{next(iter(names), '')}`",
            )
        chosen |= found
    if not chosen:
        raise ConfigError(f"network.targets: no layer of this model is a {family} layer", "check model.family")
    return tuple(name for name in names if name in chosen)


def ranks_of(
    model: nn.Module,
    names: Sequence[str],
    *,
    rank: int,
    conv_rank: int = 0,
    rank_pattern: dict[str, int] | None = None,
) -> dict[str, int]:
    """Rank per module: `rank_pattern` first (the last match counts), then `conv_rank` for 3x3 kernels, then `rank`.

    Raises:
        ConfigError: a rank above what any of the layers can hold, or a pattern that matches none of them.
    """
    held = layers(model)
    ranks = {name: conv_rank if conv_rank and _is_wide_conv(held[name]) else rank for name in names}
    for pattern, value in (rank_pattern or {}).items():
        rule = re.compile(_segments(pattern))
        found = [name for name in names if rule.fullmatch(name)]
        if not found:
            raise ConfigError(f"network.rank_pattern: `{pattern}` matches none of the {len(names)} adapted layers")
        ranks.update(dict.fromkeys(found, value))
    widest = max(min(shape_of(held[name])) for name in names)
    for name, value in ranks.items():
        if not 1 <= value <= widest:
            raise ConfigError(f"network.rank is {value}, but `{name}` and its like hold 1 to {widest}")
    return ranks


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer, for every Linear and Conv2d, seen through adapters that are already there."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside[-1:]):
            continue
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            inside.append(name + ".")
        layer = base if isinstance(base, nn.Module) else module
        if name and isinstance(layer, nn.Linear | nn.Conv2d):
            found[name] = layer
    return found


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) features or channels of a Linear or Conv2d, also of a quantised one."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels // layer.groups
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def whole_shape(layer: nn.Module) -> tuple[int, ...]:
    """(out, in) of a Linear, (out, in, kh, kw) of a Conv2d."""
    return (*shape_of(layer), *(layer.kernel_size if isinstance(layer, nn.Conv2d) else ()))


def part_of(family: str) -> str:
    """`unet` or `transformer`: what the denoiser of a family is called in files."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family}")
    return FAMILIES[family].denoiser


def _is_wide_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def _segments(pattern: str) -> str:
    """The pattern for whole segments of a path.

    Raises:
        ConfigError: not a regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"`{pattern}` is not a regular expression: {error}") from error
    return _BEFORE + pattern + _AFTER


def _plain(pattern: str) -> str:
    return pattern.removeprefix(_BEFORE).removesuffix(_AFTER)
