"""OneTrainer: its JSON, with concepts and samples inside or in files of their own.

A preset of OneTrainer's is a difference to its defaults, as a file of ours is. Words: modules/util/config/*Config.py.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from emotrain.config.trainers.files import parse_file
from emotrain.config.trainers.imported import (
    ATTENTION,
    BASE,
    CACHED,
    CHECKPOINTING,
    CONTINUES,
    DTYPES,
    IDLE,
    IN_FLOAT32,
    QUANTIZED,
    SKIP,
    Import,
    Special,
    Values,
    because,
    chosen,
    factor,
    first_line,
    is_off,
    items,
    kind_of_adapter,
    number,
    off_at,
    prompt_line,
    repeats_of,
    section,
    switch,
    unless_off,
)

KEY = "onetrainer"  # in `FamilySpec.elsewhere`
NAME = "a config of OneTrainer"
_PLACES = {
    "batch_size": "train.micro_batch_size", "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "clip_grad_norm": "train.max_grad_norm", "offset_noise_weight": "train.loss.noise_offset",
    "lora_rank": "network.rank", "lora_alpha": "network.alpha", "rolling_backup_count": "save.keep_last",
}  # fmt: skip
_PARTS = ("unet", "transformer", "prior", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "vae")
_WITH_CLIP = (
    "STABLE_DIFFUSION",
    "FLUX_DEV_1",
    "FLUX_FILL",
)  # models that hold their text encoders
_SILENT = (
    "concepts", "concept_file_name", "samples", "sample_definition_file_name", "optimizer", "learning_rate",
    "model_type", "__version", "save_every_unit", "sample_after_unit", "backup_after_unit", "validate_after_unit",
    "loss_weight_strength", "optimizer_defaults", "secrets", "cloud", "embedding", "additional_embeddings",
    "debug_dir", "concept_stats", "masked_training", "mse_strength", "vb_loss_strength", "weight_dtype",
)  # fmt: skip
# How it is started, what is shown, how files are read, and models and methods that are not trained here.
_IDLE = (
    "tensorboard_port", "tensorboard_expose", "tensorboard_always_on", "samples_to_tensorboard", "train_device",
    "temp_device", "fallback_train_dtype", "enable_autocast_cache", "dataloader_threads", "async_offloading",
    "gradient_reduce_precision", "fused_gradient_reduce", "async_gradient_reduce", "async_gradient_reduce_buffer",
    "clear_cache_before_training", "frames", "embedding_weight_dtype", "bundle_additional_embeddings", "compile",
    "effnet_encoder", "decoder", "decoder_text_encoder", "decoder_vqgan", "unconditional_transformer", "huber_delta",
    "sample_image_format", "sample_video_format", "sample_audio_format", "non_ema_sampling", "backup_before_save",
    "include_train_config", "text_encoder_sequence_length", "text_encoder_2_sequence_length", "learning_rate_cycles",
    "lora_decompose_norm_epsilon", "oft_block_size", "lokr_dora_on_output", "lokr_vec_trick", "layer_filter_regex",
)  # fmt: skip
# Their sets of layers by name; `blocks` is all that lies in the transformer's blocks, modulations among it.
_FORMATS = {"kohya_lora": "kohya", "diffusers_lora": "diffusers", "comfy_lora": "comfyui", "legacy_lora": "auto",
            "safetensors": "auto", "original_lora": "auto"}  # fmt: skip
_TARGETS = {"attn-mlp": "attn-mlp", "attn-only": "attn", "full": "all", "blocks": "all"}


def recognise(words: Values) -> bool:
    """Whether a config is of this kind."""
    return "base_model_name" in words or {"model_type", "training_method"} <= set(words)


def read(words: Values, out: Import) -> None:
    """Take a config apart into `out`.

    Raises:
        ConfigError: it trains a model of a kind that cannot be trained here.
    """
    out.choose("model_type", str(words.get("model_type", "STABLE_DIFFUSION_15")))
    is_lokr = str(words.get("peft_type")).lower() == "lokr"
    special = {
        "base_model_name": BASE,
        "output_model_destination": lambda out, word, value: out.name(word, Path(str(value)).stem),
        "train_dtype": chosen("model.dtype", DTYPES), "output_dtype": chosen("save.dtype", DTYPES),
        "output_model_format": _format,
        "resolution": lambda out, word, value: out.sizes(word, _sizes(str(value))),
        "layer_filter_preset": chosen("network.targets", _TARGETS),
        "lokr_decompose_factor": factor if is_lokr else SKIP,
        "training_method": kind_of_adapter("LORA"), "peft_type": kind_of_adapter("LORA"),
        "lora_model_name": CONTINUES,
        "ema": chosen("train.ema", {"gpu": True, "cpu": True}),
        "force_v_prediction": switch("model.prediction", "v"),
        "force_epsilon_prediction": switch("model.prediction", "epsilon"),
        "timestep_distribution": chosen("train.loss.timesteps", {"uniform": "uniform", "logit_normal": "logit-normal",
                                                                 "sigmoid": "logit-normal"}),
        "timestep_shift": lambda out, word, value: value in (None, 1, 1.0) or out.take(word, value, "train.loss.shift"),
        "dynamic_timestep_shifting": switch("train.loss.shift", "auto"),
        "loss_weight_fn": lambda out, word, value: _loss_weight(out, word, value, words),
        "save_every": lambda out, word, value: _every(out, word, value, words, "save.every"),
        "sample_after": lambda out, word, value: _every(out, word, value, words, "sample.every"),
        "text_encoder_layer_skip": off_at(0) if "_XL_" in str(words.get("model_type")) else _layer_skip,
        **_left_out(words),
        "layer_filter": SKIP if "layer_filter_preset" in words else Import.lack,
        "tensorboard": switch("log.tensorboard"),
        **dict.fromkeys(_PARTS, partial(_part, kind=str(words.get("model_type", "STABLE_DIFFUSION_15")))),
        **dict.fromkeys(_SILENT, SKIP),
    }  # fmt: skip
    _optimizer(words, out)
    out.read(words, _PLACES, special)
    for concept in _listed(words, "concepts", "concept_file_name", out):
        _concept(concept, out)
    _samples(_listed(words, "samples", "sample_definition_file_name", out), out)


def _format(out: Import, word: str, value: Any) -> None:
    if str(value).casefold() in _FORMATS:
        chosen("save.format", _FORMATS)(out, word, value)
    else:
        out.leave(word, value, "a LoRA is written")


def _left_out(words: Values) -> dict[str, Special]:
    """Words that are left out for a reason, and those that say nothing at the values that they have by themselves."""
    masks = Import.lack if words.get("masked_training") else IDLE
    is_lokr = str(words.get("peft_type")).casefold() == "lokr"
    return {
        "gradient_checkpointing": CHECKPOINTING, "attention_mechanism": ATTENTION, "latent_caching": CACHED,
        "aspect_ratio_bucketing": because("pictures always keep their shape, in buckets"),
        "quantization": because("which layers are quantized is chosen here"), "lora_weight_dtype": IN_FLOAT32,
        "normalize_masked_area_loss": because("it always is"), "max_noising_strength": off_at(1.0),
        "unmasked_probability": masks, "unmasked_weight": masks,
        "ema_decay": IDLE, "ema_update_step_interval": IDLE,
        "lokr_dim": because("a LoKr's factors are whole") if is_lokr else IDLE,
        "backup_after": because("checkpoints come with save.every"),
        "validate_after": partial(_every, words=words, place="validate.every") if words.get("validation") else IDLE,
        **dict.fromkeys(_IDLE, IDLE),
    }  # fmt: skip


def _listed(words: Values, inside: str, beside: str, out: Import) -> list[Values]:
    """A list in the config, or in the file that it names."""
    found = words.get(inside)
    if found is None and not is_off(words.get(beside)):
        path = Path(out.path(str(words[beside])))
        if not path.is_file():
            out.leave(beside, words[beside], "no such file")
            return []
        found = parse_file(path, str(words[beside]))
    return items({inside: found}, inside)


def _sizes(text: str) -> list[Any]:
    """`512`, `512,768`, `832x1216`."""
    return [
        [int(side) for side in part.split("x")] if re.fullmatch(r"\d+x\d+", part) else int(part)
        for part in re.findall(r"\d+x\d+|\d+", text)
    ]


def _optimizer(words: Values, out: Import) -> None:
    found = words.get("optimizer")
    options = dict(section(words, "optimizer"))
    name = str(options.pop("optimizer", "") or ("" if options else found or ""))
    options.pop("__version", None)
    set_here = {key: value for key, value in options.items() if not is_off(value)}
    out.num_off += len(options) - len(set_here)
    out.optimizer("optimizer", name, ("learning_rate", words.get("learning_rate")), ("optimizer", set_here))


def _loss_weight(out: Import, word: str, value: Any, words: Values) -> None:
    if value == "MIN_SNR_GAMMA":
        out.take(word, value, "train.loss.min_snr_gamma", number(words.get("loss_weight_strength"), 5.0))
    elif value != "CONSTANT":
        out.lack(word, value)


@unless_off
def _layer_skip(out: Import, word: str, value: Any) -> None:
    """Layers of CLIP that are left out at its end, beyond what the model leaves out by itself."""
    if out.kind is not None and out.kind.unet and isinstance(value, int):
        out.take(word, value, "model.clip_skip", value + 1)
    else:
        out.lack(word, value)


def _every(out: Import, word: str, value: Any, words: Values, place: str) -> None:
    unit = words.get(f"{word}_unit", "NEVER" if word == "save_every" else "MINUTE")
    if unit == "STEP" and value:
        out.take(word, value, place)
    elif unit != "NEVER":
        out.leave(word, f"{value} {str(unit).lower()}", f"{place} counts steps")


def _part(out: Import, word: str, value: Any, kind: str) -> None:
    """A part of the model: its file, its dtype, whether it is trained; `kind` is OneTrainer's `model_type`."""
    words = section({word: value}, word)
    weights = str(words.get("weight_dtype", "")).casefold()
    if word in ("unet", "transformer") and weights in QUANTIZED:
        out.take(f"{word}.weight_dtype", words["weight_dtype"], "model.quantize", QUANTIZED[weights])
    if word.startswith("text_encoder") and weights in QUANTIZED and out.kind is not None and out.kind.flow:
        out.take(f"{word}.weight_dtype", words["weight_dtype"], "model.quantize_text_encoders", QUANTIZED[weights])
    name = words.get("model_name")
    if not is_off(name):
        if word == "vae":
            out.file(f"{word}.model_name", name, "model.vae")
        elif word == "text_encoder" and not kind.startswith(_WITH_CLIP):
            out.file(f"{word}.model_name", name, "model.text_encoder")
        else:
            out.lack(f"{word}.model_name", name)
    if word.startswith("text_encoder"):
        if words.get("train"):
            out.take(f"{word}.train", True, "network.text_encoder")
        if word == "text_encoder" and not is_off(words.get("dropout_probability")):
            out.caption(f"{word}.dropout_probability", words["dropout_probability"], "dropout")
    if not is_off(words.get("learning_rate")):
        out.leave(f"{word}.learning_rate", words["learning_rate"], "there is one rate, and EmoSens needs none")


