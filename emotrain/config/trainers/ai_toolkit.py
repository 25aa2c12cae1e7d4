"""ai-toolkit: its YAML, one job with one process. Words: its config/examples and toolkit/config_modules.py."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from emotrain.config.aliases import INSIDE
from emotrain.config.trainers.imported import (
    BASE,
    BLOCKS,
    CACHED,
    CHECKPOINTING,
    CONTINUES,
    DTYPES,
    ENCODERS,
    IDLE,
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
    off_at,
    prompt_line,
    repeats_of,
    section,
    switch,
    unless_off,
)
from emotrain.errors import ConfigError

KEY = "ai-toolkit"  # in `FamilySpec.elsewhere`
NAME = "a config of ai-toolkit"
_CAPTIONS = {
    "caption_ext": "extension", "shuffle_tokens": "shuffle", "keep_tokens": "keep_tokens",
    "caption_dropout_rate": "dropout", "token_dropout_rate": "tag_dropout", "default_caption": "default",
}  # fmt: skip
_FOLDER = (
    "folder_path",
    "dataset_path",
    "num_repeats",
    "flip_x",
    "mask_path",
    "alpha_mask",
    "is_reg",
)
_PERCENT = ("layer_offloading_transformer_percent", "layer_offloading_text_encoder_percent")
_SAMPLE = ("prompts", "samples", "neg", "width", "height", "walk_seed", "skip_first_sample")


def recognise(words: Values) -> bool:
    """Whether a config is of this kind."""
    config = words.get("config")
    return isinstance(config, Mapping) and isinstance(config.get("process"), list)


def read(words: Values, out: Import) -> None:
    """Take a config apart into `out`.

    Raises:
        ConfigError: it has no process, or trains a model of a kind that cannot be trained here.
    """
    config = words["config"]
    processes = items(config, "process")
    if not processes:
        raise ConfigError("the config has no process to import")
    process = _named(processes[0], str(config.get("name", "")))
    if "slider" in process or not (section(process, "train") or section(process, "network")):
        what = "sliders are not trained here" if "slider" in process else "nothing is trained by it"
        raise ConfigError(f"config.process is of type `{process.get('type')}`: {what}", "its training configs are read")
    for other in processes[1:]:
        out.leave("config.process", other.get("type", ""), "one process makes one preset: the first")
    sections = {key: section(process, key) for key in ("model", "network", "save", "train", "sample", "logging")}
    _kind(sections["model"], out)
    out.name("name", config.get("name"))
    _model(sections["model"], out)
    if not is_off(trigger := process.get("trigger_word")):
        out.take("trigger_word", trigger, "dataset.trigger")
    for dataset in items(process, "datasets"):
        _dataset(dataset, out, sections["train"])
    out.halve("datasets.is_reg")
    _network(sections["network"], out)
    _train(sections["train"], out)
    _sample(sections["sample"], sections["train"], out)
    places = {word: INSIDE["save"].get(word, "save.dtype") for word in ("save_every", "max_step_saves_to_keep")}
    formats = {"diffusers": "diffusers", "safetensors": "auto"}
    special = {"dtype": chosen("save.dtype", DTYPES), "save_format": chosen("save.format", formats)}
    out.read(sections["save"], places, special, "save.")
    idle = ("type", "device", "sqlite_db_path", "performance_log_every", "log_dir")
    rest = {key: value for key, value in process.items() if key not in (*sections, "datasets", "trigger_word")}
    out.read(rest, {}, dict.fromkeys(idle, IDLE))


def _named(value: Any, name: str) -> Any:
    """`[name]` stands for the config's name wherever it is written."""
    if isinstance(value, Mapping):
        return {key: _named(one, name) for key, one in value.items()}
    if isinstance(value, list):
        return [_named(one, name) for one in value]
    return value.replace("[name]", name) if isinstance(value, str) else value


def _kind(model: Values, out: Import) -> None:
    switches = [word for word, value in model.items() if value and (word in out.models or _is_kind(word))]
    arch = str(model.get("arch") or next(iter(switches), "sd1"))
    turbo = f"{arch}:turbo"
    named = "turbo" in str(model.get("name_or_path", "")).casefold() and turbo in out.models
    known = arch in out.models or "edit" in arch  # `krea2:o_edit` is no `krea2`
    out.choose("model.arch", turbo if named else arch if known else arch.partition(":")[0])


def _is_kind(word: str) -> bool:
    """`is_lumina2`: the older way to say what `arch` says."""
    return word.startswith("is_") and word != "is_v_pred"


