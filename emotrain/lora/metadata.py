"""The strings in a LoRA's header: what A1111, ComfyUI managers and model sites read, and our own.

Strings only, nested values as JSON. Absolute paths become their last part, so that neither a user
name nor a folder of the machine gets out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from emotrain.families.registry import FAMILIES
from emotrain.lora import container

_ABSOLUTE = re.compile(r"^(?:file:|~|/|\\\\|[A-Za-z]:[\\/])")
_HOMES = re.compile(r"(?:/home/|/Users/|/root/|[A-Za-z]:[\\/]Users[\\/])[^\s\"',;]*")


@dataclass(frozen=True)
class About:
    """What a LoRA file says of itself; everything but the family may be left out."""

    family: str  # a name of `emotrain.families.registry.FAMILIES`
    variant: str = ""  # of the base, as `sd35-large` or `flux1-schnell`
    name: str = ""  # the file's name without its end; web interfaces use it in prompts
    rank: int | None = None
    alpha: float | None = None  # strength is alpha / rank
    factor: int | None = None  # of a LoKr
    network_args: Mapping[str, Any] = field(default_factory=dict)  # further settings, such as targets and conv_rank
    base_name: str = ""  # the base model's file or folder name
    base_sha256: str = ""  # of the base model's file
    prediction: str = ""  # epsilon, v_prediction or flow
    trigger: str | None = None  # the word that calls the LoRA
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # folder name -> tag -> pictures
    folders: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # folder name -> (repeats, pictures)
    buckets: Sequence[tuple[int, int, int]] = ()  # (width, height, pictures) each
    num_images: int | None = None  # pictures trained on
    num_reg_images: int | None = None  # pictures of regularisation folders among them
    resolution: tuple[int, int] | None = None  # (width, height) in pixels
    steps: int | None = None  # optimizer steps behind these weights
    max_steps: int | None = None  # the ceiling of the run
    epochs: float | None = None  # passes over the pictures, whole or not
    micro_batch_size: int | None = None  # pictures at once
    gradient_accumulation_steps: int | None = None  # micro-batches per step
    clip_skip: int | None = None  # which layer of CLIP the prompts were taken from, counted as A1111 does
    seed: int | None = None
    optimizer: str = ""
    lr: float | None = None
    text_encoder: bool = False  # whether text encoders were trained
    dtype: str = ""  # of the base during training: bf16, fp16 or fp32
    min_snr_gamma: float | None = None  # of the loss
    noise_offset: float | None = None  # of the loss
    preset: Mapping[str, Any] | None = None  # the whole preset
    dataset_sha256: str = ""  # digest of the data set
    parents: Sequence[Mapping[str, Any]] = ()  # earlier LoRAs: kind, sha256, weight
    stop_reason: str = ""  # why the run ended
    best_step: int | None = None  # the step of these weights, where the best was kept
    version: str = ""  # of emotrain
    extra: Mapping[str, Any] = field(default_factory=dict)  # further `emotrain.*` values


def build_metadata(about: About) -> dict[str, str]:
    """The header of a LoRA file: `ss_*`, `modelspec.*` and `emotrain.*`, strings only, no path.

    The hashes of the weights come in when the file is saved.
    """
    values = {**_kohya(about), **_modelspec(about), **_own(about)}
    return {key: _text(value) for key, value in values.items() if value not in (None, "")}


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Add `sshs_model_hash` and `sshs_legacy_hash`, by which web interfaces recognise the weights.

    The first is the sha256 of the tensors' bytes; the second the first 8 digits of the sha256 of
    64 KiB at 1 MiB in a file that has only the `ss_*` metadata.
    """
    plain = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    whole, legacy = hashlib.sha256(), hashlib.sha256()
    position = 0
    for number, piece in enumerate(container.encode(tensors, plain)):
        if number >= 2:
            whole.update(piece)
        start, end = max(0x100000 - position, 0), max(0x110000 - position, 0)
        legacy.update(piece[start:end])
        position += len(piece)
    hashes = {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}
    if "modelspec.architecture" in metadata:
        hashes["modelspec.hash_sha256"] = f"0x{whole.hexdigest()}"
    return {**metadata, "format": "pt", **hashes}


