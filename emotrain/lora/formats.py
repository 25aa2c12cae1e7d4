"""The layouts that we write: kohya (real alphas), diffusers and comfyui (strength 1). Dict in, dict out.

Why several: ComfyUI and A1111 ignore most of a diffusers-layout file of an SD or SDXL UNet, and diffusers ignores a
kohya-layout file of SD3; each family's default is the one that all of them read at exactly the trained strength.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.families.registry import FAMILIES
from emotrain.families.spec import Group
from emotrain.lora import names
from emotrain.lora.fused import Pair, fuse, swap_halves
from emotrain.lora.kron import Kron, krons

Layout = Literal["kohya", "diffusers", "comfyui"]
LAYOUTS: tuple[Layout, ...] = ("kohya", "diffusers", "comfyui")


def layout_of(family: str, choice: str = "auto") -> Layout:
    """The layout that a choice of `auto`, `kohya`, `diffusers` or `comfyui` means for a family."""
    if choice == "auto":
        return FAMILIES[family].lora.layout
    for layout in LAYOUTS:
        if choice == layout:
            return layout
    raise ValueError(f"format must be auto, {', '.join(LAYOUTS)}, got {choice}")


def to_layout(
    state: Mapping[str, Tensor], alphas: Mapping[str, float], family: str, layout: Layout
) -> dict[str, Tensor]:
    """`to_kohya`, `to_diffusers` or `to_comfyui` by name."""
    if layout == "kohya":
        return to_kohya(state, alphas, family)
    return to_diffusers(state, alphas) if layout == "diffusers" else to_comfyui(state, alphas, family)


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


def updates(state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Pair | Kron]:
    """Canonical module path -> its LoRA or LoKr.

    Raises:
        ModelError: as `pairs` and `krons`.
    """
    return {**pairs(state, alphas), **krons(state)}


def to_diffusers(state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """Canonical names, alpha / rank multiplied into B: readers that know no alpha apply it at its trained strength."""
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs(state, alphas).items():
        tensors |= pair.folded().named(path)
    for path, kron in krons(state).items():
        tensors |= kron.named(path)
    return tensors


def to_comfyui(state: Mapping[str, Tensor], alphas: Mapping[str, float], family: str) -> dict[str, Tensor]:
    """`diffusion_model.` and the original's names (diffusers' in some families), alpha / rank multiplied into B.

    Raises:
        ModelError: a module that the layout has no name for, or a text encoder's; nothing is left out silently.
    """
    tensors: dict[str, Tensor] = {}
    originals = FAMILIES[family].lora.comfyui_originals
    for part, name, kron in _named(krons(state), family, originals):
        _refuse_text_in_comfyui(part, name)
        tensors |= kron.named(f"diffusion_model.{name}")
    for (part, group), pair in _grouped(pairs(state, alphas), family, originals).items():
        _refuse_text_in_comfyui(part, group.name)
        tensors |= pair.folded().named(f"diffusion_model.{group.name}")
    return tensors


def _refuse_text_in_comfyui(part: str, name: str) -> None:
    if part not in ("unet", "transformer"):
        raise ModelError(f"the comfyui layout has no name for `{name}` of the {part}", "save it as kohya")


def to_kohya(state: Mapping[str, Tensor], alphas: Mapping[str, float], family: str) -> dict[str, Tensor]:
    """Kohya's names with `.alpha` scalars: SD on diffusers names, SDXL on SGM names, SD3 and FLUX fused as originally.

    Within one part of a UNet file all modules get the same alpha (differences go into B): diffusers loses single
    attention alphas when they differ.

    Raises:
        ModelError: a module that the layout has no name for; nothing is left out silently.
    """
    own = _one_alpha_per_part(pairs(state, alphas)) if FAMILIES[family].denoiser == "unet" else pairs(state, alphas)
    tensors: dict[str, Tensor] = {}
    originals = FAMILIES[family].lora.kohya_originals
    for part, name, kron in _named(krons(state), family, originals):
        stem = _kohya_stem(part, name, family)
        tensors |= {**kron.named(stem), f"{stem}.alpha": torch.tensor(1.0)}
    for (part, group), pair in _grouped(own, family, originals).items():
        stem = _kohya_stem(part, group.name, family)
        tensors[f"{stem}.lora_down.weight"] = pair.down
        tensors[f"{stem}.lora_up.weight"] = pair.up
        tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
    return tensors


def _named(own: Mapping[str, Kron], family: str, originals: bool) -> Iterator[tuple[str, str, Kron]]:
    """(part, name, LoKr), as `_grouped` for LoRAs.

    Raises:
        ModelError: a module that the original joins with others: LoKrs side by side are none.
    """
    for path, kron in own.items():
        part = str(names.part_of_key(path))
        local = path.removeprefix(f"{part}.")
        if part not in ("unet", "transformer") or not originals:
            yield part, local, kron
            continue
        group = FAMILIES[family].lora.originals.to_original(local)
        if group is None or len(group.parts) > 1:
            why = "no name for" if group is None else "one layer where diffusers has several, and no LoKr fits it:"
            raise ModelError(f"the original {family} has {why} `{local}`", "save it as diffusers")
        swapped = kron.halves_swapped() if group.swaps and halves_swap(group.name, *kron.shape[1::-1]) else kron
        if swapped is None:
            raise ModelError(f"`{local}` has its halves the other way round in the original", "save it as diffusers")
        yield part, group.name, swapped


def _grouped(own: Mapping[str, Pair], family: str, originals: bool) -> dict[tuple[str, Group], Pair]:
    """(part, group) -> pair, fused where the original is; `originals`: the denoiser's modules by original names."""
    grouped: dict[tuple[str, Group], Pair] = {}
    done: set[str] = set()
    for path, pair in own.items():
        if path in done:
            continue
        part = str(names.part_of_key(path))
        local = path.removeprefix(f"{part}.")
        if part not in ("unet", "transformer") or not originals:
            grouped[part, Group(local, (local,))] = pair
            continue
        group = FAMILIES[family].lora.originals.to_original(local)
        if group is None:
            raise ModelError(f"the original {family} has no name for `{local}`", "save it as diffusers")
        members = tuple(f"{part}.{name}" for name in group.parts)
        done.update(members)
        grouped[part, group] = _joined(group, [own.get(member) for member in members])
    return grouped