def _model(words: Values, out: Import) -> None:
    def quantize(out: Import, word: str, value: Any, qtype: str = "qtype", key: str = "model.quantize") -> None:
        kind, _, adapter = str(words.get(qtype, "qfloat8")).partition("|")
        if is_off(value):
            out.num_off += 1
        elif kind in QUANTIZED:
            out.take(word, f"{str(value).lower()}, {kind}", key, QUANTIZED[kind])
            if adapter:
                out.lack(f"model.{qtype}", adapter, "an adapter that belongs to their quantisation")
        else:
            out.lack(word, kind, f"{key} has int8, fp8 and nf4")

    @unless_off
    def below(out: Import, word: str, value: Any) -> None:
        out.stack(word, value, 1.0, sample=not word.endswith("assistant_lora_path"))

    special: dict[str, Any] = {
        "name_or_path": BASE, "vae_path": VAE, "te_name_or_path": TEXT_ENCODER,
        "quantize": quantize, "dtype": SKIP, "qtype": SKIP, "qtype_te": SKIP,
        "quantize_te": partial(quantize, qtype="qtype_te", key="model.quantize_text_encoders"),
        "arch": SKIP, **dict.fromkeys(out.models, SKIP), "assistant_lora_path": below, "lora_path": below,
        "text_encoder_bits": ENCODERS, "layer_offloading": BLOCKS, "auto_memory": BLOCKS,
        **dict.fromkeys((*_PERCENT, "compile", "vae_dtype", "te_dtype", "attn_masking"), IDLE),
        "is_v_pred": switch("model.prediction", "v"),
    }  # fmt: skip
    out.read(words, {}, special, "model.")


def _dataset(words: Values, out: Import, train: Values) -> None:
    path = words.get("folder_path") or words.get("dataset_path")
    if not is_off(path):
        mask = "alpha" if words.get("alpha_mask") else words.get("mask_path")
        out.add_folder(
            "folder_path", path, repeats=repeats_of(out, "datasets.num_repeats", words.get("num_repeats")),
            flip=bool(words.get("flip_x")), mask=out.path(str(mask)) if mask and mask != "alpha" else mask or None,
            prior=number(train.get("reg_weight")) if words.get("is_reg") else None,
        )  # fmt: skip
    for word, place in _CAPTIONS.items():
        value = words.get(word)
        if value is not None and (not is_off(value) or word == "caption_dropout_rate") and not words.get("is_reg"):
            text = f".{str(value).lstrip('.')}" if word == "caption_ext" else value
            out.caption(f"datasets.{word}", value, place, text)
    resolution = words.get("resolution")
    if resolution is not None:
        out.sizes("datasets.resolution", resolution)
    known = (
        *_CAPTIONS,
        *_FOLDER,
        "resolution",
        "type",
        "buckets",
        "num_frames",
        "shrink_video_to_frames",
        "network_weight",
    )
    special = dict.fromkeys(known, SKIP) | {
        "loss_multiplier": off_at(1), "mask_min_value": off_at(0) if mask_is_used(words) else IDLE,
        "cache_tensors_to_disk": CACHED, **dict.fromkeys(("fps", "num_workers", "prefetch_factor"), IDLE),
    }  # fmt: skip
    out.read(words, {}, special, "datasets.")


def mask_is_used(words: Values) -> bool:
    """Whether a dataset has masks."""
    return not is_off(words.get("mask_path")) or bool(words.get("alpha_mask"))


def _network(words: Values, out: Import) -> None:
    unet = out.kind is not None and out.kind.unet

    @unless_off
    def conv(out: Import, word: str, value: Any) -> None:
        if unet:
            out.take(word, value, "network.conv_rank")
            out.take(word, value, "network.targets", "all")
        else:
            out.leave(word, value, "this model has no convolutions to adapt")

    special = {
        "type": kind_of_adapter("lora"), "conv": conv, "pretrained_lora_path": CONTINUES,
        "lokr_full_rank": _full_rank if words.get("type") == "lokr" else SKIP,
        "lokr_factor": factor if words.get("type") == "lokr" else SKIP, "network_kwargs": _network_kwargs,
        "conv_alpha": because("one strength for all layers: network.alpha / rank"),
    }  # fmt: skip
    places = {word: place for word, place in INSIDE["network"].items() if place in ("network.rank", "network.alpha")}
    out.read(words, {**places, "rank": "network.rank", "alpha": "network.alpha"}, special, "network.")


def _full_rank(out: Import, word: str, value: Any) -> None:
    if value is False:
        out.leave(word, value, "a LoKr's factors are whole")


def _network_kwargs(out: Import, word: str, value: Any) -> None:
    for key, inner in section({word: value}, word).items():
        if is_off(inner):
            out.num_off += 1
        else:
            out.lack(f"{word}.{key}", inner, "network.targets takes regular expressions of module names")


