"""Recognising a model from JSON configs and tensor names (no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emotrain.errors import ModelError
from emotrain.families.headers import Header, read_header, read_json
from emotrain.families.sizes import FAMILIES, PIPELINES, public_configs

Prediction = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True)
class Sniffed:
    """What a model is.

    `variant` is one of the public models or "custom" (another size); `resolution`, `bucket_step` and `vae_scale` are pixels
    (per latent); `max_rank` is the largest rank that can still add something; `missing` names pieces that are not in it.
    """

    family: str
    variant: str
    prediction: Prediction
    resolution: int
    bucket_step: int
    vae_scale: int
    max_rank: int
    kind: Literal["folder", "file", "hub"]
    latent_channels: int
    path: Path | str
    denoiser_config: dict[str, Any] = field(default_factory=dict, repr=False)
    scheduler_config: dict[str, Any] = field(default_factory=dict, repr=False)
    missing: tuple[str, ...] = ()

    def describe(self) -> str:
        """A few words for messages: `sdxl (Stable Diffusion XL, v_prediction)`."""
        return f"{self.family} ({FAMILIES[self.family].title}, {self.prediction})"


def _width(config: dict[str, Any]) -> int:
    """The widest layer's narrower side."""
    if "block_out_channels" in config:
        return int(max(config["block_out_channels"]))
    return int(config.get("num_attention_heads", 24)) * int(config.get("attention_head_dim", 128))


def _step(family: str, config: dict[str, Any], vae_scale: int, resolution: int) -> int:
    """Pixels that sides must be multiples of; 64 for models of real size."""
    halvings = 2 ** (len(config.get("block_out_channels", [0] * 4)) - 1) if FAMILIES[family].denoiser == "unet" else 2
    least = vae_scale * halvings
    return max(least, 64) if resolution >= 256 else least


def variant_of(family: str, config: dict[str, Any]) -> str:
    """The public model whose sizes (and guidance embedding) the denoiser config has, or "custom"."""
    words = (
        "block_out_channels",
        "cross_attention_dim",
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "guidance_embeds",
        "qk_norm",
        "in_channels",
    )
    for name in FAMILIES[family].variants:
        public = public_configs()["denoiser"][name]["config"]
        if all(_same(config.get(word), public.get(word)) for word in words if word in public or word == "qk_norm"):
            return name
    return "custom"


def _same(one: Any, other: Any) -> bool:
    return (
        list(one) == list(other)
        if isinstance(one, list | tuple) and isinstance(other, list | tuple)
        else bool(one == other)
    )


def sniff_folder(folder: Path) -> Sniffed:
    """A diffusers folder.

    Raises:
        ModelError: pieces are missing, or it is a pipeline that is not known here.
    """
    if not (folder / "model_index.json").is_file():
        inside = sorted(p.name for p in folder.glob("*.safetensors"))
        if inside:
            raise ModelError(
                f"`{folder}` is a folder without model_index.json",
                f"give the file itself, such as `{folder / inside[0]}`",
            )
        raise ModelError(
            f"`{folder}` is not a diffusers folder: model_index.json is missing",
            "give the folder that holds model_index.json, or a .safetensors file",
        )
    index = read_json(folder / "model_index.json")
    return _from_configs(
        folder,
        index,
        lambda part, name: read_json(folder / part / name),
        "folder",
        _absent(folder, index),
    )


def _absent(folder: Path, index: dict[str, Any]) -> tuple[str, ...]:
    """Parts that model_index.json names and the folder does not hold."""
    wanted = [part for part, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    return tuple(
        part
        for part in wanted
        if not (folder / part).is_dir() and part not in ("safety_checker", "feature_extractor", "image_encoder")
    )


def _from_configs(
    where: Path | str,
    index: dict[str, Any],
    read: Any,
    kind: Literal["folder", "hub"],
    missing: tuple[str, ...],
) -> Sniffed:
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ModelError(
            f"`{where}` is a {pipeline}, which emotrain does not train",
            f"known are {', '.join(sorted(PIPELINES))}",
        )
    if missing:
        raise ModelError(
            f"`{where}` is not complete: {', '.join(missing)} missing",
            "download the whole folder again",
        )
    family = PIPELINES[pipeline]
    denoiser = read(FAMILIES[family].denoiser, "config.json")
    vae = read("vae", "config.json")
    scheduler = read("scheduler", "scheduler_config.json")
    if family == "sd15" and denoiser.get("cross_attention_dim") == 1024:
        family = "sd21"
    vae_scale = 2 ** (len(vae["block_out_channels"]) - 1)
    _check_inputs(where, family, denoiser, int(vae["latent_channels"]))
    side = denoiser.get("sample_size")
    resolution = (
        int(vae.get("sample_size", 1024)) if family == "flux" or not isinstance(side, int) else side * vae_scale
    )
    return Sniffed(
        family=family, variant=variant_of(family, denoiser), prediction=_prediction(where, family, scheduler),
        resolution=resolution, bucket_step=_step(family, denoiser, vae_scale, resolution), vae_scale=vae_scale,
        max_rank=_width(denoiser), kind=kind, latent_channels=int(vae["latent_channels"]), path=where,
        denoiser_config={k: v for k, v in denoiser.items() if not k.startswith("_")}, scheduler_config=scheduler,
    )  # fmt: skip


def _check_inputs(where: Path | str, family: str, denoiser: dict[str, Any], channels: int) -> None:
    """Refuse denoisers that take more than latents (inpainting, edit, fill and control models)."""
    wanted = channels * 4 if family == "flux" else channels
    if int(denoiser.get("in_channels", wanted)) != wanted:
        raise ModelError(
            f"`{where}` takes {denoiser['in_channels']} input channels instead of {wanted}: an inpainting or edit model",
            "train on the text-to-image model that it was made from",
        )


def _prediction(where: Path | str, family: str, scheduler: dict[str, Any]) -> Prediction:
    if family in ("sd3", "flux"):
        return "flow"
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"`{where}` predicts `{kind}`, which emotrain does not train",
            "known are epsilon, v_prediction and flow models",
        )
    return "epsilon" if kind == "epsilon" else "v_prediction"


