"""kohya's sd-scripts and its GUI: training config (TOML or JSON), dataset config (TOML or JSON), arguments of the GUI.

Sections of a training config only group: its keys are the command line's. In a dataset config what stands at a subset
wins over its dataset, and that over `[general]`. Words: sd-scripts, docs/config_README-en.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emotrain.config.aliases import TOP
from emotrain.config.prompts import is_prompt_file
from emotrain.config.text import read_text
from emotrain.config.trainers.files import parse_file
from emotrain.config.trainers.imported import (
    BASE,
    BLOCKS,
    CACHED,
    CHECKPOINTING,
    CONTINUES,
    DTYPES,
    IDLE,
    IN_FLOAT32,
    SKIP,
    TEXT_ENCODER,
    VAE,
    Import,
    Special,
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

KEY = "kohya"  # in `FamilySpec.elsewhere`
NAME = "a config of kohya's sd-scripts"
_MARKS = frozenset(("pretrained_model_name_or_path", "train_data_dir", "dataset_config", "network_module", "LoRA_type"))
_SHARE = {"validation_split": "validate.fraction"}
_PLACES = _SHARE | {
    word: TOP[word]
    for word in (
        "network_dim", "network_alpha", "save_every_n_steps", "bucket_reso_steps", "min_bucket_reso",
        "max_bucket_reso", "train_batch_size", "batch_size", "gradient_accumulation_steps", "max_train_steps",
        "min_snr_gamma", "noise_offset", "discrete_flow_shift", "sample_every_n_steps", "seed",
    )
}  # fmt: skip
_CAPTIONS = {
    "caption_extension": "extension", "shuffle_caption": "shuffle", "keep_tokens": "keep_tokens",
    "caption_dropout_rate": "dropout", "caption_tag_dropout_rate": "tag_dropout", "caption_prefix": "prefix",
    "caption_suffix": "suffix",
}  # fmt: skip
_FOLDERS = frozenset(
    (
        "image_dir", "class_tokens", "is_reg", "num_repeats", "flip_aug", "conditioning_data_dir", "alpha_mask",
        "subsets", "train_data_dir", "image_folder", "reg_data_dir", "prior_loss_weight", "masked_loss",
        "dataset_repeats",
    )
)  # fmt: skip


_KIND = kind_of_adapter(
    "Standard", "Flux1", "Kohya LoCon", "LyCORIS/LoCon", "locon", "lora", "networks.lora", "networks.lora_flux",
    "networks.lora_sd3", "networks.lora_anima",
)  # fmt: skip
# How it is started, how files are read, and what the GUI keeps for itself.
_IDLE = (
    "num_cpu_threads_per_process", "num_processes", "num_machines", "multi_gpu", "gpu_ids", "main_process_port",
    "dynamo_mode", "dynamo_backend", "dynamo_use_dynamic", "dynamo_use_fullgraph", "extra_accelerate_launch_args",
    "max_data_loader_n_workers", "persistent_data_loader_workers", "vae_batch_size", "sd3_text_encoder_batch_size",
    "model_list", "train_on_input", "unit", "full_path", "save_model_as", "use_safetensors", "sample_sampler",
    "LyCORIS_preset", "use_cp", "bypass_mode", "dora_wd", "vae_chunk_size", "vae_disable_cache", "highvram", "lowvram",
    "skip_cache_check", "t5xxl_max_token_length", "t5xxl_dtype", "interpolation_type", "latent_metadata_filename",
    "noise_offset_type", "dim_from_weights",
)  # fmt: skip
_L2 = ("l2", "mse", "", None)


def recognise(words: Values) -> bool:
    """Whether a config is of this kind."""
    return bool(_MARKS & set(_flat(words))) or _is_dataset(words)


def read(words: Values, out: Import) -> None:
    """Take a config apart into `out`."""
    if _is_dataset(words):
        _datasets(words, out, 1.0)
        out.halve("is_reg")
        return
    flat = _flat(words)
    _kind(flat, out)
    weight = number(flat.get("prior_loss_weight"))
    _optimizer(flat, out)
    special = {
        **dict.fromkeys(out.models, SKIP),
        "pretrained_model_name_or_path": BASE, "vae": VAE, "ae": VAE, "qwen3": TEXT_ENCODER,
        "output_name": Import.name,
        "mixed_precision": chosen("model.dtype", DTYPES), "save_precision": chosen("save.dtype", DTYPES),
        "fp8_base": switch("model.quantize", "fp8"),
        "fp8_base_unet": switch("model.quantize", "fp8"),
        "v_parameterization": switch("model.prediction", "v"),
        "max_grad_norm": _max_grad_norm,
        "network_module": _KIND, "LoRA_type": _KIND, "conv_alpha": SKIP,
        "factor": factor if str(flat.get("LoRA_type")).endswith("LoKr") else SKIP,
        "conv_dim": _conv if "LoCon" in str(flat.get("LoRA_type")) else SKIP, "network_args": _network_args,
        "network_train_unet_only": switch("network.text_encoder", False),
        "sample_prompts": _sample_prompts,
        "resolution": _resolution, "max_resolution": _resolution,
        "network_weights": CONTINUES, "lora_network_weights": CONTINUES, "clip_skip": _clip_skip,
        "train_text_encoder": switch("network.text_encoder"),
        "timestep_sampling": _timesteps, "weighting_scheme": _weighting, **_left_out(flat),
        "base_weights": lambda out, word, value: _base_weights(out, word, value, flat),
        **dict.fromkeys(("dataset_config", "optimizer_type", "optimizer", "optimizer_args", "learning_rate",
                         "base_weights_multiplier",
                         "use_8bit_adam", "use_lion_optimizer", *_FOLDERS, *_CAPTIONS), SKIP),
    }  # fmt: skip
    out.read(flat, _PLACES, special)
    config = flat.get("dataset_config")
    if is_off(config):
        _folders(flat, out, weight)
    else:
        _datasets(out.beside("dataset_config", config), out, weight)
    out.halve("reg_data_dir" if is_off(config) else "is_reg")


def _left_out(flat: Values) -> dict[str, Special]:
    """Words that are left out for a reason, and those that say nothing at the values that they have by themselves."""
    losses = IDLE if flat.get("loss_type") in _L2 else Import.lack
    pyramid = IDLE if flat.get("noise_offset_type") == "Original" else off_at(0)
    scheme = str(flat.get("weighting_scheme"))
    normal = {"logit_mean": off_at(0), "logit_std": off_at(1)}
    encoders = off_at(None, "name a folder of diffusers, or one file that holds them all, as model.base")
    rates = (word for word in flat if word.startswith(("learning_rate_te", "text_encoder_lr")))
    return {
        "gradient_checkpointing": CHECKPOINTING, "blocks_to_swap": BLOCKS,
        **dict.fromkeys(("full_bf16", "full_fp16"), IN_FLOAT32),
        **dict.fromkeys(("no_half_vae", "sdxl_no_half_vae"), because("the VAE takes the precision that it needs")),
        **dict.fromkeys((word for word in flat if "cache_text_encoder_outputs" in word), CACHED),
        **dict.fromkeys(("lr_warmup", "lr_scheduler_power", "lr_decay_steps"), because("there is no schedule")),
        **dict.fromkeys(rates, because("there is one rate, and EmoSens needs none")),
        **dict.fromkeys(("clip_l", "clip_g", "t5xxl"), encoders),
        "model_prediction_type": because("the model's own"), "max_timestep": off_at(1000),
        "train_blocks": off_at("all"), "text_encoder_lr": switch("network.text_encoder"),
        **dict.fromkeys(("loss_type", "huber_c", "huber_schedule", "huber_scale"), losses),
        **dict.fromkeys(("multires_noise_iterations", "multires_noise_discount"), pyramid),
        "mode_scale": off_at(0) if "mode" in scheme else IDLE,
        **(normal if scheme == "logit_normal" else dict.fromkeys(normal, IDLE)), **dict.fromkeys(_IDLE, IDLE),
    }  # fmt: skip


def _is_dataset(words: Values) -> bool:
    found = items(words, "datasets")
    return any("subsets" in one for one in found) or bool(found) and set(words) <= {"datasets", "general"}


def _flat(words: Values) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in words.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    return flat


def _kind(flat: Values, out: Import) -> None:
    """The kind of model, by the network's module or the GUI's switches; for SD 1.x nothing says it."""
    if not is_off(other := flat.get("model_type")) and f"lora_{other}" not in out.models:  # of lora_flux: `chroma`
        out.choose("model_type", str(other))
        return
    module = str(flat.get("network_module", "")).rpartition(".")[2]
    for word in (module, str(flat.get("LoRA_type")), *(word for word, value in flat.items() if not is_off(value))):
        if word in out.models:
            out.choose(word, word)
            return


def _optimizer(flat: Values, out: Import) -> None:
    old = next((word for word in ("use_8bit_adam", "use_lion_optimizer") if flat.get(word)), None)
    word = next((word for word in ("optimizer_type", "optimizer", old) if word and not is_off(flat.get(word))), "")
    name = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}.get(word, str(flat.get(word) or ""))
    rate = ("learning_rate", flat.get("learning_rate"))
    out.optimizer(word, name, rate, ("optimizer_args", _pairs(flat.get("optimizer_args"))))


def _pairs(listed: Any) -> dict[str, Any]:
    """`["a=1", "b=2"]` or `a=1 b=2`; the values are Python's."""
    words = listed.split() if isinstance(listed, str) else listed if isinstance(listed, list) else []
    return {key: _literal(value) for key, _, value in (str(word).partition("=") for word in words) if key}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _folders(flat: Values, out: Import, weight: float) -> None:
    """Folders of the arguments themselves; their subfolders are named `10_mika woman`.

    Such a name is also the caption of pictures that have none.
    """
    own: dict[str, Any] = {"mask": _mask(flat, out), "flip": bool(flat.get("flip_aug"))}
    for word, prior in (("train_data_dir", None), ("image_folder", None), ("reg_data_dir", weight)):
        if is_off(flat.get(word)):
            continue
        named = _named_folders(Path(out.path(str(flat[word]))))
        if len(named) > 1:
            for path, repeats, caption in named:
                out.add_folder(word, str(path), repeats=repeats, prior=prior, caption=caption, **own)
        else:
            out.add_folder(word, flat[word], prior=prior, caption=named[0][2] if named else None, **own)
    _captions(flat, out)


