"""The words of other trainers and the keys they stand for; `words.py` applies them."""

from __future__ import annotations

_CAPTIONS = "dataset.captions"
_FOLDER = "dataset.folders.0"
ONE_FOLDER = ("path", "repeats", "flip", "mask", "prior", "caption")

# Where a foreign word at the top level belongs.
TOP = {
    "base_model": "model.base",
    "clip_skip": "model.clip_skip",
    "pretrained_model_name_or_path": "model.base",
    "vae": "model.vae",
    "mixed_precision": "model.dtype",
    "datasets": "dataset.folders",
    "folders": "dataset.folders",
    "train_data_dir": f"{_FOLDER}.path",
    "trigger": "dataset.trigger",
    "trigger_word": "dataset.trigger",
    "resolution": "dataset.resolution",
    "rank": "network.rank",
    "dim": "network.rank",
    "network_dim": "network.rank",
    "alpha": "network.alpha",
    "network_alpha": "network.alpha",
    "network_weights": "start_from.continue",
    "optimizer": "train.optimizer",
    "optimizer_type": "train.optimizer",
    "prompts": "sample.prompts",
    "sample_prompts": "sample.prompts",
    "sample_every_n_steps": "sample.every",
    "save_every_n_steps": "save.every",
    "save_precision": "save.dtype",
    "output_name": "name",
}

# Foreign words inside a section, and where they belong from the top.
INSIDE = {
    "model": {
        "path": "model.base",
        "name_or_path": "model.base",
        "pretrained_model_name_or_path": "model.base",
        "arch": "model.family",
        "mixed_precision": "model.dtype",
    },
    "dataset": {
        "trigger_word": "dataset.trigger",
        "folder": "dataset.folders",
        "datasets": "dataset.folders",
        "folder_path": f"{_FOLDER}.path",
        "image_dir": f"{_FOLDER}.path",
        "num_repeats": f"{_FOLDER}.repeats",
        "flip_x": f"{_FOLDER}.flip",
        "flip_aug": f"{_FOLDER}.flip",
        "mask_path": f"{_FOLDER}.mask",
        "bucket_reso_steps": "dataset.buckets.step",
        "min_bucket_reso": "dataset.buckets.min",
        "max_bucket_reso": "dataset.buckets.max",
        "caption_extension": f"{_CAPTIONS}.extension",
        "shuffle_caption": f"{_CAPTIONS}.shuffle",
        "shuffle_tokens": f"{_CAPTIONS}.shuffle",
        "keep_tokens": f"{_CAPTIONS}.keep_tokens",
        "caption_dropout_rate": f"{_CAPTIONS}.dropout",
        "caption_tag_dropout_rate": f"{_CAPTIONS}.tag_dropout",
        "token_dropout_rate": f"{_CAPTIONS}.tag_dropout",
        "caption_prefix": f"{_CAPTIONS}.prefix",
        "caption_suffix": f"{_CAPTIONS}.suffix",
        "default_caption": f"{_CAPTIONS}.default",
        **{word: f"{_FOLDER}.{word}" for word in ONE_FOLDER},
    },
    "network": {
        "dim": "network.rank",
        "r": "network.rank",
        "network_dim": "network.rank",
        "linear": "network.rank",
        "network_alpha": "network.alpha",
        "lora_alpha": "network.alpha",
        "linear_alpha": "network.alpha",
        "conv_dim": "network.conv_rank",
        "conv": "network.conv_rank",
        "lokr_factor": "network.factor",
        "target_modules": "network.targets",
        "train_text_encoder": "network.text_encoder",
    },
    "train": {
        "batch_size": "train.micro_batch_size",
        "train_batch_size": "train.micro_batch_size",
        "gradient_accumulation": "train.gradient_accumulation_steps",
        "learning_rate": "train.lr",
        "steps": "train.max_steps",
        "max_train_steps": "train.max_steps",
        "optimizer_type": "train.optimizer",
        "clip_grad_norm": "train.max_grad_norm",
        "use_ema": "train.ema",
        "min_snr_gamma": "train.loss.min_snr_gamma",
        "snr_gamma": "train.loss.min_snr_gamma",
        "noise_offset": "train.loss.noise_offset",
        "discrete_flow_shift": "train.loss.shift",
    },
    "sample": {
        "sample_every": "sample.every",
        "every_n_steps": "sample.every",
        "sample_steps": "sample.steps",
        "guidance_scale": "sample.guidance",
        "sample_prompts": "sample.prompts",
    },
    "save": {
        "save_every": "save.every",
        "every_n_steps": "save.every",
        "save_every_n_steps": "save.every",
        "max_step_saves_to_keep": "save.keep_last",
        "precision": "save.dtype",
        "save_precision": "save.dtype",
    },
}
for _section in ("train", "dataset"):  # these two hold the words that others write at the top
    for _word, _to in INSIDE[_section].items():
        if _word not in ONE_FOLDER and _word != "folder":
            TOP.setdefault(_word, _to)
for _word in ("lr", "micro_batch_size", "max_steps", "seed", "gradient_accumulation_steps"):
    TOP[_word] = f"train.{_word}"

FOLDER_WORDS = {
    "folder_path": "path",
    "image_dir": "path",
    "num_repeats": "repeats",
    "flip_x": "flip",
    "flip_aug": "flip",
    "mask_path": "mask",
    "prior_loss_weight": "prior",
    "class_tokens": "caption",
}
CAPTION_WORDS = {
    "ext": "extension",
    "caption_extension": "extension",
    "shuffle_caption": "shuffle",
    "caption_dropout_rate": "dropout",
    "dropout_rate": "dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "caption_prefix": "prefix",
    "caption_suffix": "suffix",
}
OPTIMIZER_WORDS = {"type": "name", "optimizer_type": "name"}
NESTED: dict[str, dict[str, str]] = {"captions": CAPTION_WORDS, "buckets": {}, "loss": {"ear": "baseline"}}
