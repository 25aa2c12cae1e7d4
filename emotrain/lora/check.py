"""A saved file held against the live weights: as we read it, and as diffusers does on a stand-in without weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers.loaders
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils.peft_utils import get_peft_kwargs
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from emotrain.errors import ModelError
from emotrain.families.registry import FAMILIES
from emotrain.lora import names
from emotrain.lora.file import LoraFile, canonical, read_lora
from emotrain.lora.formats import updates
from emotrain.lora.fused import Pair
from emotrain.lora.kron import Kron, krons
from emotrain.lora.targets import part_of

# of ||seen - live|| / ||live||: the rounding of A and of B, with room for subnormal numbers
_TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 2e-2}

Weights = tuple[Mapping[str, Tensor], Mapping[str, float]]


def self_check(path: Path | str, adapter_state: Mapping[str, Tensor], alphas: Mapping[str, float], family: str) -> None:
    """Read a saved file back, by our own reader and by diffusers', and hold every module against the live weights.

    Both must have exactly the live modules, and alpha / rank B A of each within the rounding of the file's dtype.

    Args:
        path: the file.
        adapter_state: the live weights, canonical or plain names.
        alphas: the live alphas.
        family: the family it was saved for.

    Raises:
        ModelError: the file says something else than the live weights.
    """
    path = Path(path)
    state, own_alphas = canonical(adapter_state, alphas, family)
    lora = read_lora(path)
    if lora.family != family:
        raise ModelError(f"{path}: it reads as a LoRA for {lora.family}, it was saved for {family}")
    compare(path, "read back", (state, own_alphas), (lora.state, lora.alphas), lora.dtype)
    seen = read_as_diffusers(path, lora)
    if seen is not None:
        compare(path, "in diffusers", (state, own_alphas), seen, lora.dtype)


def compare(path: Path, how: str, live: Weights, seen: Weights, dtype: str) -> None:
    """Hold every module's alpha / rank B A of a file against the live one.

    Raises:
        ModelError: modules are missing or too many, or one differs by more than the dtype's rounding.
    """
    ours, theirs = updates(*live), updates(*seen)
    theirs = {name: update for name, update in theirs.items() if name in ours or _does_something(update)}
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ModelError(f"{path}: {how}, {len(odd)} of {len(ours)} modules are missing or too many, first `{odd[0]}`")
    for name, update in ours.items():
        size, error = _difference(update, theirs[name])
        if error > _TOLERANCE.get(dtype, 1e-5) * size + 1e-12:
            raise ModelError(
                f"{path}: {how}, `{name}` differs from the trained weights by {error / max(size, 1e-30):.1e}"
            )


def _does_something(update: Pair | Kron) -> bool:
    return bool((update.up if isinstance(update, Pair) else update.w2).any())


def _difference(update: Pair | Kron, other: Pair | Kron) -> tuple[float, float]:
    """Norm of an update, and of its difference to another of its kind."""
    if isinstance(update, Pair) and isinstance(other, Pair):
        return distance((update.down, update.up * update.strength), (other.down, other.up * other.strength))
    if isinstance(update, Kron) and isinstance(other, Kron):
        return update.norm, update.distance(other)
    return 0.0, float("inf")


def distance(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(||B A||, ||B A - B' A'||) in the Frobenius norm, by QR of the thin factors: no full matrix is made."""
    down, up = (t.to(torch.float64).flatten(1) for t in ours)
    other_down, other_up = (t.to(torch.float64).flatten(1) for t in theirs)
    if down.shape[1] != other_down.shape[1] or up.shape[0] != other_up.shape[0]:
        return float(_norm(down, up)), float("inf")
    difference = _norm(torch.cat([down, other_down]), torch.cat([up, -other_up], dim=1))
    return float(_norm(down, up)), float(difference)


def read_as_diffusers(path: Path, lora: LoraFile) -> Weights | None:
    """State and alphas as diffusers applies them, canonical names; None where it cannot read the layout (kohya's SD3).

    Raises:
        ModelError: diffusers refuses the file.
    """
    facts = FAMILIES[lora.family].lora
    if lora.format in facts.unread_layouts or (krons(lora.state) and lora.format not in facts.lokr_layouts):
        return None
    fixed = facts.loader == "FluxLoraLoaderMixin" and lora.format == "kohya"
    if fixed and not _has_real_width(lora):
        return None  # its converter knows the real width only
    try:
        with _quiet():
            converted, alphas, metadata = _state_dict(path, lora)
            parts = {part: _part(part, converted, alphas, metadata, lora) for part in lora.parts}
    except (ValueError, KeyError, RuntimeError, TypeError, AssertionError) as error:
        raise ModelError(f"{path}: diffusers cannot read it ({' '.join(str(error).split())[:160]})") from error
    state = {key: value for own, _ in parts.values() for key, value in own.items()}
    return state, {key: value for _, own in parts.values() for key, value in own.items()}


