"""Whether every tensor of a single checkpoint file is one that emotrain knows what to do with (no torch).

Libraries take what they recognise and leave the rest out without a word: another model that shares some names, an
edit model with wider inputs, or weights in a quantised form would be trained as something that they are not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.errors import ModelError
from emotrain.families.headers import Header, own_name
from emotrain.families.registry import FAMILIES
from emotrain.families.spec import TEXTS_BEGIN, VAE_BEGINS
from emotrain.files import MAX_HEADER, header_at

QUANTISED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|qweight|qzeros|lut|svd\w*)$"
)
LAYER_FORM, MAX_FORM = "comfy_quant", 4096  # bytes of what a file says of one layer
TOKENIZERS = ("tekken_model", "spiece_model")  # which text encoders' files hold as bytes
FORMS = ("int8_tensorwise", "float8_e4m3fn", "float8_e5m2")  # whose weights are numbers times a scale
SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale")
STATED = (*SCALES, "scaled_fp8", LAYER_FORM)  # what stands beside the weights of a file with scales
PARTS = (*VAE_BEGINS, *TEXTS_BEGIN, "conditioner.", "model_ema.")
# Tables and settings of the programs that these files were trained with; they can be computed again.
TABLES = re.compile(
    r"(betas|alphas_cumprod|alphas_cumprod_prev|(sqrt|log|posterior)_\w+|logvar|lvlb_weights|scale_factor|global_step"
    r"|denoiser\.sigmas|v_pred|ztsnr|scaled_fp8|model_sampling\.\w+|loss\..*|cond_stage_key|embedding_manager\..*)"
)


def refuse_not_understood(path: Path, family: str, header: Header, config: Mapping[str, Any]) -> None:
    """Refuse a file with tensors that would be left out, or taken for what they are not.

    Args:
        path: for messages.
        family: what the file was taken for.
        header: of the file.
        config: of the denoiser, as it will be built.

    Raises:
        ModelError: another model, an edit model, a quantised form, EDM, or a tensor of no known place.
    """
    names = [own_name(name) for name in header.shapes]
    refuse_quantised(path, header)
    if any(name.startswith(("edm_mean", "edm_std", "edm_vpred")) for name in names):
        raise ModelError(
            f"`{path}` predicts as EDM models do, which emotrain does not train",
            "train on the epsilon or v-prediction version of the model",
        )
    facts = FAMILIES[family].file
    clips = [prefix for one in FAMILIES[family].text_encoders if one.kind == "clip" for prefix in one.prefixes]
    read = (*clips, *facts.vae_prefixes) if clips else ()
    if apart := next((name for name in scaled_layers(header) if name.startswith(read)), None):
        raise ModelError(
            f"`{path}` holds a CLIP or VAE in scaled fp8 (`{apart}`), which emotrain does not read",
            "use the model's bf16 or fp16 checkpoint; or a file of its denoiser alone, and the other parts as a "
            f"diffusers folder has them in `{path.with_suffix('')}`",
        )
    facts.check(path, {own_name(name): s for name, s in header.shapes.items()}, config)
    known = (*facts.heads, *PARTS)
    unknown = [name for name in names if not name.startswith(known) and not TABLES.fullmatch(name)]
    if unknown:
        raise ModelError(
            f"`{path}` has {len(unknown)} tensors that a {family} model does not have, such as `{unknown[0]}`",
            "is it a model of another kind, or an extension of one?",
        )


def refuse_quantised(path: Path, header: Header) -> None:
    """Refuse weights in a form that stands for others.

    Raises:
        ModelError: with the first such tensor.
    """
    found = next((name for name in header.shapes if QUANTISED.search(name)), None)
    layers = quantised_layers(path, header)
    if found is None:
        found = next((f"{name}: {form.name}" for name, form in layers.items() if form.name not in FORMS), None)
    if found is None:
        rows = {f"{name}.weight" for name in layers if f"{name}.weight_scale" in header.shapes}
        beside = (f".{LAYER_FORM}", *TOKENIZERS)
        whole = ((name, dtype) for name, dtype in header.dtypes.items() if not name.endswith(beside))
        found = next((name for name, dtype in whole if dtype == "U8" or (dtype == "I8" and name not in rows)), None)
    if found is None:
        scales = scaled_layers(header)
        found = next((name for name, scale in scales.items() if not _applies(name, scale, header, layers)), None)
    if found is not None:
        raise ModelError(
            f"`{path}` holds weights in a quantised form that emotrain does not read (`{found}`)",
            "use the bf16, fp16 or plain fp8 file, and `model.quantize` to quantise it while training",
        )


def _applies(weight: str, scale: str, header: Header, layers: Mapping[str, Form]) -> bool:
    """Whether a weight's scale is one for all or one a row, and its inputs can be rotated as is said."""
    shape = header.shapes[weight]
    form = layers.get(weight.removesuffix(".weight"))
    group = form.group if form is not None else 0
    rotates = group == 0 or (group in (4, 16, 64, 256, 1024) and len(shape) == 2 and shape[1] % group == 0)
    return rotates and math.prod(header.shapes[scale]) in (1, shape[0] if shape else 1)


@dataclass(frozen=True)
class Form:
    """How ComfyUI says that a layer's weights are stored."""

    name: str  # of the form
    group: int  # inputs that were rotated together before rounding (ConvRot); 0 where none were


def quantised_layers(path: Path, header: Header) -> dict[str, Form]:
    """Layers whose form ComfyUI's files state, beside the layer as JSON in bytes, or for all of them in the header.

    Raises:
        ModelError: the statement is not what ComfyUI writes.
    """
    try:
        stated = json.loads(header.metadata.get("_quantization_metadata", "{}")).get("layers", {})
        for name, text in _texts(path, [name for name in header.shapes if name.endswith(f".{LAYER_FORM}")]).items():
            stated[name.removesuffix(f".{LAYER_FORM}")] = json.loads(text)
        return {name: _form(words) for name, words in stated.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"`{path}` holds weights in a quantised form that it does not state as ComfyUI does",
            "use the bf16 or fp16 file",
        ) from error


def _form(words: Mapping[str, Any]) -> Form:
    inner = words.get("params")
    words = {**(inner if isinstance(inner, dict) else {}), **words}
    return Form(str(words["format"])[:40], int(words.get("convrot_groupsize", 256)) if words.get("convrot") else 0)


def _texts(path: Path, names: list[str]) -> dict[str, bytes]:
    """The bytes of small tensors."""
    if not names:
        return {}
    with path.open("rb") as file:
        entries, _ = header_at(file, path.stat().st_size, MAX_HEADER)
        file.seek(0)
        start = 8 + int.from_bytes(file.read(8), "little")
        found = {}
        for name in names:
            begin, end = entries[name]["data_offsets"]
            file.seek(start + begin)
            found[name] = file.read(min(end - begin, MAX_FORM))
    return found


def scaled_layers(header: Header) -> dict[str, str]:
    """Weights that are stored with a scale beside them: weight -> the scale's name.

    Two spellings are in use: `x.scale_weight` and `x.weight_scale` beside `x.weight`.
    """
    found = {}
    for name in header.shapes:
        stem, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale") and f"{stem}.weight" in header.shapes:
            found[f"{stem}.weight"] = name
    return found