def _train(words: Values, out: Import) -> None:
    rate = ("train.lr", words.get("lr"))
    options = ("train.optimizer_params", section(words, "optimizer_params"))
    out.optimizer("train.optimizer", str(words.get("optimizer") or ""), rate, options)
    preserves = not is_off(words.get("diff_output_preservation"))
    special = {
        **dict.fromkeys(("optimizer", "optimizer_params", "lr", "skip_first_sample", "reg_weight", "train_unet"), SKIP),
        "dtype": chosen("model.dtype", DTYPES),
        "train_text_encoder": switch("network.text_encoder"),
        "diff_output_preservation": SKIP, "diff_output_preservation_class": _class if preserves else SKIP,
        "ema_config": _ema, "timestep_type": _timesteps,
        "disable_sampling": switch("sample.every", 0),
        "noise_scheduler": because("the model's own"),
        "gradient_checkpointing": CHECKPOINTING, "unload_text_encoder": ENCODERS,
        "loss_type": off_at("mse"), "content_or_style": off_at("balanced"),
        "max_denoising_steps": IDLE if words.get("max_denoising_steps") in (999, 1000) else Import.lack,
        "diff_output_preservation_multiplier": off_at(1, "dataset.class has one strength") if preserves else IDLE,
        "bypass_guidance_embedding": IDLE,
        "switch_boundary_every": IDLE, "force_first_sample": SKIP,
    }  # fmt: skip
    places = {word: place for word, place in INSIDE["train"].items() if word not in ("learning_rate", "optimizer_type")}
    places |= {word: f"train.{word}" for word in ("max_grad_norm", "gradient_accumulation_steps", "seed")} | {
        "gradient_accumulation": "train.gradient_accumulation_steps"
    }
    out.read(words, places, special, "train.")


def _ema(out: Import, word: str, value: Any) -> None:
    if isinstance(value, Mapping) and value.get("use_ema"):
        out.take(word, value, "train.ema", True)
    else:
        out.num_off += 1


@unless_off
def _class(out: Import, word: str, value: Any) -> None:
    """The word that is kept as it was; the trigger tells the two apart."""
    if "trigger" not in out.values.get("dataset", {}):
        out.leave(word, value, "dataset.class needs a dataset.trigger")
    else:
        out.take(word, value, "dataset.class")


def _timesteps(out: Import, word: str, value: Any) -> None:
    words = {"sigmoid": "logit-normal", "linear": "uniform"}
    if str(value) == "flux_shift" and out.kind is not None and out.kind.flow:
        out.take(word, value, "train.loss.shift", "auto")
        return
    if str(value) in words:
        out.take(word, value, "train.loss.timesteps", words[str(value)])
    else:
        out.lack(word, value, "train.loss.timesteps has uniform and logit-normal")


def _sample(words: Values, train: Values, out: Import) -> None:
    width, height = words.get("width"), words.get("height")
    square = width == height
    if train.get("skip_first_sample"):
        out.take("train.skip_first_sample", True, "sample.at_start", False)
    if square and width:
        out.take("sample.width, sample.height", width, "sample.size")
    lines = []
    for one in each(words.get("samples")) or each(words.get("prompts")):
        own = section({"sample": {"prompt": one} if isinstance(one, str) else one}, "sample")
        for word, value in own.items():
            if word in ("network_multiplier", "ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3"):
                instead = "sample.strengths, for all prompts" if word == "network_multiplier" else ""
                off_at(usual_multiplier(value), instead)(out, f"sample.samples: {word}", value)
        lines.append(
            prompt_line(
                str(own.get("prompt", "")), n=own.get("neg", words.get("neg")),
                w=own.get("width", None if square else width), h=own.get("height", None if square else height),
                d=own.get("seed"), l=own.get("guidance_scale"), s=own.get("sample_steps"),
            )
        )  # fmt: skip
    out.prompts("sample.samples" if words.get("samples") else "sample.prompts", lines)
    if words.get("walk_seed"):
        out.leave("sample.walk_seed", True, "all prompts have the seed, so that sheets can be compared")
    places = {
        word: INSIDE["sample"].get(word, f"sample.{word}")
        for word in ("seed", "sample_every", "sample_steps", "guidance_scale")
    }
    special = {
        "network_multiplier": off_at(usual_multiplier(words.get("network_multiplier")), "sample.strengths"),
        **dict.fromkeys((*_SAMPLE, "sampler", "num_frames", "fps", "format"), SKIP),
        "sample_start_step": off_at(0),
        "sample_every": lambda out, word, value: train.get("disable_sampling") or out.take(word, value, "sample.every"),
    }
    out.read(words, places, special, "sample.")


def usual_multiplier(value: Any) -> Any:
    """The value itself where it says "as it is": `1`, `"1.0"`."""
    try:
        return value if float(value) == 1.0 else None
    except (TypeError, ValueError):
        return None