def _state_dict(path: Path, lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, Any] | None, Any]:
    facts = FAMILIES[lora.family].lora
    loader = getattr(diffusers.loaders.lora_pipeline, facts.loader)
    options: dict[str, Any] = {"return_alphas": True} if facts.loader_alphas == "asked" else {}
    if lora.family == "sdxl":
        options["unet_config"] = _Layers()
    read = loader.lora_state_dict(str(path), return_lora_metadata=True, local_files_only=True, **options)
    return (read[0], None, read[1]) if facts.loader_alphas == "never" else read


class _Layers:
    layers_per_block = 2


def _part(
    part: str, state: dict[str, Tensor], alphas: dict[str, Any] | None, metadata: Any, lora: LoraFile
) -> tuple[dict[str, Tensor], dict[str, float]]:
    if part != part_of(lora.family):
        return _text_part(part, state, alphas, metadata)
    own, _ = lora.of_part(part)
    shapes = {path: (up.shape[0], *down.shape[1:]) for path, (down, up) in names.modules(own).items()}
    model = _StandIn({**shapes, **{path: kron.shape for path, kron in krons(own).items()}}, part)
    PeftAdapterMixin.load_lora_adapter(
        model,
        state,
        prefix=part,
        network_alphas=alphas,
        metadata=metadata,
        adapter_name="check",
        low_cpu_mem_usage=True,
    )
    seen: dict[str, Tensor] = {}
    strengths: dict[str, float] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoKrLayer) and "check" in layer.lokr_w1:
            name = names.canonical(path, part)
            seen[name + names.W1] = layer.lokr_w1["check"].detach() * float(layer.scaling["check"])
            seen[name + names.W2] = layer.lokr_w2["check"].detach()
            strengths[name] = 1.0
        if isinstance(layer, LoraLayer) and "check" in layer.lora_A:
            name = names.canonical(path, part)
            seen[name + names.DOWN] = layer.lora_A["check"].weight.detach()
            seen[name + names.UP] = layer.lora_B["check"].weight.detach()
            strengths[name] = float(layer.scaling["check"]) * int(layer.lora_A["check"].weight.shape[0])
    return seen, strengths


def _text_part(
    part: str, state: dict[str, Tensor], alphas: dict[str, Any] | None, metadata: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """As diffusers' loader of text encoders prepares it: converted names, and peft's settings from ranks and alphas."""
    own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
    own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    ranks = {key: int(value.shape[1]) for key, value in own.items() if key.endswith(names.UP)}
    prefixed = {k.removeprefix(f"{part}."): v for k, v in (alphas or {}).items() if k.split(".")[0] == part}
    if metadata is not None:
        settings = {k.removeprefix(f"{part}."): v for k, v in metadata.items() if k.startswith(f"{part}.")}
    else:
        settings = get_peft_kwargs(ranks, prefixed, own, is_unet=False)
    strengths = {}
    for key, rank in ranks.items():
        path = key.removesuffix(names.UP)
        used = (settings.get("rank_pattern") or {}).get(path, settings["r"])
        alpha = (settings.get("alpha_pattern") or {}).get(path, settings["lora_alpha"])
        strengths[names.canonical(path, part)] = alpha / used * rank
    return {names.canonical(key, part): value for key, value in own.items()}, strengths


class _StandIn(nn.Module, PeftAdapterMixin):  # type: ignore[misc]
    """A model that has the paths and shapes (out, in, ...) of a LoRA's modules and no weights."""

    def __init__(self, modules: Mapping[str, tuple[int, ...]], part: str) -> None:
        super().__init__()
        with torch.device("meta"):
            for path, shape in modules.items():
                holder: nn.Module = self
                *parents, last = path.removeprefix(f"{part}.").split(".")
                for name in parents:
                    if name not in holder._modules:
                        holder.add_module(name, nn.Module())
                    holder = holder._modules[name]  # type: ignore[assignment]
                holder.add_module(last, _layer(shape))


def _layer(shape: tuple[int, ...]) -> nn.Module:
    layer: nn.Module
    if len(shape) == 4:
        layer = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    else:
        layer = nn.Linear(shape[1], shape[0], bias=False)
    nothing = torch.zeros((), device="cpu").expand(shape)  # peft moves the LoRA to the device of this
    layer.weight = nn.Parameter(nothing, requires_grad=False)
    return layer


def _has_real_width(lora: LoraFile) -> bool:
    return all(
        lora.state[name + names.DOWN].shape[1] == 3072
        for name in lora.alphas
        if name.endswith((".attn.to_q", ".proj_mlp")) and name + names.DOWN in lora.state
    )


def norm_of(down: Tensor, up: Tensor) -> Tensor:
    """||B A|| in the Frobenius norm."""
    return _norm(down.to(torch.float64).flatten(1), up.to(torch.float64).flatten(1))


def _norm(down: Tensor, up: Tensor) -> Tensor:
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        return torch.tensor(float("inf"))
    size: Tensor = torch.linalg.matrix_norm(torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T)
    return size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The loader's remarks about what is not in the file are of no use here."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