# ---------------------------------------------------------------- single files

UNET_FIRST = "input_blocks.0.0.weight"


def sniff_file(path: Path) -> Sniffed:
    """One .safetensors file in the original layout, as shared on Civitai.

    SD 2.x files do not say what they predict; without `modelspec.prediction_type` in the metadata they are taken for the
    768 px v-prediction model, as by diffusers.

    Raises:
        ModelError: unreadable, a LoRA, a part of a model, or not known here.
    """
    header = read_header(path)
    shapes = {name.removeprefix("model.diffusion_model."): shape for name, shape in header.shapes.items()}
    _refuse_parts(path, shapes)
    if any(re.match(r"double_blocks\.\d+\.img_attn\.qkv", name) for name in shapes):
        variant = "flux1-dev" if any(name.startswith("guidance_in.") for name in shapes) else "flux1-schnell"
        return _from_file(path, "flux", variant, header, shapes)
    if any(re.match(r"joint_blocks\.\d+\.x_block", name) for name in shapes):
        return _from_file(path, "sd3", _sd3_variant(shapes), header, shapes)
    if UNET_FIRST in shapes:
        return _from_file(path, _unet_family(path, shapes), None, header, shapes)
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
    if any(name.startswith(("down_blocks.", "transformer_blocks.", "single_transformer_blocks.")) for name in shapes):
        raise ModelError(
            f"`{path}` is the denoiser of a diffusers folder alone",
            "give the folder that holds model_index.json",
        )


def _unet_family(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    channels = shapes[UNET_FIRST][1]
    if channels != 4:
        raise ModelError(
            f"`{path}` takes {channels} input channels instead of 4: an inpainting or edit model",
            "train on the text-to-image model that it was made from",
        )
    widths = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    known = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
    found = [known[width] for width in sorted(widths) if width in known]
    if len(widths) != 1 or not found:
        raise ModelError(
            f"`{path}` has a UNet whose text width is {sorted(widths)}, which emotrain does not know",
            "known widths are 768 (sd15), 1024 (sd21), 2048 (sdxl)",
        )
    return found[0]


def _sd3_variant(shapes: dict[str, tuple[int, ...]]) -> str:
    blocks = {name.split(".")[1] for name in shapes if name.startswith("joint_blocks.")}
    if any(".x_block.attn2." in name for name in shapes):
        return "sd35-medium"
    return "sd35-large" if len(blocks) > 24 or any(".ln_q." in name for name in shapes) else "sd3-medium"


def _from_file(
    path: Path, family: str, variant: str | None, header: Header, shapes: dict[str, tuple[int, ...]]
) -> Sniffed:
    info = FAMILIES[family]
    variant = variant or next(iter(info.variants))
    scheduler = dict(
        public_configs()["scheduler"][family if info.denoiser == "unet" else "sd3" if family == "sd3" else variant][1]
    )
    prediction: Prediction = "flow"
    if info.denoiser == "unet":
        prediction = _unet_prediction(family, header)
        scheduler["prediction_type"] = prediction
        if "ztsnr" in header.shapes:
            scheduler["rescale_betas_zero_snr"] = True
    resolution = 512 if family == "sd21" and prediction == "epsilon" else info.resolution
    config = dict(public_configs()["denoiser"][variant]["config"])
    return Sniffed(
        family=family, variant=variant, prediction=prediction, resolution=resolution, bucket_step=info.bucket_step,
        vae_scale=info.vae_scale, max_rank=_width(config), kind="file", latent_channels=info.latent_channels, path=path,
        denoiser_config=config, scheduler_config=scheduler, missing=missing_from_file(family, header),
    )  # fmt: skip


def _unet_prediction(family: str, header: Header) -> Prediction:
    """Marker tensor `v_pred`, then the metadata; what is not said is epsilon (v for SD 2.x)."""
    if "v_pred" in header.shapes:
        return "v_prediction"
    said = header.metadata.get("modelspec.prediction_type", header.metadata.get("modelspec.predict_key", "")).lower()
    if said in ("v", "v_prediction", "v-prediction"):
        return "v_prediction"
    if said in ("epsilon", "eps"):
        return "epsilon"
    return "v_prediction" if family == "sd21" else "epsilon"


PIECES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd15": {"vae": ("first_stage_model.",), "text_encoder": ("cond_stage_model.transformer.",)},
    "sd21": {"vae": ("first_stage_model.",), "text_encoder": ("cond_stage_model.model.",)},
    "sdxl": {
        "vae": ("first_stage_model.",),
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
    "sd3": {
        "vae": ("first_stage_model.",),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    "flux": {
        "vae": ("vae.", "first_stage_model."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    },
}


def missing_from_file(family: str, header: Header) -> tuple[str, ...]:
    """Pieces of the family that a single file does not hold."""
    return tuple(
        piece
        for piece, prefixes in PIECES[family].items()
        if not any(name.startswith(prefixes) for name in header.shapes)
    )


# ---------------------------------------------------------------- hub ids


def sniff_hub(repo: str, revision: str | None = None) -> Sniffed:
    """A model on the hub, from its small JSON files.

    Raises:
        ModelError: not there, not allowed, or no network.
    """
    from emotrain.families.hub import fetch_json

    index = fetch_json(repo, "model_index.json", revision)
    return _from_configs(repo, index, lambda part, name: fetch_json(repo, f"{part}/{name}", revision), "hub", ())