def without_paths(value: Any) -> Any:
    """The value with each absolute path in it cut down to its last part, through lists and dicts."""
    if isinstance(value, Mapping):
        return {without_paths(str(key)): without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if _ABSOLUTE.match(value) and "\n" not in value:
        return _last_part(value)
    return _HOMES.sub(lambda found: _last_part(found.group()), value)


def _kohya(about: About) -> dict[str, Any]:
    sizes = about.resolution or ()
    batch, accumulation = about.micro_batch_size, about.gradient_accumulation_steps
    total = None if batch is None else batch * (accumulation or 1)
    return {
        "ss_network_module": "networks.lora" if about.factor is None else "lycoris.kohya",
        "ss_network_dim": about.rank,
        "ss_network_alpha": about.alpha,
        "ss_network_args": {
            **about.network_args,
            **({} if about.factor is None else {"algo": "lokr", "factor": str(about.factor), "full_matrix": "True"}),
        },
        "ss_base_model_version": FAMILIES[about.family].lora.base_version,
        "ss_v2": about.family == "sd21",
        "ss_output_name": about.name,
        "ss_sd_model_name": about.base_name,
        "ss_sd_model_hash": about.base_sha256[:10],
        "ss_new_sd_model_hash": about.base_sha256,
        "ss_learning_rate": about.lr,
        "ss_unet_lr": about.lr,
        "ss_text_encoder_lr": about.lr if about.text_encoder else None,
        "ss_optimizer": about.optimizer,
        "ss_steps": about.steps,
        "ss_max_train_steps": about.max_steps,
        "ss_epoch": None if about.epochs is None else int(about.epochs),
        "ss_num_epochs": None if about.epochs is None else -int(-about.epochs // 1),
        "ss_num_train_images": about.num_images,
        "ss_num_reg_images": about.num_reg_images,
        "ss_batch_size_per_device": batch,
        "ss_total_batch_size": total,
        "ss_gradient_accumulation_steps": accumulation,
        "ss_resolution": f"({sizes[0]}, {sizes[1]})" if sizes else None,
        "ss_clip_skip": about.clip_skip,
        "ss_seed": about.seed,
        "ss_mixed_precision": {"fp32": "no"}.get(about.dtype, about.dtype),
        "ss_cache_latents": True,
        "ss_min_snr_gamma": about.min_snr_gamma,
        "ss_noise_offset": about.noise_offset or None,
        "ss_tag_frequency": about.tag_frequency or None,
        "ss_dataset_dirs": _folders(about),
        "ss_bucket_info": _buckets(about),
        "ss_training_comment": f"trigger: {about.trigger}" if about.trigger else None,
    }


def _modelspec(about: About) -> dict[str, Any]:
    spec = FAMILIES[about.family]
    base = spec.variants.get(about.variant, next(iter(spec.variants.values()))).architecture
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(about.prediction)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base}/lora",
        "modelspec.implementation": spec.lora.implementation or "diffusers",
        "modelspec.title": about.name or "LoRA",
        "modelspec.resolution": "x".join(map(str, about.resolution)) if about.resolution else None,
        "modelspec.trigger_phrase": about.trigger,
        "modelspec.prediction_type": prediction,
    }


def _own(about: About) -> dict[str, Any]:
    values: dict[str, Any] = {
        "version": about.version,
        "family": about.family,
        "variant": about.variant,
        "preset": about.preset,
        "dataset_sha256": about.dataset_sha256,
        "parents": list(about.parents) or None,
        "stop_reason": about.stop_reason,
        "best_step": about.best_step,
        "step": about.steps,
        **about.extra,
    }
    return {f"emotrain.{key}": value for key, value in values.items()}


def _text(value: Any) -> str:
    clean = without_paths(value)
    if isinstance(clean, str):
        return clean
    if isinstance(clean, bool):
        return str(clean)  # "True", as A1111 compares it
    if isinstance(clean, float) and clean.is_integer() and abs(clean) < 1e15:
        return str(clean) if abs(clean) < 1e6 else str(int(clean))
    return json.dumps(clean, ensure_ascii=False, sort_keys=True)


def _folders(about: About) -> dict[str, dict[str, int]] | None:
    return {
        name: {"n_repeats": repeats, "img_count": count} for name, (repeats, count) in about.folders.items()
    } or None


def _buckets(about: About) -> dict[str, Any] | None:
    if not about.buckets:
        return None
    listed = {
        str(number): {"resolution": [width, height], "count": count}
        for number, (width, height, count) in enumerate(about.buckets)
    }
    return {"buckets": listed}


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1].lstrip("~") or "folder"
