"""Reading anyone's LoRA: recognise dialect and family from the names, and bring all to the canonical layout.

Known: kohya, diffusers (three generations), ComfyUI (`diffusion_model.`), OneTrainer (`lora_transformer_`), raw peft.
LoKrs come in the same dialects. What cannot be applied exactly (LoHa, Tucker, DoRA and others) is refused by its name,
never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emotrain.errors import ModelError, listed
from emotrain.families.registry import FAMILIES
from emotrain.families.spec import Group
from emotrain.lora import names
from emotrain.lora.formats import halves_swap
from emotrain.lora.fused import Pair, split, swap_halves
from emotrain.lora.kron import Kron, as_lora, from_file
from emotrain.lora.origin import Place, detect_family, dotted, peft_alpha
from emotrain.lora.targets import part_of

_REFUSED = (
    (r"\.hada_w", "a LoHa"),
    (r"\.lora_mid\.", "a LoCon with Tucker decomposition (lora_mid)"),
    (r"\.dora_scale$|\.lora_magnitude_vector", "a DoRA"),
    (r"\.oft_|\.boft_|oft_blocks", "an OFT"),
    (r"\.(?:a1|a2|b1|b2)\.weight$", "a GLoRA"),
    (r"\.(?:q_layer|p_layer|lambda_layer)", "a T-LoRA"),
    (r"\.on_input$", "an IA3"),
    (r"\.processor\.(?:qkv|proj)_lora[12]\.", "an XLabs LoRA"),
    (r"\.lora_[AB]\.(?:\w+\.)?bias$", "a LoRA with biases"),
    (r"\.diff(?:_b)?$|\.[wb]_norm$", "a LoRA with full differences (diff, norms)"),
    (r"^(?:model\.diffusion_model|first_stage_model|cond_stage_model)\.(?!.*\.lora_)", "a whole model"),
    (r"^emb_params$|^clip_[lg]$|^string_to_param", "a textual-inversion embedding"),
    (r"^text_encoders\.t5xxl\.|^lora_te3_|^text_encoder_3\.", "a LoRA of the T5 text encoder too"),
)
_ROLES = (
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    ("_lora.down.weight", "down"),
    ("_lora.up.weight", "up"),
    *((f".lokr_{factor}", factor) for factor in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
    (".alpha", "alpha"),
)
# prefix, part ("" is the denoiser), dialect, whether dots are underscores
_PREFIXES = (
    ("lora_unet_", "", "kohya", True),
    ("lora_te1_", "text_encoder", "kohya", True),
    ("lora_te2_", "text_encoder_2", "kohya", True),
    ("lora_te_", "text_encoder", "kohya", True),
    ("lora_transformer_", "", "onetrainer", True),
    ("lycoris_", "", "lycoris", True),
    ("diffusion_model.", "", "comfyui", False),
    ("model.diffusion_model.", "", "comfyui", False),
    ("net.", "", "comfyui", False),
    ("text_encoders.clip_l.transformer.", "text_encoder", "comfyui", False),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", "comfyui", False),
    ("unet.", "", "diffusers", False),
    ("transformer.", "", "diffusers", False),
    ("text_encoder.", "text_encoder", "diffusers", False),
    ("text_encoder_2.", "text_encoder_2", "diffusers", False),
)
_WIDE = re.compile(r"\.conv[12]?$|^unet\.conv_(?:in|out)$")
_OLD_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Parsed:
    """A LoRA in the canonical layout."""

    # "<part>.<diffusers path>.lora_A.weight" [rank, in, ...] and ".lora_B.weight" [out, rank, ...]
    state: dict[str, Tensor]
    alphas: dict[str, float]  # "<part>.<diffusers path>" -> alpha; strength is alpha / rank
    family: str  # a name of `emotrain.families.registry.FAMILIES`
    dialect: str  # kohya, diffusers, comfyui, onetrainer, lycoris or peft
    notes: tuple[str, ...] = ()  # what was assumed
    ignored: tuple[str, ...] = ()  # keys that no module belongs to; only where that was allowed


def parse(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, allow_partial: bool = False, whole: bool = False
) -> Parsed:
    """Any known dialect -> canonical layout.

    Args:
        tensors: of the file.
        metadata: its strings.
        allow_partial: let unknown keys pass.
        whole: take a LoKr of layers that are apart here for whole matrices, where no LoKr or LoRA is the same.

    Raises:
        ModelError: another kind of network, no known key at all, unknown keys (unless `allow_partial`), a half without
            its other half, shapes that do not fit, or an alpha that is not a positive number.
    """
    refuse_other_networks(tensors)
    halves, alphas, unknown = _sorted_by_place(tensors)
    if not halves:
        some = next(iter(tensors), "nothing")
        raise ModelError(f"no LoRA weights in it: {len(tensors)} tensors, none of a known name, such as `{some}`")
    scaled = set(alphas)
    krons, thin = _krons(halves, alphas)
    family = detect_family({**halves, **{place: _widths(kron) for place, kron in krons.items()}}, metadata)
    updates: dict[str, Pair | Kron] = {}
    notes: list[str] = []
    missing = cut = 0
    for place, found in halves.items():
        group = _group(place, family)
        parts: Mapping[str, Pair | Kron] = {}
        if place in krons:
            missing += place not in scaled and not {"w1", "w2"} <= found.keys()  # two whole factors need none
            parts = {} if group is None else _kron_parts(group, krons[place], thin.get(place), whole=whole)
            cut += any(isinstance(part, Pair) for part in parts.values())
        else:
            down, up = _both(place, found)
            alpha, stated = _alpha(place, alphas.pop(place, None), down, metadata)
            missing += not stated and place.dialect != "diffusers" and "emotrain.family" not in metadata
            parts = {} if group is None else _unfused(group, _checked(place, down, up, alpha))
        if group is None:
            unknown += [place.stem + suffix for suffix in place.suffixes(tensors)]
        for path, part in parts.items():
            updates[path] = part if path not in updates else _the_trained_one(path, updates[path], part)
    unknown += [f"{place.stem}.alpha" for place in alphas]
    if missing:
        notes.append(f"alpha is missing for {missing} of its modules: taken as their rank")
    if cut:
        notes.append(f"{cut} of its LoKrs lie across layers that are apart here: there they are LoRAs, exactly")
    _refuse_unmatched(unknown, len(updates), family, allow_partial)
    state = {key: value for path, part in updates.items() for key, value in part.named(path).items()}
    alphas_of = {path: part.alpha for path, part in updates.items()}
    return Parsed(state, alphas_of, family, _dialect(halves), tuple(notes), tuple(unknown))


def _the_trained_one(path: str, one: Pair | Kron, other: Pair | Kron) -> Pair | Kron:
    """Of two sets of weights, where one is still zero: LyCORIS writes untrained layers beside the joined one.

    Raises:
        ModelError: both do something.
    """
    trained = [update for update in (one, other) if all(bool(factor.any()) for factor in update.named("").values())]
    if len(trained) > 1:
        raise ModelError(f"two sets of weights for `{path}`")
    return trained[0] if trained else one


def refuse_other_networks(keys: Iterable[str]) -> None:
    """Raise a ModelError that names the kind of network, where it is one that cannot be applied as a LoRA."""
    for pattern, kind in _REFUSED:
        rule = re.compile(pattern)
        found = next((key for key in keys if rule.search(key)), None)
        if found is not None:
            raise ModelError(f"it is {kind}, which is not supported: `{found}`", "only plain LoRA files can be used")


def _sorted_by_place(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[Place, dict[str, Tensor]], dict[Place, Tensor], list[str]]:
    halves: dict[Place, dict[str, Tensor]] = {}
    alphas: dict[Place, Tensor] = {}
    unknown: list[str] = []
    for key, value in tensors.items():
        role = next(((suffix, role) for suffix, role in _ROLES if key.endswith(suffix)), None)
        place = None if role is None else _place(key.removesuffix(role[0]), old=role[0].startswith("_lora"))
        if role is None or place is None:
            unknown.append(key)
        elif role[1] == "alpha":
            alphas[place] = value
        elif role[1] in halves.setdefault(place, {}):
            raise ModelError(f"two sets of weights for `{place.stem}`")
        else:
            halves[place][role[1]] = value
    return halves, alphas, unknown


def _place(stem: str, *, old: bool) -> Place | None:
    path = stem
    for raw in ("base_model.model.", "transformer.base_model.model.", "unet.base_model.model."):
        path = path.removeprefix(raw)
    peft = path != stem
    known = next((row for row in _PREFIXES if path.startswith(row[0])), None)
    if known is None and "." not in path:
        return None
    prefix, part, dialect, underscores = known or ("", "", "peft" if peft else "diffusers", False)
    path = path.removeprefix(prefix)
    path = dotted(path) if underscores else path
    if old:
        path = path.replace(".processor.", ".")
        head, _, last = path.rpartition(".")
        path = f"{head}.{_OLD_PROJECTIONS[last]}" if part and last in _OLD_PROJECTIONS else path
    if not part and path.endswith(".to_out") and not path.startswith("single_transformer_blocks."):
        path = f"{path}.0"  # older diffusers left the number out
    return Place(part, names.local(path, part) if part else path, stem, dialect)


def _group(place: Place, family: str) -> Group | None:
    """The canonical modules of a place; None where the family has no such module."""
    if place.part:
        known = re.fullmatch(
            r"text_model\.(?:encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]))", place.path
        )
        return Group(place.path, (f"{place.part}.{place.path}",)) if known else None
    prefix = part_of(family)
    facts = FAMILIES[family].lora
    group = facts.originals.from_original(place.path)
    if group is not None:
        return Group(group.name, tuple(f"{prefix}.{part}" for part in group.parts), group.swaps)
    return Group(place.path, (f"{prefix}.{place.path}",)) if place.path.startswith(facts.heads) else None


def _alpha(place: Place, value: Tensor | None, down: Tensor, metadata: Mapping[str, str]) -> tuple[float, bool]:
    if value is None:
        stated = peft_alpha(metadata, place, int(down.shape[0])) if place.dialect == "diffusers" else None
        return (float(down.shape[0]), False) if stated is None else (stated, True)
    alpha = _number(value)
    if not 0.0 < alpha < float("inf"):
        raise ModelError(f"alpha of `{place.stem}` is {alpha}")
    return alpha, True


def _number(value: Tensor) -> float:
    return float(value.to(torch.float32).flatten()[0]) if value.numel() == 1 else float("nan")


def _checked(place: Place, down: Tensor, up: Tensor, alpha: float) -> Pair:
    names.modules({place.stem + names.DOWN: down, place.stem + names.UP: up})
    return Pair(down, up, alpha)


def _unfused(group: Group, pair: Pair) -> dict[str, Pair]:
    if len(group.parts) == 1:
        if group.swaps and halves_swap(group.name, pair.down.shape[1], pair.up.shape[0]):
            pair = Pair(pair.down, swap_halves(pair.up), pair.alpha)
        return {group.parts[0]: pair}
    parts = zip(group.parts, split(pair, _rows(group, pair.up.shape[0], pair.down.shape[1])), strict=True)
    return {path: part for path, part in parts if part is not None}


def _rows(group: Group, rows: int, width: int) -> list[int]:
    """Output rows of each part of a joined layer; keys and values have fewer heads than queries in some models."""
    count = len(group.parts)
    widths = [width, width, width, rows - 3 * width] if count == 4 else [rows // count] * count
    if count == 3 and rows < 3 * width:
        widths = [width, (rows - width) // 2, (rows - width) // 2]
    if min(widths) <= 0 or sum(widths) != rows:
        raise ModelError(f"`{group.name}` has {rows} output rows for an input of {width}")
    return widths


def _both(place: Place, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    down, up = found.get("down"), found.get("up")
    if down is None or up is None:
        raise ModelError(f"`{place.stem}` has only one half: {'up' if down is None else 'down'} is there alone")
    return down, up


def _krons(
    halves: Mapping[Place, Mapping[str, Tensor]], alphas: dict[Place, Tensor]
) -> tuple[dict[Place, Kron], dict[Place, tuple[Tensor, Tensor]]]:
    """The LoKrs of a file, and the LoRAs (A, B) that some are exactly; their alphas are taken out of `alphas`."""
    made, thin = {}, {}
    for place, found in halves.items():
        kinds = {"LoRA" if role in ("down", "up") else "LoKr" for role in found}
        if len(kinds) > 1:
            raise ModelError(f"`{place.stem}` is a LoRA and a LoKr at once")
        if kinds == {"LoKr"}:
            value = alphas.pop(place, None)
            alpha = None if value is None else _number(value)
            made[place] = from_file(place.stem, found, alpha)
            if (pair := as_lora(found, alpha)) is not None:
                thin[place] = pair
    return made, thin


def _widths(kron: Kron) -> dict[str, Tensor]:
    """A LoRA of the LoKr's widths, without numbers: by these families are told apart."""
    out, inner, *kernel = kron.shape
    return {
        "down": torch.empty((1, inner, *kernel), device="meta"),
        "up": torch.empty((out, 1, *(1 for _ in kernel)), device="meta"),
    }