def _named_folders(folder: Path) -> list[tuple[Path, int, str]]:
    """The subfolders named `10_mika woman`, with their repeats and their caption."""
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    named = ((path, re.fullmatch(r"(\d{1,3})_(.*)", path.name)) for path in inner if path.is_dir())
    return [(path, int(found[1]), found[2].strip()) for path, found in named if found and int(found[1])]


def _datasets(words: Any, out: Import, weight: float) -> None:
    for dataset in items(words, "datasets"):
        whole = {**section(words, "general"), **dataset}
        special = {"resolution": _resolution, **dict.fromkeys(_IDLE, IDLE)}
        out.read(whole, _PLACES, special | dict.fromkeys((*_FOLDERS, *_CAPTIONS), SKIP))
        for subset in items(dataset, "subsets"):
            own = {**whole, **subset}
            if is_off(own.get("image_dir")):
                out.lack("metadata_file", own.get("metadata_file", ""), "captions are files beside the pictures")
                continue
            out.add_folder(
                "image_dir", own["image_dir"], mask=_mask(own, out),
                repeats=repeats_of(out, "num_repeats", own.get("num_repeats")),
                flip=bool(own.get("flip_aug")), caption=own.get("class_tokens"),
                prior=weight if own.get("is_reg") else None,
            )  # fmt: skip
            if not own.get("is_reg"):
                _captions(own, out)
            out.read(subset, _SHARE, dict.fromkeys((*_FOLDERS, *_CAPTIONS), SKIP))