def _joined(group: Group, members: list[Pair | None]) -> Pair:
    if len(members) == 1:
        (pair,) = members
        assert pair is not None
        swaps = group.swaps and halves_swap(group.name, pair.down.shape[1], pair.up.shape[0])
        return Pair(pair.down, swap_halves(pair.up), pair.alpha) if swaps else pair
    known = next(pair for pair in members if pair is not None)
    width = known.down.shape[1]
    if len(members) == 3:
        return fuse(members, [known.up.shape[0]] * 3)
    mlp = members[3]
    return fuse(members, [width, width, width, 4 * width if mlp is None else mlp.up.shape[0]])


def halves_swap(name: str, inputs: int, outputs: int) -> bool:
    """Whether this modulation is a final one (2 x width: shift and scale alone), whose halves are swapped."""
    return name.startswith("final_layer") or outputs == 2 * inputs


def _kohya_stem(part: str, name: str, family: str) -> str:
    prefix = "lora_unet" if part in ("unet", "transformer") else _text_prefix(part, family)
    return f"{prefix}_{name.replace('.', '_')}"


def _text_prefix(part: str, family: str) -> str:
    if part == "text_encoder":
        return FAMILIES[family].lora.kohya_text
    return {"text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}[part]


def _one_alpha_per_part(own: Mapping[str, Pair]) -> dict[str, Pair]:
    seen: dict[str, list[float]] = {}
    for path, pair in own.items():
        seen.setdefault(path.split(".", 1)[0], []).append(pair.alpha)
    common = {part: max(sorted(set(values)), key=values.count) for part, values in seen.items()}
    return {path: pair.with_alpha(common[path.split(".", 1)[0]]) for path, pair in own.items()}
