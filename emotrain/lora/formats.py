"""The two layouts that we write: kohya (real alphas, original names) and diffusers (strength 1). Dict in, dict out.

Why two: ComfyUI and A1111 ignore most of a diffusers-layout file of an SD or SDXL UNet, and diffusers ignores a
kohya-layout file of SD3; each family's default is the one that all of them read at exactly the trained strength.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.lora import names
from emotrain.lora.fused import Pair, fuse, swap_halves
from emotrain.lora.originals import Group, group_of, to_sgm
from emotrain.lora.targets import UNET_FAMILIES

Layout = Literal["kohya", "diffusers"]


def layout_of(family: str, choice: str = "auto") -> Layout:
    """The layout that a choice of `auto`, `kohya` or `diffusers` means for a family."""
    if choice == "kohya" or (choice == "auto" and family in UNET_FAMILIES):
        return "kohya"
    if choice in ("auto", "diffusers"):
        return "diffusers"
    raise ValueError(f"format must be auto, kohya or diffusers, got {choice}")


def to_layout(
    state: Mapping[str, Tensor], alphas: Mapping[str, float], family: str, layout: Layout
) -> dict[str, Tensor]:
    """`to_kohya` or `to_diffusers` by name."""
    return to_kohya(state, alphas, family) if layout == "kohya" else to_diffusers(state, alphas)


def pairs(state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Pair]:
    """Canonical module path -> (A, B, alpha). A module without an alpha has strength 1.

    Raises:
        ModelError: halves that are missing or do not fit, or an alpha that is not a positive number.
    """
    found = {}
    for path, (down, up) in names.modules(state).items():
        alpha = float(alphas.get(path, down.shape[0]))
        if not 0.0 < alpha < float("inf"):
            raise ModelError(f"alpha of `{path}` is {alpha}")
        found[path] = Pair(down, up, alpha)
    return found


def to_diffusers(state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """Canonical names, alpha / rank multiplied into B: readers that know no alpha apply it at its trained strength."""
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs(state, alphas).items():
        pair = pair.folded()
        tensors[path + names.DOWN] = pair.down
        tensors[path + names.UP] = pair.up
    return tensors


def to_kohya(state: Mapping[str, Tensor], alphas: Mapping[str, float], family: str) -> dict[str, Tensor]:
    """Kohya's names with `.alpha` scalars: SD on diffusers names, SDXL on SGM names, SD3 and FLUX fused as originally.

    Within one part of a UNet file all modules get the same alpha (differences go into B): diffusers loses single
    attention alphas when they differ.

    Raises:
        ModelError: a module that the layout has no name for; nothing is left out silently.
    """
    own = _one_alpha_per_part(pairs(state, alphas)) if family in UNET_FAMILIES else pairs(state, alphas)
    tensors: dict[str, Tensor] = {}
    for stem, pair in _stems(own, family).items():
        tensors[f"{stem}.lora_down.weight"] = pair.down
        tensors[f"{stem}.lora_up.weight"] = pair.up
        tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
    return tensors


def _stems(own: Mapping[str, Pair], family: str) -> dict[str, Pair]:
    """Kohya's stem -> pair, fused where the original is."""
    stems: dict[str, Pair] = {}
    done: set[str] = set()
    for path, pair in own.items():
        if path in done:
            continue
        part = names.part_of_key(path)
        local = path.removeprefix(f"{part}.")
        if part in ("unet", "transformer"):
            group = _unet_group(local, family) if part == "unet" else group_of(local, family)
            if group is None:
                raise ModelError(f"the kohya layout of {family} has no name for `{local}`", "save it as diffusers")
            members = tuple(f"{part}.{name}" for name in group.parts)
            done.update(members)
            stem = f"lora_unet_{group.name.replace('.', '_')}"
            stems[stem] = _joined(group, [own.get(member) for member in members])
        else:
            stems[f"{_text_prefix(str(part), family)}_{local.replace('.', '_')}"] = pair
    return stems


def _unet_group(local: str, family: str) -> Group | None:
    name = to_sgm(local) if family == "sdxl" else local
    return None if name is None else Group(name, (local,))


def _joined(group: Group, members: list[Pair | None]) -> Pair:
    if len(members) == 1:
        (pair,) = members
        assert pair is not None
        swaps = group.swaps and halves_swap(group.name, pair.down, pair.up)
        return Pair(pair.down, swap_halves(pair.up), pair.alpha) if swaps else pair
    known = next(pair for pair in members if pair is not None)
    width = known.down.shape[1]
    if len(members) == 3:
        return fuse(members, [known.up.shape[0]] * 3)
    mlp = members[3]
    return fuse(members, [width, width, width, 4 * width if mlp is None else mlp.up.shape[0]])


def halves_swap(name: str, down: Tensor, up: Tensor) -> bool:
    """Whether this modulation is a final one (2 x width: shift and scale alone), whose halves are swapped."""
    return name.startswith("final_layer") or up.shape[0] == 2 * down.shape[1]


def _text_prefix(part: str, family: str) -> str:
    if part == "text_encoder":
        return "lora_te" if family in ("sd15", "sd21") else "lora_te1"
    return {"text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}[part]


def _one_alpha_per_part(own: Mapping[str, Pair]) -> dict[str, Pair]:
    seen: dict[str, list[float]] = {}
    for path, pair in own.items():
        seen.setdefault(path.split(".", 1)[0], []).append(pair.alpha)
    common = {part: max(sorted(set(values)), key=values.count) for part, values in seen.items()}
    return {path: pair.with_alpha(common[path.split(".", 1)[0]]) for path, pair in own.items()}
