"""LoRA files: written so that every reader applies them at the trained strength, read with distrust, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emotrain.errors import ModelError, UnwritableWeightsError
from emotrain.files import sha256_of
from emotrain.lora import container, names
from emotrain.lora.dialects import parse, refuse_other_networks
from emotrain.lora.formats import Layout, layout_of, to_layout
from emotrain.lora.metadata import with_hashes
from emotrain.lora.targets import part_of

BUNDLED = "bundle_emb."  # embeddings of words that trainers put into the file of the LoRA that needs them
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA read from a file, in the canonical layout and in float32."""

    path: Path  # where it was
    # "<part>.<diffusers path>.lora_A.weight" [rank, in, ...], ".lora_B.weight" [out, rank, ...]; of a LoKr ".lokr_w1"
    # and ".lokr_w2"
    state: dict[str, Tensor]
    alphas: dict[str, float]  # "<part>.<diffusers path>" -> alpha; strength is alpha / rank, and 1 of a LoKr
    family: str  # a name of `emotrain.families.registry.FAMILIES`
    format: str  # kohya, diffusers, comfyui, onetrainer, lycoris or peft
    dtype: str  # of the stored weights: fp16, bf16, fp32, fp64, fp8, or "mixed"
    metadata: dict[str, str]  # the header's strings
    sha256: str  # of the file
    notes: tuple[str, ...] = ()  # what was assumed, one line each
    ignored: tuple[str, ...] = ()  # keys that no module belongs to; only where `allow_partial` let them pass
    embeddings: tuple[str, ...] = ()  # words whose embeddings lie in the file too; they are left out

    @property
    def left_out(self) -> str | None:
        """What the file holds and nobody applies here, in one line."""
        if not self.embeddings:
            return None
        words = ", ".join(f"`{word}`" for word in self.embeddings[:10])
        return f"{self.path} holds embeddings of {words} too, which are left out"

    @property
    def is_lokr(self) -> bool:
        """Whether LoKrs are in it."""
        return any(key.endswith(names.W1) for key in self.state)

    def refuse_mixture(self) -> None:
        """Raise a ModelError where LoKrs and LoRAs are in it: one adapter is trained, of one kind."""
        products = sum(key.endswith(names.W1) for key in self.state)
        if 0 < products < len(self.alphas):
            raise ModelError(
                f"{self.path}: {products} of its {len(self.alphas)} modules are LoKr and the others LoRA, which cannot "
                "be trained on together",
                "stack it under a new LoRA, or merge it into one",
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts it has weights for: unet or transformer, text_encoder, text_encoder_2."""
        return tuple(dict.fromkeys(key.split(".", 1)[0] for key in self.alphas))

    def of_part(self, part: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        """State and alphas of one part."""
        return (
            {key: value for key, value in self.state.items() if key.startswith(f"{part}.")},
            {key: value for key, value in self.alphas.items() if key.startswith(f"{part}.")},
        )


def save_lora(
    path: Path | str,
    state: Mapping[str, Tensor],
    *,
    alphas: Mapping[str, float],
    family: str,
    format: str = "auto",
    dtype: str = "fp16",
    metadata: Mapping[str, str],
) -> str:
    """Write a LoRA file: as a whole or not at all, and the same bytes for the same input.

    Args:
        path: the .safetensors file; one that is there is replaced.
        state: canonical names, or plain ones of the denoiser ("<module path>.lora_A.weight").
        alphas: alpha per module path, canonical or plain.
        family: a name of `emotrain.families.registry.FAMILIES`.
        format: auto, kohya, diffusers or comfyui.
        dtype: fp16, bf16 or fp32.
        metadata: strings; `build_metadata` makes them. The hashes of the weights are added here.

    Returns:
        sha256 of the file.

    Raises:
        UnwritableWeightsError: weights that are not finite, before or after rounding.
        ModelError: a module that the format has no name for.
        ResourceError: the disk is full.
    """
    tensors = file_tensors(state, alphas=alphas, family=family, layout=layout_of(family, format), dtype=dtype)
    return container.write(Path(path), tensors, with_hashes(tensors, {**metadata, "emotrain.family": family}))


def file_tensors(
    state: Mapping[str, Tensor], *, alphas: Mapping[str, float], family: str, layout: Layout, dtype: str
) -> dict[str, Tensor]:
    """The tensors of a file: names of the layout, rounded to the dtype, finite.

    Raises:
        ModelError: as `save_lora`.
    """
    own, own_alphas = canonical(state, alphas, family)
    bad = next((key for key, value in own.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise UnwritableWeightsError(f"`{bad}` has numbers that are not finite: no file is written")
    balanced = _balanced(own) if dtype == "fp16" else own
    tensors = {
        key: rounded(key, value, DTYPES[dtype])
        for key, value in to_layout(balanced, own_alphas, family, layout).items()
    }
    bad = next((key for key, value in tensors.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise UnwritableWeightsError(f"`{bad}` is too large for {dtype}", "save.dtype: fp32 or bf16 can hold it")
    return tensors


def canonical(
    state: Mapping[str, Tensor], alphas: Mapping[str, float], family: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """State in float32 and alphas under canonical names; plain names are the denoiser's."""
    part = part_of(family)
    return (
        {names.canonical(key, part): value.detach().to("cpu", torch.float32) for key, value in state.items()},
        {names.canonical(key, part): float(value) for key, value in alphas.items()},
    )


def read_lora(path: Path | str, *, allow_partial: bool = False, whole: bool = False) -> LoraFile:
    """Read anyone's LoRA file.

    Args:
        path: a .safetensors file.
        allow_partial: let keys pass that belong to no module of the family; they are listed in `ignored`.
        whole: see `dialects.parse`: such a file is large in memory.

    Raises:
        ModelError: missing, not safetensors, damaged, another kind of network, of no known family, or with weights that
            are not finite, not paired, or left over.
    """
    path = Path(path)
    entries, _ = container.read_header(path)
    try:
        refuse_other_networks([key for key in entries if not key.startswith(BUNDLED)])
        tensors, metadata = container.read(path)
        bundled = [key for key in tensors if key.startswith(BUNDLED)]
        for key in bundled:
            del tensors[key]
        wide = {key: value.to(torch.float32) for key, value in tensors.items()}
        weights = ((key, value) for key, value in wide.items() if not key.endswith(".alpha"))
        bad = next((key for key, value in weights if not torch.isfinite(value).all()), None)
        if bad is not None:
            raise ModelError(f"`{bad}` has numbers that are not finite")
        parsed = parse(wide, metadata, allow_partial=allow_partial, whole=whole)
    except ModelError as error:
        message = error.message if error.message.startswith(str(path)) else f"{path}: {error.message}"
        raise ModelError(message, error.hint) from error
    return LoraFile(
        path, parsed.state, parsed.alphas, parsed.family, parsed.dialect, _dtype_name(tensors), metadata,
        sha256_of(path), parsed.notes, parsed.ignored,
        tuple(dict.fromkeys(key.removeprefix(BUNDLED).split(".")[0][:60] for key in bundled)),
    )  # fmt: skip


def _balanced(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shift powers of two from A to B where B is so small that float16 would lose it; B A stays exactly the same.

    The same from w1 to w2 of a LoKr.
    """
    balanced = dict(state)
    for first, second in ((names.DOWN, names.UP), (names.W1, names.W2)):
        for path in [key.removesuffix(first) for key in state if key.endswith(first)]:
            large, small = state[path + first], state[path + second]
            high, low = float(large.abs().max()), float(small.abs().max())
            if 0.0 < low < 2.0**-9 < high:
                shift = round(0.5 * math.log2(high / low))
                balanced[path + first] = large * 2.0**-shift
                balanced[path + second] = small * 2.0**shift
    return balanced


def rounded(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the file's dtype; an alpha that the dtype cannot hold stays float32, or the strength would change."""
    stored = value.to(dtype).contiguous()
    return value.to(torch.float32) if key.endswith(".alpha") and float(stored) != float(value) else stored


def _dtype_name(tensors: Mapping[str, Tensor]) -> str:
    found = {value.dtype for key, value in tensors.items() if not key.endswith(".alpha")}
    if len(found) != 1:
        return "mixed"
    dtype = found.pop()
    known = {**{v: k for k, v in DTYPES.items()}, torch.float64: "fp64"}
    return known.get(dtype, "fp8")
