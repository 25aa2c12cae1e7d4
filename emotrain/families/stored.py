"""Files whose weights are 8-bit numbers, plain fp8 or times a scale, as ComfyUI's `*_fp8_scaled` and `*_int8`.

A denoiser, and a T5 or language model in a file of its own or in a checkpoint, keep the large Linear layers as they are
stored (`quantize.RoundedLinear`): to the bit the weights that the numbers stand for, in half the memory. Whatever else
has scales is multiplied by them while it is read: small layers, convolutions and tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from emotrain.families.headers import Header, own_name, read_header
from emotrain.families.quantize import RoundedLinear, is_large, put, rotated
from emotrain.families.registry import FAMILIES
from emotrain.families.sniff import Sniffed
from emotrain.families.spec import TextEncoder
from emotrain.families.understood import PARTS, STATED, quantised_layers, scaled_layers

PLAIN = ("F8_E4M3", "F8_E5M2")
TABLES = ("embed_tokens.weight", "shared.weight")  # of a text encoder's words: no Linear layers


@dataclass(frozen=True)
class Scaled:
    """A weight as stored."""

    numbers: Tensor  # int8 or float8 [out, in...]
    scale: Tensor  # one for all, or one a row
    group: int = 0  # inputs that were rotated together; 0 where none were

    def rows(self) -> Tensor:
        """The scale of each number: float32 in the shape of the numbers, without memory of its own."""
        scale = self.scale.float()
        beside = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *[1] * (self.numbers.ndim - 1))
        return beside.expand(self.numbers.shape)

    def groups(self) -> Tensor:
        """The group of each number, likewise."""
        return torch.tensor(float(self.group)).expand(self.numbers.shape)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The weight that is meant."""
        weight = self.numbers.float() * self.rows()
        return (rotated(weight, self.group) if self.group else weight).to(dtype)


def read_weights(path: Path, prefixes: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, Scaled]]:
    """The tensors of a file's model: those that are what they are, and those that are stored with a scale.

    Matrices in plain fp8 have a scale of 1.

    Args:
        path: of the file.
        prefixes: with which a part of a checkpoint may begin; none: the file's own model, without its other parts.
    """
    header = read_header(path)
    names = _names(header, prefixes)
    scales = scaled_layers(header)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in names}
    forms = quantised_layers(path, header) if scales else {}
    scaled = {name: Scaled(tensors[name], torch.ones(())) for name in _plain_matrices(header, scales, names)}
    for name in names & scales.keys():
        form = forms.get(name.removesuffix(".weight"))
        scaled[name] = Scaled(tensors[name], tensors[scales[name]], form.group if form is not None else 0)
    plain = {name: value for name, value in tensors.items() if name not in scaled and not name.endswith(STATED)}
    return plain, scaled


def _names(header: Header, prefixes: tuple[str, ...]) -> set[str]:
    """Tensors of one of a file's models."""
    return {name for name in header.shapes if (name.startswith(prefixes) if prefixes else not name.startswith(PARTS))}


def _plain_matrices(header: Header, scales: Mapping[str, str], names: set[str]) -> list[str]:
    """Large matrices in fp8 without a scale."""
    found = [name for name in names if header.dtypes[name] in PLAIN and name not in scales and name.endswith(".weight")]
    return [name for name in found if len(header.shapes[name]) == 2 and is_large(header.shapes[name])]


