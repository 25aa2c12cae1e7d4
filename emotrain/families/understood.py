"""Whether every tensor of a single checkpoint file is one that emotrain knows what to do with (no torch).

Libraries take what they recognise and leave the rest out without a word: another model that shares some names, an
edit model with wider inputs, or weights in a quantised form would be trained as something that they are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emotrain.errors import ModelError
from emotrain.families.headers import Header, own_name
from emotrain.families.registry import FAMILIES

# Other models that share names with those that are trained here, by a tensor that they alone have.
OTHERS = {
    "pipe.": "a model of another kind",
}
QUANTISED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|qweight|qzeros|lut|svd\w*|comfy_quant)$"
)
SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale")
PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.", "model_ema.")
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
    for sign, kind in OTHERS.items():
        if any(name.startswith(sign) for name in names):
            raise ModelError(
                f"`{path}` is {kind}, which emotrain does not train (it has tensors named `{sign}...`)",
                f"train on {', '.join(spec.title for spec in FAMILIES.values())}",
            )
    refuse_quantised(path, header)
    if any(name.startswith(("edm_mean", "edm_std", "edm_vpred")) for name in names):
        raise ModelError(
            f"`{path}` predicts as EDM models do, which emotrain does not train",
            "train on the epsilon or v-prediction version of the model",
        )
    facts = FAMILIES[family].file
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
    if found is None:
        found = next((name for name, dtype in header.dtypes.items() if dtype in ("U8", "I8")), None)
    if found is not None:
        raise ModelError(
            f"`{path}` holds weights in a quantised form that emotrain does not read (`{found}`)",
            "use the bf16, fp16 or plain fp8 file, and `model.quantize` to quantise it while training",
        )


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