def _concept(words: Values, out: Import) -> None:
    path, kind = words.get("path"), str(words.get("type", "STANDARD"))
    if is_off(path) or words.get("enabled") is False:
        out.leave("concepts", words.get("name") or path or "", "it is switched off" if path else "it has no path")
        return
    if kind == "VALIDATION":
        out.take("concepts: VALIDATION", path, "validate.folder", out.path(str(path)))
        return
    image, text = section(words, "image"), section(words, "text")
    prior = kind == "PRIOR_PREDICTION"
    weight = number(words.get("loss_weight"))
    out.add_folder(
        "concepts", path, repeats=_repeats(words, out), flip=bool(image.get("enable_random_flip")),
        caption=_one_caption(text, out), prior=weight if prior else None,
    )  # fmt: skip
    if weight != 1.0 and not prior:
        out.lack("concepts.loss_weight", weight)
    below = Path(out.path(str(path)))
    if words.get("include_subdirectories") is False and below.is_dir() and any(one.is_dir() for one in below.iterdir()):
        out.leave("concepts.include_subdirectories", False, "folders are read with their subfolders here")
    if resolution := image.get("enable_resolution_override") and image.get("resolution_override"):
        out.sizes("concepts.image.resolution_override", _sizes(str(resolution)))
    if text.get("enable_tag_shuffling"):
        out.caption("concepts.text.enable_tag_shuffling", True, "shuffle")
        out.caption("concepts.text.keep_tags_count", text.get("keep_tags_count", 1), "keep_tokens")
    if text.get("tag_dropout_enable") and not is_off(text.get("tag_dropout_probability")):
        out.caption("concepts.text.tag_dropout_probability", text["tag_dropout_probability"], "tag_dropout")
    for word, value in image.items():
        strong = word.startswith(("enable_random_", "enable_fixed_")) and word != "enable_random_flip"
        if strong and value:
            out.lack(f"concepts.image.{word}", value)


def _repeats(words: Values, out: Import) -> int | None:
    if words.get("balancing_strategy", "REPEATS") == "SAMPLES":
        out.lack("concepts.balancing", f"{number(words.get('balancing')):g} samples")
        return None
    return repeats_of(out, "concepts.balancing", words.get("balancing", 1.0))


def _one_caption(text: Values, out: Import) -> str | None:
    """The caption of all pictures of a concept, where it does not have one for each."""
    source = text.get("prompt_source", "sample")
    if source == "filename":
        return "[name]"
    if source != "concept" or is_off(text.get("prompt_path")):
        return None
    return first_line(out, "concepts.text.prompt_path", text["prompt_path"])


def _samples(listed: list[Values], out: Import) -> None:
    lines = [
        prompt_line(
            str(one.get("prompt", "")), n=one.get("negative_prompt"), w=one.get("width"), h=one.get("height"),
            d=None if one.get("random_seed") else one.get("seed"), l=one.get("cfg_scale"), s=one.get("diffusion_steps"),
        )
        for one in listed
        if one.get("enabled", True)
    ]  # fmt: skip
    out.prompts("samples", lines)