def _mask(words: Values, out: Import) -> str | None:
    if words.get("alpha_mask"):
        return "alpha"
    folder = words.get("conditioning_data_dir")
    return None if is_off(folder) else out.path(str(folder))


def _captions(words: Values, out: Import) -> None:
    for word, place in _CAPTIONS.items():
        value = words.get(word)
        if value is not None and (not is_off(value) or word == "caption_dropout_rate"):
            out.caption(word, value, place)


def _max_grad_norm(out: Import, word: str, value: Any) -> None:
    if is_off(value):
        out.set(word, value, "train.max_grad_norm", None)
    else:
        out.take(word, value, "train.max_grad_norm")


@unless_off
def _conv(out: Import, word: str, value: Any) -> None:
    out.take(word, value, "network.conv_rank")
    out.take(word, value, "network.targets", "all")


def _timesteps(out: Import, word: str, value: Any) -> None:
    """`sigmoid` is a logit-normal density; `shift` and `flux_shift` are it with a shift, given or by the resolution."""
    known = {"uniform": "uniform", "sigmoid": "logit-normal", "shift": "logit-normal", "flux_shift": "logit-normal"}
    if value in known:
        out.take(word, value, "train.loss.timesteps", known[value])
        if value == "flux_shift":
            out.take(word, value, "train.loss.shift", "auto")
    else:  # `sigma` leaves it to weighting_scheme
        off_at("sigma")(out, word, value)