def build_stored(
    cls: Any, config: Mapping[str, Any], plain: Mapping[str, Tensor], scaled: Mapping[str, Scaled], dtype: torch.dtype
) -> nn.Module:
    """A denoiser of diffusers with the large Linear layers as they are stored, all else in `dtype`.

    Args:
        cls: its class.
        config: its config.
        plain: the file's tensors without a scale, by their original names.
        scaled: those with one.
        dtype: of what is not kept as stored, and of what the kept numbers stand for.

    Raises:
        Exception: of diffusers or torch, where tensors do not fit the config.
    """
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    with init_empty_weights():
        model: nn.Module = cls.from_config(dict(config))
    nn.Module.to(model, dtype)  # as diffusers does: tables too
    convert = partial(SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"], config=dict(config))
    # New names and pieces come about by the same way for the numbers and for what is said of each number.
    numbers, rows, groups = (
        convert(checkpoint={**plain, **{name: part(weight) for name, weight in scaled.items()}})
        for part in (lambda weight: weight.numbers, Scaled.rows, Scaled.groups)
    )
    state = {}
    for name, value in numbers.items():
        if value.dtype == rows[name].dtype:
            state[name] = value.to(dtype)
        else:
            weight = Scaled(value, rows[name].reshape(len(value), -1)[:, 0], int(groups[name].flatten()[0]))
            if not _keep(model, name, weight, dtype):
                state[name] = weight.plain(dtype)
    model.load_state_dict(state, strict=False, assign=True)
    return model.requires_grad_(False).eval()


def load_stored(model: nn.Module, tensors: Mapping[str, Tensor | Scaled], dtype: torch.dtype) -> None:
    """Fill a model on the meta device with a file's tensors, its large Linear layers as they are stored.

    Args:
        model: of transformers.
        tensors: by the model's names.
        dtype: of what is not kept as stored, and of what the kept numbers stand for.

    Raises:
        ValueError: a tensor of another shape, or one that the model does not have.
    """
    # As transformers loads it: what a T5 adds to its tokens overflows float16.
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    state = {}
    for name, value in tensors.items():
        own = dtype if wide.isdisjoint(name.split(".")) else torch.float32
        if not isinstance(value, Scaled):
            state[name] = value.to(own)
        elif not _keep(model, name, value, own):
            state[name] = value.plain(own)
    if left_over := model.load_state_dict(state, strict=False, assign=True).unexpected_keys:
        raise ValueError(f"`{left_over[0]}` is no tensor of it")


def _keep(model: nn.Module, name: str, weight: Scaled, dtype: torch.dtype) -> bool:
    """Put stored numbers into the model as they are, where they are a large Linear's."""
    numbers = weight.numbers
    path, _, last = name.rpartition(".")
    above, _, own = path.rpartition(".")
    parent = model.get_submodule(above)
    layer = getattr(parent, own, None)
    if last != "weight" or type(layer) is not nn.Linear or not is_large(numbers.shape):
        return False
    if layer.weight.shape != numbers.shape:
        raise ValueError(f"`{name}` has {tuple(numbers.shape)}, and the config {tuple(layer.weight.shape)}")
    put(parent, own, RoundedLinear.from_scaled(numbers, weight.rows()[:, :1], layer.bias, dtype, weight.group))
    return True


def stored_parameters(found: Sniffed, given: str | None = None) -> dict[str, int]:
    """How many parameters stay in one byte, as a model's file has them: of its denoiser ("") and each text encoder.

    Args:
        found: the model.
        given: `model.text_encoder`; None: there is none, or it lies in the model's file.

    Raises:
        ModelError: a file cannot be read.
    """
    path = Path(found.path)
    here = found.kind == "file" and path.is_file()  # there may be no file
    kept = {part: _numbers(path, names) for part, names in kept_parts(found, read_header(path)).items()} if here else {}
    if given is not None and Path(given).is_file():
        text = FAMILIES[found.family].encoders_of(found.variant)[0]
        kept[text.name] = _numbers(Path(given), kept_names(read_header(Path(given))))
    return kept


def _numbers(path: Path, names: set[str]) -> int:
    header = read_header(path)
    return sum(math.prod(header.shapes[name]) for name in names)


def encoders_inside(found: Sniffed) -> list[TextEncoder]:
    """A checkpoint's text encoders that are read from its file and never trained."""
    encoders = FAMILIES[found.family].encoders_of(found.variant)
    return [one for one in encoders if found.kind == "file" and one.quantizable and one.name not in found.missing]


def kept_parts(found: Sniffed, header: Header) -> dict[str, set[str]]:
    """Weights of a model's file that stay as they are stored: of its denoiser ("") and of each text encoder in it."""
    encoders = FAMILIES[found.family].encoders_of(found.variant)
    apart = tuple(prefix for one in encoders for prefix in one.prefixes)  # adapters, which are widened
    own = {name for name in kept_names(header) if not own_name(name).startswith(apart)}
    return {"": own, **{one.name: kept_names(header, one.prefixes) for one in encoders_inside(found)}}


def kept_names(header: Header, prefixes: tuple[str, ...] = ()) -> set[str]:
    """Weights of a file that stay as they are stored: of large layers, with a scale or in plain fp8.

    `prefixes` as for `read_weights`.
    """
    scales, names = scaled_layers(header), _names(header, prefixes)
    large = {name for name in names & scales.keys() if len(header.shapes[name]) == 2 and is_large(header.shapes[name])}
    return {name for name in large.union(_plain_matrices(header, scales, names)) if not name.endswith(TABLES)}
