"""diffusion-pipe: its TOML, and the dataset TOML that it names. Words: its examples and docs/supported_models.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emotrain.config.trainers.files import parse_file
from emotrain.config.trainers.imported import (
    BASE,
    BLOCKS,
    CHECKPOINTING,
    CONTINUES,
    DTYPES,
    IDLE,
    IN_FLOAT32,
    QUANTIZED,
    SKIP,
    TEXT_ENCODER,
    VAE,
    Import,
    Values,
    because,
    chosen,
    each,
    factor,
    is_off,
    items,
    kind_of_adapter,
    number,
    repeats_of,
    section,
    switch,
)

KEY = "diffusion-pipe"  # in `FamilySpec.elsewhere`
NAME = "a config of diffusion-pipe"
_PLACES = {
    "micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps", "gradient_clipping": "train.max_grad_norm",
    "max_steps": "train.max_steps", "save_every_n_steps": "save.every", "eval_every_n_steps": "validate.every",
}  # fmt: skip
_BASES = ("checkpoint_path", "diffusers_path", "diffusion_model", "transformer_path")
# How the work is shared out, what is printed, and what is of videos.
_IDLE = (
    "pipeline_stages", "partition_method", "partition_split", "caching_batch_size", "map_num_proc", "steps_per_print",
    "video_clip_mode", "eval_micro_batch_size_per_gpu", "eval_gradient_accumulation_steps", "x_axis_examples",
    "checkpoint_every_n_minutes", "checkpoint_every_n_epochs", "compile",
)  # fmt: skip
_DATASET = ("directory", "resolutions", "size_buckets", "enable_ar_bucket", "frame_buckets", "path", "mask_path",
            "num_repeats", "cache_shuffle_num", "shuffle_tags", "caption_prefix")  # fmt: skip
_TIMESTEPS = {"logit_normal": "logit-normal", "uniform": "uniform"}
_BUCKETS = "pictures keep their shape, in buckets of the sizes that fit"


def recognise(words: Values) -> bool:
    """Whether a config is of this kind."""
    main = "type" in section(words, "model") and ("dataset" in words or "adapter" in words)
    return main or _is_dataset(words)


def read(words: Values, out: Import) -> None:
    """Take a config apart into `out`.

    Raises:
        ConfigError: it trains a model of a kind that cannot be trained here, or its dataset file is missing.
    """
    if _is_dataset(words):
        _dataset(words, out)
        return
    model = section(words, "model")
    out.choose("model.type", str(model.get("type")))
    _model(model, out)
    if "adapter" not in words:
        out.leave("adapter", "none", "a LoRA is trained in place of the whole model")
    _adapter(section(words, "adapter"), out)
    optimizer = dict(section(words, "optimizer"))
    name, rate = str(optimizer.pop("type", "")), ("optimizer.lr", optimizer.pop("lr", None))
    out.optimizer("optimizer.type", name, rate, ("optimizer", optimizer))
    special = {
        **dict.fromkeys(("model", "adapter", "optimizer", "dataset", "monitoring", "eval_datasets"), SKIP),
        "save_dtype": chosen("save.dtype", DTYPES),
        "activation_checkpointing": CHECKPOINTING,
        "warmup_steps": because("EmoSens has no learning rate to warm up"),
        "force_constant_lr": because("EmoSens has no learning rate to set"),
        "blocks_to_swap": BLOCKS, **dict.fromkeys(_IDLE, IDLE),
        "eval_before_first_step": because("the base is always measured first"),
    }  # fmt: skip
    out.read(words, _PLACES, special)
    if not is_off(words.get("dataset")):
        _dataset(out.beside("dataset", words["dataset"]), out)
    for held_out in each(words.get("eval_datasets")):
        _held_out(held_out, out)


def _is_dataset(words: Values) -> bool:
    return any("path" in one for one in items(words, "directory"))


def _model(words: Values, out: Import) -> None:
    base_word = next((word for word in _BASES if not is_off(words.get(word))), "")

    def another(out: Import, word: str, value: Any) -> None:
        out.lack(f"model.{word}", value, f"model.base is {base_word}") if word != base_word else BASE(out, word, value)

    def text_encoders(out: Import, word: str, value: Any) -> None:
        paths = [one.get("path") or one.get("paths") for one in items({word: value}, word)]
        if len(paths) == 1 and isinstance(paths[0], str):
            TEXT_ENCODER(out, word, paths[0])
        else:
            out.lack(word, value)

    def merged(out: Import, word: str, value: Any) -> None:
        for path in each(value):
            out.stack(word, path, 1.0)

    special = {
        **dict.fromkeys(_BASES, another), "type": SKIP, "vae": VAE, "vae_path": VAE,
        "llm_path": TEXT_ENCODER, "text_encoder_path": TEXT_ENCODER, "text_encoders": text_encoders,
        "dtype": chosen("model.dtype", DTYPES), "transformer_dtype": chosen("model.quantize", QUANTIZED),
        "diffusion_model_dtype": chosen("model.quantize", QUANTIZED), "merge_adapters": merged,
        "timestep_sample_method": chosen("train.loss.timesteps", _TIMESTEPS),
        "flux_shift": switch("train.loss.shift", "auto"), "v_pred": switch("model.prediction", "v"),
        "text_encoder_1_lr": switch("network.text_encoder"), "text_encoder_2_lr": switch("network.text_encoder"),
    }  # fmt: skip
    out.read(words, {"shift": "train.loss.shift", "min_snr_gamma": "train.loss.min_snr_gamma"}, special)


def _adapter(words: Values, out: Import) -> None:
    def fused(out: Import, word: str, value: Any) -> None:
        for one in items({word: value}, word):
            out.stack(word, one.get("path"), number(one.get("weight")))

    special = {
        "type": kind_of_adapter("lora"), "decompose_factor": factor, "dtype": IN_FLOAT32,
        "init_from_existing": CONTINUES, "fuse_adapters": fused,
    }  # fmt: skip
    out.read(words, {"rank": "network.rank", "alpha": "network.alpha"}, special, "adapter.")


def _dataset(words: Any, out: Import) -> None:
    for directory in items(words, "directory"):
        own = {**words, **directory}
        mask = own.get("mask_path")
        out.add_folder(
            "directory.path", own.get("path", ""),
            repeats=repeats_of(out, "directory.num_repeats", own.get("num_repeats")),
            mask=None if is_off(mask) else out.path(str(mask)),
        )  # fmt: skip
        for sizes in ("resolutions", "size_buckets"):
            if own.get(sizes):
                out.sizes(sizes, own[sizes])
        if own.get("shuffle_tags") or own.get("cache_shuffle_num"):
            out.caption("cache_shuffle_num", own.get("cache_shuffle_num", 1), "shuffle", True)
        if own.get("cache_shuffle_num"):
            out.caption("cache_shuffle_num", own["cache_shuffle_num"], "variants")
        if own.get("caption_prefix"):
            out.caption("caption_prefix", own["caption_prefix"], "prefix")
        out.read(directory, {}, dict.fromkeys((*_DATASET, "min_ar", "max_ar", "num_ar_buckets"), SKIP), "directory.")
    special = dict.fromkeys(_DATASET, SKIP) | dict.fromkeys(
        ("min_ar", "max_ar", "num_ar_buckets", "ar_buckets"), because(_BUCKETS)
    )
    if isinstance(words, Mapping):
        out.read(words, {}, special)


def _held_out(words: Any, out: Import) -> None:
    config = words.get("config") if isinstance(words, Mapping) else words
    path = Path(out.path(str(config)))
    found = parse_file(path, str(config)) if path.is_file() else {}
    folders = [one.get("path") for one in items(found, "directory")]
    if len(folders) == 1 and "folder" not in out.values.get("validate", {}):
        out.take("eval_datasets", config, "validate.folder", out.path(str(folders[0])))
    else:
        out.leave("eval_datasets", config, "validate.folder is one folder" if folders else "no such file")