def _weighting(out: Import, word: str, value: Any) -> None:
    if value == "logit_normal":
        out.take(word, value, "train.loss.timesteps", "logit-normal")
    else:
        off_at("uniform")(out, word, value)


def _clip_skip(out: Import, word: str, value: Any) -> None:
    """SD 1.x and 2.x alone, of which no word tells: SDXL takes the last layer but one whatever kohya is told."""
    if is_off(value) or value == 1:
        out.num_off += 1
    elif out.kind is None:
        out.take(word, value, "model.clip_skip")
    else:
        out.leave(word, value, "SDXL takes the last layer of CLIP but one by itself; newer models choose none")


def _network_args(out: Import, word: str, value: Any) -> None:
    for key, text in _pairs(value).items():
        if key == "conv_dim":
            _conv(out, f"{word}: {key}", text)
        elif key == "conv_alpha":
            out.leave(f"{word}: {key}", text, "one strength for all layers: network.alpha / network.rank")
        elif key == "factor":
            factor(out, f"{word}: {key}", text)
        elif key == "algo":
            _KIND(out, f"{word}: {key}", text)
        else:
            out.lack(f"{word}: {key}", text)


def _resolution(out: Import, word: str, value: Any) -> None:
    """`512`, `"768,512"` and `[768, 512]` are one size, given by its sides."""
    numbers = [int(one) for one in re.findall(r"\d+", value)] if isinstance(value, str) else value
    out.sizes(word, [numbers] if isinstance(numbers, list) and len(numbers) == 2 else numbers)


def _base_weights(out: Import, word: str, value: Any, flat: Values) -> None:
    weights = flat.get("base_weights_multiplier") or []
    for index, path in enumerate([value] if isinstance(value, str) else each(value)):
        out.stack(word, path, number(weights[index]) if isinstance(weights, list) and index < len(weights) else 1.0)


def _sample_prompts(out: Import, word: str, value: Any) -> None:
    """Prompts in the GUI's text, or in a file: a line each, TOML, or JSON."""
    if is_off(value):
        return
    text = str(value)
    if text.lower().endswith((".toml", ".json")):
        out.prompts(word, [_from_table(one) for one in _tables(parse_file(Path(out.path(text)), text))])
    elif is_prompt_file(text):
        path = Path(out.path(text))
        if path.is_file():
            out.prompts(word, read_text(path, text).splitlines())
        else:
            out.leave(word, value, "no such file")
    else:
        out.prompts(word, text.splitlines())


def _tables(found: Any) -> list[Values]:
    """The prompts of a JSON list, or of TOML's `[prompt]` with its `[[prompt.subset]]`s."""
    if isinstance(found, list):
        return items({"prompts": found}, "prompts")
    whole = section(found, "prompt")
    return [{**whole, **one} for one in items(whole, "subset")]


def _from_table(one: Values) -> str:
    return prompt_line(
        str(one.get("prompt", "")), n=one.get("negative_prompt"), w=one.get("width"), h=one.get("height"),
        d=one.get("seed"), l=one.get("scale"), s=one.get("sample_steps"),
    )  # fmt: skip
