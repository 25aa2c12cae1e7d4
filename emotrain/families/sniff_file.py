"""Recognising a single .safetensors file from its tensor names and shapes (no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from emotrain.errors import ModelError
from emotrain.families.headers import Header, own_name, read_header, read_json
from emotrain.families.registry import FAMILIES, configs
from emotrain.families.sniff import Prediction, Sniffed, is_distilled, name_of, variant_of, widest_layer
from emotrain.families.understood import refuse_not_understood


def companion(path: Path) -> Path:
    """The folder beside a model file that may hold configs, tokenizers and missing pieces."""
    return path.with_suffix("")


def own_config(found: Sniffed, file: str, public: Mapping[str, Any]) -> dict[str, Any]:
    """A config of a model: the one in its folder, or in the folder beside its file; else the public model's."""
    path = Path(found.path)
    own = (companion(path) if found.kind == "file" else path) / file
    return read_json(own) if found.kind != "hub" and own.is_file() else dict(public)


def refuse_incomplete(found: Sniffed, has_vae: bool, has_text: bool = False) -> None:
    """Refuse a single file of which pieces are neither in it nor beside it.

    `has_vae` and `has_text`: the preset names a VAE or a text encoder of its own.

    Raises:
        ModelError: with the pieces, and where they can come from.
    """
    if found.kind != "file":
        return
    path, beside = Path(found.path), companion(Path(found.path))
    lacking = [name for name in found.missing if not any((beside / name).glob("*.safetensors"))]
    optional = {encoder.name for encoder in FAMILIES[found.family].text_encoders if encoder.optional}
    if has_vae:
        optional.add("vae")
    separate = FAMILIES[found.family].separate_files
    if has_text and separate:
        optional.add("text_encoder")
    needed = [name for name in lacking if name not in optional]
    if not needed:
        return
    texts = [name for name in needed if name != "vae"]
    means = [f"the VAE by `model.vae`, or in `{beside.name}/vae`"] if "vae" in needed else []
    if texts:
        folder = f"a folder `{beside.name}` beside it with {' and '.join(texts)} of a diffusers folder"
        means.append(f"the text encoder by `model.text_encoder`, or {folder}" if separate else folder)
    raise ModelError(f"`{path}` does not hold {' and '.join(needed)}", f"give {'; and '.join(means)}")


def sniff_file(path: Path) -> Sniffed:
    """One .safetensors file in the original layout, as shared on Civitai.

    SD 2.x files do not say what they predict; without `modelspec.prediction_type` in the metadata
    they are taken for the 768 px v-prediction model, as by diffusers.

    Raises:
        ModelError: unreadable, a LoRA, a part of a model, or not known here.
    """
    header = read_header(path)
    shapes = {own_name(name): shape for name, shape in header.shapes.items()}
    _refuse_parts(path, shapes)
    for name, spec in FAMILIES.items():
        variant = spec.file.variant_of(path, shapes)
        if variant is not None:
            return _from_file(path, name, variant, header, shapes)
    if any(name.startswith(("down_blocks.", "transformer_blocks.", "single_transformer_blocks.")) for name in shapes):
        raise ModelError(
            f"`{path}` is the denoiser of a diffusers folder alone",
            "give the folder that holds model_index.json",
        )
    some = ", ".join(f"`{name}`" for name in sorted(header.shapes)[:3])
    raise ModelError(
        f"`{path}` is not a model that emotrain knows: its {len(shapes)} tensors begin with {some}",
        f"known are {', '.join(FAMILIES)}",
    )


def _refuse_parts(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    if any("lora_" in name or ".lora." in name or "hada_w" in name or "lokr_w" in name for name in shapes):
        raise ModelError(
            f"`{path}` is a LoRA, not a model",
            "put it under start_from.continue or start_from.stack, and the model it belongs to here",
        )


def public_model(repo: str) -> Sniffed | None:
    """What a public model is by the sizes that are built in, without a file of it; None for other repositories."""
    for family, spec in FAMILIES.items():
        for name, variant in spec.variants.items():
            if variant.repository == repo:
                found = _from_file(Path(repo), family, name, Header({}, {}, {}), {})
                return replace(found, kind="hub", path=repo, missing=())
    return None


def _from_file(path: Path, family: str, variant: str, header: Header, shapes: dict[str, tuple[int, ...]]) -> Sniffed:
    spec = FAMILIES[family]
    variant = variant or next(iter(spec.variants))
    scheduler = dict(configs(family)["scheduler"][variant][1])
    prediction: Prediction = "flow"
    if not spec.flow:
        beside = _scheduler_beside(path)
        prediction = _unet_prediction(family, header, beside)
        scheduler["prediction_type"] = prediction
        if "ztsnr" in header.shapes or beside.get("rescale_betas_zero_snr"):
            scheduler["rescale_betas_zero_snr"] = True
    resolution = 512 if family == "sd21" and prediction == "epsilon" else spec.resolution
    config = dict(configs(family)["denoiser"][variant])
    own = companion(path) / spec.denoiser / "config.json"
    if own.is_file():
        config = {key: value for key, value in read_json(own).items() if not key.startswith("_")}
        if spec.separate_files:
            variant = variant_of(family, config)
    if shapes:  # none: the public model itself, by its sizes alone
        refuse_not_understood(path, family, header, config)
    channels = int(config.get("in_channels", spec.latent_channels * spec.packed_channels)) // spec.packed_channels
    return Sniffed(
        family=family, variant=variant, prediction=prediction, resolution=resolution, bucket_step=spec.bucket_step,
        vae_scale=spec.vae_scale, max_rank=widest_layer(config), kind="file",
        latent_channels=channels, path=path,
        denoiser_config=config, scheduler_config=scheduler, missing=missing_from_file(family, header),
        distilled=is_distilled(family, name_of(path), variant),
    )  # fmt: skip


def _scheduler_beside(path: Path) -> dict[str, Any]:
    """What the files beside a checkpoint say: `x/scheduler/scheduler_config.json`, or A1111's `x.yaml`."""
    config, settings = companion(path) / "scheduler" / "scheduler_config.json", path.with_suffix(".yaml")
    if config.is_file():
        return read_json(config)
    if settings.is_file():
        text = settings.read_text(encoding="utf-8", errors="replace")[:65536]
        if re.search(r"^\s*parameterization:\s*[\"']?v[\"']?\s*$", text, re.MULTILINE):
            return {"prediction_type": "v_prediction"}
    return {}


def _unet_prediction(family: str, header: Header, beside: dict[str, Any]) -> Prediction:
    """Marker tensor `v_pred`, files beside, then the metadata; what is not said is epsilon (v for SD 2.x)."""
    if "v_pred" in header.shapes or beside.get("prediction_type") == "v_prediction":
        return "v_prediction"
    if beside.get("prediction_type") == "epsilon":
        return "epsilon"
    said = header.metadata.get("modelspec.prediction_type", header.metadata.get("modelspec.predict_key", "")).lower()
    if said in ("v", "v_prediction", "v-prediction"):
        return "v_prediction"
    if said in ("epsilon", "eps"):
        return "epsilon"
    return "v_prediction" if family == "sd21" else "epsilon"


def missing_from_file(family: str, header: Header) -> tuple[str, ...]:
    """Pieces of the family that a single file does not hold."""
    spec = FAMILIES[family]
    pieces = {"vae": spec.file.vae_prefixes} | {encoder.name: encoder.prefixes for encoder in spec.text_encoders}
    return tuple(
        piece
        for piece, prefixes in pieces.items()
        if not any(own_name(name).startswith(prefixes) for name in header.shapes)
    )