def _kron_parts(
    group: Group, kron: Kron, thin: tuple[Tensor, Tensor] | None, *, whole: bool
) -> Mapping[str, Pair | Kron]:
    """The updates of a place: of a joined layer those of its parts, LoKrs where no cut goes through a block.

    Args:
        group: of the place.
        kron: its LoKr.
        thin: A and B of the LoRA that it is exactly.
        whole: take parts that are neither for whole matrices.

    Raises:
        ModelError: a cut goes through a block, and it is no LoRA.
    """
    out, inner, *_ = kron.shape
    swaps = len(group.parts) == 1 and group.swaps and halves_swap(group.name, inner, out)
    counts = [out // 2] * 2 if swaps else [out] if len(group.parts) == 1 else _rows(group, out, inner)
    parts = kron.rows(counts)
    if parts is None and thin is not None and 2 * len(thin[0]) <= min(inner, *counts):
        return _unfused(group, Pair(*thin, float(len(thin[0]))))
    if parts is None and whole:
        unit = torch.ones(1, 1)
        parts = [Kron(unit, rows.contiguous()) for rows in torch.split(kron.dense(), counts)]
    if parts is None:
        into = "halves that are the other way round here" if swaps else f"{len(group.parts)} layers that are apart here"
        raise ModelError(
            f"`{group.name}` is a LoKr in blocks of {kron.w2.shape[0]} rows across {into}, which cut through a block",
            "`emotrain lora merge FILE --rank 64 -o lora.safetensors` makes the nearest LoRA of it, and says its error",
        )
    if swaps:
        first, second = parts
        parts = [kron.halves_swapped() or Kron(first.w1, torch.cat([second.w2, first.w2]))]
    return {path: _as_convolution(path, part) for path, part in zip(group.parts, parts, strict=True)}


def _as_convolution(path: str, kron: Kron) -> Kron:
    """With the kernel of a 3x3 convolution, which a w2 of two factors comes without."""
    b, inputs = kron.w2.shape[:2]
    if kron.w2.ndim == 4 or not _WIDE.search(path) or inputs % 9:
        return kron
    return Kron(kron.w1, kron.w2.reshape(b, inputs // 9, 3, 3))


def _refuse_unmatched(unknown: list[str], matched: int, family: str, allow_partial: bool) -> None:
    if matched == 0:
        raise ModelError(f"none of its weights belong to a {family} model, such as `{unknown[0]}`")
    if unknown and not allow_partial:
        keys = [f"`{key}`" for key in sorted(unknown)]
        raise ModelError(f"{len(unknown)} of its keys belong to no module of {family}: {listed(keys, 8)}")


def _dialect(halves: Mapping[Place, object]) -> str:
    found = [place.dialect for place in halves]
    return max(sorted(set(found)), key=found.count)
