"""Whether every tensor of a single checkpoint file is one that emotrain knows what to do with (no torch).

Libraries take what they recognise and leave the rest out without a word: another model that shares some names, an
edit model with wider inputs, or weights in a quantised form would be trained as something that they are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from emotrain.errors import ModelError
from emotrain.families.headers import Header

# Other models that share names with those that are trained here, by a tensor that they alone have.
OTHERS = {
    "distilled_guidance_layer.": "Chroma",
    "double_stream_modulation_img.": "FLUX.2",
    "txtfusion.": "Krea 2",
    "cap_embedder.": "Lumina or Z-Image",
    "llm_adapter.": "Anima",
    "pipe.": "a model of another kind",
}
QUANTISED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|qweight|qzeros|lut|svd\w*|comfy_quant)$"
)
SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale")
DENOISERS = {
    "unet": ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."),
    "sd3": (
        "x_embedder.", "context_embedder.", "t_embedder.", "y_embedder.", "pos_embed", "joint_blocks.",
        "final_layer.",
    ),
    "flux": (
        "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "double_blocks.", "single_blocks.",
        "final_layer.",
    ),
}  # fmt: skip
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
    names = [name.removeprefix("model.diffusion_model.") for name in header.shapes]
    for sign, kind in OTHERS.items():
        if any(name.startswith(sign) for name in names):
            raise ModelError(
                f"`{path}` is {kind}, which emotrain does not train (it has tensors named `{sign}...`)",
                "train on SD 1.x, SD 2.x, SDXL, SD3 or FLUX.1",
            )
    _refuse_quantised(path, header)
    if any(name.startswith(("edm_mean", "edm_std", "edm_vpred")) for name in names):
        raise ModelError(
            f"`{path}` predicts as EDM models do, which emotrain does not train",
            "train on the epsilon or v-prediction version of the model",
        )
    if family == "flux":
        _check_flux(path, {name.removeprefix("model.diffusion_model."): s for name, s in header.shapes.items()}, config)
    own = DENOISERS["unet" if family in ("sd15", "sd21", "sdxl") else family]
    unknown = [name for name in names if not name.startswith((*own, *PARTS)) and not TABLES.fullmatch(name)]
    if unknown:
        raise ModelError(
            f"`{path}` has {len(unknown)} tensors that a {family} model does not have, such as `{unknown[0]}`",
            "is it a model of another kind, or an extension of one?",
        )


def _refuse_quantised(path: Path, header: Header) -> None:
    found = next((name for name in header.shapes if QUANTISED.search(name)), None)
    if found is None:
        found = next((name for name, dtype in header.dtypes.items() if dtype in ("U8", "I8")), None)
    if found is not None:
        raise ModelError(
            f"`{path}` holds weights in a quantised form that emotrain does not read (`{found}`)",
            "use the bf16, fp16 or plain fp8 file, and `model.quantize` to quantise it while training",
        )


def _check_flux(path: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    inputs = shapes.get("img_in.weight", (0, 0))[-1]
    wanted = int(config.get("in_channels", 64))
    if inputs != wanted:
        kind = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth"}.get(inputs, "an edit model or another model")
        raise ModelError(
            f"`{path}` is {kind}: it takes {inputs} inputs instead of {wanted}",
            "train on the text-to-image model, FLUX.1-dev or -schnell",
        )
    for kind, key in (("double_blocks", "num_layers"), ("single_blocks", "num_single_layers")):
        count = _count(kind, shapes)
        if count != int(config.get(key, count)):
            raise ModelError(
                f"`{path}` has {count} {kind}, and FLUX.1 has {config[key]}: a pruned model or one of another kind",
                "train on FLUX.1-dev or -schnell",
            )


def _count(kind: str, names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(f"{kind}.")})


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
