"""`emotrain import`: every word of a config, what it was taken as, and why others were left out.

The configs in `foreign/` are written for these tests after each trainer's documented words.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from emotrain.cli.app import main
from emotrain.config.load import load
from emotrain.errors import ConfigError
from emotrain.runs.imports import Imported, import_config

pytestmark = pytest.mark.usefixtures("counted_once")

FOREIGN = Path(__file__).parent / "foreign"
EXAMPLE = Path(__file__).parents[2] / "emotrain" / "assets" / "example"
CONFIGS = ("kohya_sdxl.toml", "kohya_dataset.toml", "kohya_gui.json", "kohya_emo.toml", "ai_toolkit.yaml",
           "onetrainer.json", "diffusion_pipe.toml", "diffusion_pipe_dataset.toml")  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configs, and the folders of pictures that they name."""
    shutil.copytree(FOREIGN, tmp_path, dirs_exist_ok=True)
    names = sorted(path.stem for path in EXAMPLE.glob("*.png"))
    for index, folder in enumerate(("pictures", "more", "regular", "heldout", "kohya_folders/10_mika")):
        (tmp_path / folder).mkdir(parents=True)
        for name in names[5 * index : 5 * index + 5]:
            for ending in (".png", ".txt"):
                shutil.copy(EXAMPLE / f"{name}{ending}", tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(config: str, model: str | None = None) -> Imported:
    return import_config(Path(config), model, Path())


def became(config: str) -> dict[str, tuple[str, str]]:
    """Word -> what became of it, and as what or why; the last row of a word."""
    return {row.word: (row.kind, row.what) for row in imported(config).rows}


KOHYA = {
    "pretrained_model_name_or_path": ("taken", "model.base"),
    "vae": ("taken", "model.vae"),
    "network_dim": ("taken", "network.rank"),
    "network_alpha": ("taken", "network.alpha"),
    "network_train_unet_only": ("taken", "network.text_encoder: false"),
    "network_args: conv_dim": ("taken", "network.targets: all"),
    "network_args: conv_alpha": ("left out", "one strength"),
    "output_name": ("taken", "name"),
    "output_dir": ("left out", "runs go to ./runs"),
    "max_train_steps": ("taken", "train.max_steps"),
    "max_train_epochs": ("left out", "stops automatically"),
    "gradient_accumulation_steps": ("taken", "train.gradient_accumulation_steps"),
    "max_grad_norm": ("taken", "train.max_grad_norm: null"),
    "min_snr_gamma": ("taken", "train.loss.min_snr_gamma"),
    "noise_offset": ("taken", "train.loss.noise_offset"),
    "seed": ("taken", "train.seed"),
    "mixed_precision": ("taken", "model.dtype"),
    "save_precision": ("taken", "save.dtype"),
    "sample_prompts": ("taken", "sample.prompts"),
    "sample_prompts: --ss": ("no equivalent", ""),
    "sample_every_n_steps": ("taken", "sample.every"),
    "save_every_n_epochs": ("left out", "count steps"),
    "resolution": ("taken", "dataset.resolution: [1024]"),
    "batch_size": ("taken", "train.micro_batch_size"),
    "min_bucket_reso": ("taken", "dataset.buckets.min"),
    "max_bucket_reso": ("taken", "dataset.buckets.max"),
    "enable_bucket": ("left out", "keep their shape"),
    "bucket_no_upscale": ("left out", "buckets.upscale"),
    "caption_extension": ("taken", "dataset.captions.extension"),
    "shuffle_caption": ("taken", "dataset.captions.shuffle"),
    "keep_tokens": ("left out", "one for all folders: 1"),
    "optimizer_type": ("left out", "`train: {optimizer: adamw, lr: 0.0001}` would keep it"),
    "learning_rate": ("left out", "no learning rate to set: it is 1.0"),
    "unet_lr": ("left out", "needs none"),
    "optimizer_args: weight_decay": ("left out", "belongs to AdamW8bit"),
    "lr_scheduler": ("left out", "no schedule"),
    "lr_warmup_steps": ("left out", "no schedule"),
    "network_module": ("left out", "it is a LoRA"),
    "cache_latents": ("left out", "always cached"),
    "xformers": ("left out", "fused"),
    "clip_skip": ("taken", "model.clip_skip"),
}
GUI = {
    "max_resolution": ("taken", "dataset.resolution: [1024]"),
    "train_data_dir": ("taken", "dataset.folders"),
    "caption_dropout_rate": ("taken", "dataset.captions.dropout"),
    "train_batch_size": ("taken", "train.micro_batch_size"),
    "text_encoder_lr": ("taken", "network.text_encoder: true"),
    "fp8_base": ("taken", "model.quantize: fp8"),
    "bucket_reso_steps": ("taken", "dataset.buckets.step"),
    "optimizer": ("left out", "{optimizer: prodigy, lr: 1}"),
    "epoch": ("left out", "stops automatically"),
    "LoRA_type": ("left out", "it is a LoRA"),
    "loss_type": ("no equivalent", ""),
}
EMO = {
    "optimizer_type": ("taken", "train.optimizer.name: emosens"),
    "optimizer_args: use_shadow": ("taken", "train.optimizer.use_shadow"),
    "optimizer_args: stopcoef": ("taken", "train.optimizer.stopcoef"),
    "optimizer_args: clip": ("no equivalent", ""),
    "learning_rate": ("left out", "has its own"),
    "resolution": ("taken", "dataset.resolution: [627]"),
}
AI_TOOLKIT = {
    "name": ("taken", "name"),
    "trigger_word": ("taken", "dataset.trigger"),
    "model.name_or_path": ("taken", "model.base"),
    "model.quantize": ("taken", "model.quantize: fp8"),
    "model.low_vram": ("left out", "write `model.memory: 8gb`"),
    "network.linear": ("taken", "network.rank"),
    "network.linear_alpha": ("taken", "network.alpha"),
    "network.network_kwargs.only_if_contains": ("no equivalent", "network.targets"),
    "datasets.resolution": ("taken", "dataset.resolution"),
    "datasets.caption_ext": ("taken", "dataset.captions.extension"),
    "datasets.caption_dropout_rate": ("taken", "dataset.captions.dropout"),
    "datasets.cache_latents_to_disk": ("left out", "always cached"),
    "train.steps": ("taken", "train.max_steps"),
    "train.batch_size": ("taken", "train.micro_batch_size"),
    "train.gradient_accumulation": ("taken", "train.gradient_accumulation_steps"),
    "train.timestep_type": ("taken", "train.loss.timesteps: logit-normal"),
    "train.ema_config": ("taken", "train.ema"),
    "train.dtype": ("taken", "model.dtype"),
    "train.optimizer": ("left out", "EmoSens takes its place"),
    "train.lr": ("left out", "it is 1.0"),
    "train.optimizer_params: weight_decay": ("left out", "belongs to"),
    "train.diff_output_preservation_class": ("taken", "dataset.class"),
    "train.skip_first_sample": ("taken", "sample.at_start: false"),
    "sample.prompts": ("taken", "sample.prompts"),
    "sample.sample_every": ("taken", "sample.every"),
    "sample.walk_seed": ("left out", "can be compared"),
    "sample.guidance_scale": ("taken", "sample.guidance"),
    "sample.sample_steps": ("taken", "sample.steps"),
    "save.dtype": ("taken", "save.dtype"),
    "save.save_every": ("taken", "save.every"),
    "save.max_step_saves_to_keep": ("taken", "save.keep_last"),
    "training_folder": ("left out", "runs go to"),
}
ONETRAINER = {
    "base_model_name": ("taken", "model.base"),
    "output_model_destination": ("taken", "name"),
    "output_model_format": ("taken", "save.format: kohya"),
    "output_dtype": ("taken", "save.dtype: bf16"),
    "resolution": ("taken", "dataset.resolution"),
    "loss_weight_fn": ("taken", "train.loss.min_snr_gamma: 5"),
    "offset_noise_weight": ("taken", "train.loss.noise_offset"),
    "layer_filter_preset": ("taken", "network.targets: attn"),
    "lora_rank": ("taken", "network.rank"),
    "lora_alpha": ("taken", "network.alpha"),
    "unet.weight_dtype": ("taken", "model.quantize: fp8"),
    "vae.model_name": ("taken", "model.vae"),
    "save_every": ("taken", "save.every"),
    "sample_after": ("left out", "counts steps"),
    "concepts: VALIDATION": ("taken", "validate.folder"),
    "concepts": ("left out", "switched off"),
    "concepts.text.enable_tag_shuffling": ("taken", "dataset.captions.shuffle"),
    "concepts.text.keep_tags_count": ("taken", "dataset.captions.keep_tokens"),
    "concepts.text.tag_dropout_probability": ("taken", "dataset.captions.tag_dropout"),
    "concepts.image.enable_random_hue": ("no equivalent", ""),
    "text_encoder.dropout_probability": ("taken", "dataset.captions.dropout"),
    "samples": ("taken", "sample.prompts"),
    "epochs": ("left out", "stops automatically"),
    "learning_rate": ("left out", "it is 1.0"),
    "learning_rate_scheduler": ("left out", "no schedule"),
    "training_method": ("left out", "it is a LoRA"),
    "unmasked_weight": ("no equivalent", ""),
}
DIFFUSION_PIPE = {
    "diffusion_model": ("taken", "model.base"),
    "vae": ("taken", "model.vae"),
    "text_encoders": ("taken", "model.text_encoder"),
    "dtype": ("taken", "model.dtype: bf16"),
    "diffusion_model_dtype": ("taken", "model.quantize: fp8"),
    "timestep_sample_method": ("taken", "train.loss.timesteps: logit-normal"),
    "shift": ("taken", "train.loss.shift"),
    "adapter.rank": ("taken", "network.rank"),
    "adapter.type": ("left out", "it is a LoRA"),
    "max_steps": ("taken", "train.max_steps"),
    "micro_batch_size_per_gpu": ("taken", "train.micro_batch_size"),
    "gradient_clipping": ("taken", "train.max_grad_norm"),
    "save_every_n_steps": ("taken", "save.every"),
    "save_dtype": ("taken", "save.dtype: bf16"),
    "eval_datasets": ("taken", "validate.folder"),
    "eval_every_n_steps": ("taken", "validate.every"),
    "resolutions": ("taken", "dataset.resolution: [512, 1024]"),
    "directory.num_repeats": ("left out", "whole numbers: 3"),
    "cache_shuffle_num": ("taken", "dataset.captions.variants"),
    "num_ar_buckets": ("left out", "keep their shape"),
    "optimizer.lr": ("left out", "it is 1.0"),
    "optimizer.type": ("left out", "adamw, lr: 2e-05"),
    "blocks_to_swap": ("left out", "by themselves"),
}


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ("kohya_sdxl.toml", KOHYA),
        ("kohya_gui.json", GUI),
        ("kohya_emo.toml", EMO),
        ("ai_toolkit.yaml", AI_TOOLKIT),
        ("onetrainer.json", ONETRAINER),
        ("diffusion_pipe.toml", DIFFUSION_PIPE),
    ],
)
def test_each_word_is_taken_or_left_out_with_its_reason(config: str, rows: dict[str, tuple[str, str]]) -> None:
    found = became(config)
    for word, (kind, what) in rows.items():
        assert found[word][0] == kind, word
        assert what in found[word][1], word


def test_the_folders_come_with_their_own_settings(here: Path) -> None:
    preset = load(written(here, imported("kohya_sdxl.toml"))).preset
    first, second, prior = preset.dataset.folders
    assert (first.path, first.repeats, first.flip, first.caption) == (str(here / "pictures"), 5, True, "mika woman")
    assert second.mask == str(here / "masks")
    assert prior.prior == 1.0
    assert preset.train.max_grad_norm is None
    assert preset.sample.prompts == (
        "mika, portrait --n blurry --w 832 --h 1216 --d 1 --l 7 --s 24",
        "mika, in a garden",
    )


@pytest.mark.parametrize(
    ("kind", "taken"), [("STABLE_DIFFUSION_XL_10_BASE", False), ("FLUX_DEV_1", False), ("Z_IMAGE", True)]
)
def test_a_text_encoder_apart_is_taken_only_where_the_model_has_it_apart(kind: str, taken: bool, here: Path) -> None:
    words = json.loads((here / "onetrainer.json").read_text(encoding="utf-8"))
    words |= {"model_type": kind, "text_encoder": {"model_name": "models/text.safetensors"}}
    (here / "onetrainer.json").write_text(json.dumps(words), encoding="utf-8")
    found = became("onetrainer.json")["text_encoder.model_name"]
    assert (found[0] != "no equivalent") == taken, found


def test_a_concept_of_file_names_and_one_of_validation_are_told_apart(here: Path) -> None:
    preset = load(written(here, imported("onetrainer.json"))).preset
    assert [(folder.repeats, folder.flip, folder.prior, folder.caption) for folder in preset.dataset.folders] == [
        (3, True, None, None),
        (1, False, 1.0, "[name]"),
    ]
    assert preset.validate_.folder == str(here / "more")
    assert preset.save.every == 500


def written(folder: Path, found: Imported) -> Path:
    path = folder / "imported.yaml"
    path.write_text(found.text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("config", "extends"),
    [("kohya_gui.json", "sdxl"), ("ai_toolkit.yaml", "flux"), ("onetrainer.json", "sdxl"),
     ("diffusion_pipe.toml", "zimage"), ("kohya_dataset.toml", "sdxl"), ("kohya_sdxl.toml", None)],
)  # fmt: skip
def test_the_preset_stands_on_the_shipped_one_of_its_model(config: str, extends: str | None) -> None:
    assert yaml.safe_load(imported(config).text).get("extends") == extends  # noqa: TID251  what any reader sees


def test_the_models_own_file_says_more_than_the_config() -> None:
    text = imported("ai_toolkit.yaml", "builtin:tiny-sd").text
    assert "extends: sd15" in text
    assert "base: builtin:tiny-sd" in text


@pytest.mark.parametrize("config", CONFIGS)
def test_a_preset_from_any_of_them_is_whole(config: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two commands from another trainer's config to a preset that `check` accepts."""
    model = "builtin:tiny-flux" if config in ("ai_toolkit.yaml", "diffusion_pipe.toml") else "builtin:tiny-sd"
    (here / "masks").mkdir()
    assert main(["import", config, model, "-o", "mine.yaml"]) == 0
    assert capsys.readouterr().out.strip() == "mine.yaml"
    lines = [
        line
        for line in (here / "mine.yaml").read_text().splitlines()
        if not re.match(r"  (vae|quantize|text_en)", line)
    ]
    (here / "mine.yaml").write_text("\n".join(lines))  # of the real model's files, which are not here
    shrunk = ["--set", "dataset.resolution=64", "--set", "dataset.buckets={min: 32, max: 96, step: 16}"]
    assert main(["check", "mine.yaml", *shrunk, "--set", "network.rank=4", "--set", "train.loss={}"]) == 0


@pytest.mark.parametrize("command", ["run", "check", "plan", "lint"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_given_for_a_preset_is_answered_with_import(
    command: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, config]) == 2
    said = capsys.readouterr().err.strip()
    assert f"`emotrain import {config}`" in said
    assert len(said.splitlines()) == 1


def test_a_preset_in_json_is_still_one(here: Path) -> None:
    (here / "own.json").write_text('{"model": "builtin:tiny-sd", "dataset": "builtin:example"}')
    assert load(here / "own.json").preset.model.base == "builtin:tiny-sd"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("own.yaml", "model: builtin:tiny-sd\ndataset: builtin:example\n", "is a preset already"),
        ("other.toml", "[project]\nname = 'x'\n", "of no trainer that is known"),
        ("list.json", "[1, 2]", "of no trainer that is known"),
        ("bad.toml", "a = C:\\x", "is not TOML"),
        ("bad.json", "{", "is not JSON"),
        ("video.toml", "dataset = 'x.toml'\n[model]\ntype = 'wan'\n", "model.type is `wan`, which cannot be trained"),
        ("hidream.yaml", "config: {process: [{train: {lr: 1}, model: {arch: hidream}}]}", "model.arch is `hidream`"),
        ("edit.yaml", "config: {process: [{train: {lr: 1}, model: {arch: 'krea2:o_edit'}}]}", "arch is `krea2:o_edit`"),
        ("lumina.yaml", "config: {process: [{train: {lr: 1}, model: {is_lumina2: true}}]}", "arch is `is_lumina2`"),
        ("merge.yaml", "config: {process: [{type: merge, models: []}]}", "`merge`: nothing is trained by it"),
        ("slide.yaml", "config: {process: [{type: slider, slider: {}, train: {lr: 1}}]}", "sliders are not trained"),
        ("other.toml", "network_module = 'networks.lora_flux'\nmodel_type = 'other'\n", "model_type is `other`"),
        ("simple.json", '{"model_family": "sdxl", "data_backend_config": "x"}', "is a config of SimpleTuner"),
        ("simple2.json", '{"--model_family": "sdxl", "--rank": 16}', "is a config of SimpleTuner"),
        ("sana.json", '{"model_type": "SANA", "training_method": "LORA"}', "model_type is `SANA`"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_a_line(
    name: str, text: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / name).write_text(text)
    assert main(["import", name]) == 2
    assert says in capsys.readouterr().err


def test_nothing_is_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mika_v3.yaml").write_text("mine")
    assert main(["import", "kohya_sdxl.toml"]) == 5
    assert "-o mika_v3-2.yaml" in capsys.readouterr().err
    assert (here / "mika_v3.yaml").read_text() == "mine"


def test_relative_paths_are_looked_for_beside_the_config_and_below_the_current_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "elsewhere").mkdir()
    (here / "kohya_emo.toml").rename(here / "elsewhere" / "emo.toml")
    found = import_config(Path("elsewhere/emo.toml"), None, Path())
    assert "path: ./kohya_folders" in found.text


def leaves(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value of a config, sections and lists among them."""
    if path:
        yield path
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield from leaves(value, (*path, key))


@pytest.mark.parametrize("all_kinds", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", [*CONFIGS, "onetrainer_concepts.json"])
def test_a_value_of_another_kind_is_told_and_never_a_traceback(config: str, all_kinds: bool, here: Path) -> None:
    text = Path(config).read_text()
    read = {".toml": tomllib.loads, ".json": json.loads, ".yaml": yaml.safe_load}[Path(config).suffix]  # noqa: TID251
    source = Path("onetrainer.json" if "concepts" in config else "changed.json")
    kinds: tuple[Any, ...] = ("words", -7, [[]], {"a": 1}, True)
    for number, path in enumerate(leaves(read(text))):
        for junk in kinds if all_kinds else [kinds[number % len(kinds)]]:
            values = read(text)
            at = values
            for part in path[:-1]:
                at = at[part]
            at[path[-1]] = junk
            Path(config if "concepts" in config else source).write_text(json.dumps(values))
            try:
                found = import_config(source, None, Path())
            except ConfigError:
                continue
            load(written(here, found))


@pytest.mark.parametrize(
    ("kind", "file", "extends"),
    [
        ("z_image", "z_image_turbo_bf16.safetensors", "zimage-turbo"),
        ("z_image", "z_image_bf16.safetensors", "zimage"),
        ("flux2", "flux-2-klein-base-9b.safetensors", "klein-9b"),
        ("flux2", "flux-2-klein-base-4b.safetensors", "klein-4b"),
    ],
)
def test_a_variant_is_found_by_the_name_of_its_file(kind: str, file: str, extends: str, here: Path) -> None:
    (here / "v.toml").write_text(
        f"dataset = 'diffusion_pipe_dataset.toml'\n[model]\ntype = '{kind}'\ndiffusion_model = '{file}'\n"
    )
    assert f"extends: {extends}\n" in imported("v.toml").text


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ("kohya_emo.toml", 'network_module = "networks.lora"',
         'network_module = "lycoris.kohya"\nnetwork_args = ["algo=lokr", "factor=16"]'),
        ("kohya_gui.json", '"LoRA_type": "Standard"', '"LoRA_type": "LyCORIS/LoKr", "factor": 16'),
        ("ai_toolkit.yaml", "type: lora", "type: lokr\n        lokr_factor: 16"),
        ("onetrainer.json", '"lora_rank": 24', '"peft_type": "LOKR", "lokr_decompose_factor": 16'),
        ("diffusion_pipe.toml", "[adapter]\ntype = 'lora'", "[adapter]\ntype = 'lokr'\ndecompose_factor = 16"),
    ],
)  # fmt: skip
def test_a_lokr_stays_one_with_its_factor(config: str, before: str, after: str, here: Path) -> None:
    text = Path(config).read_text()
    assert before in text
    Path(config).write_text(text.replace(before, after))
    preset = load(written(here, imported(config))).preset
    assert (preset.network.type, preset.network.factor) == ("lokr", 16)


MINIMAL: dict[str, tuple[str, Any]] = {
    "kohya": ("k.json", {"network_module": "networks.lora_flux", "pretrained_model_name_or_path": "x.safetensors"}),
    "gui": ("g.json", {"LoRA_type": "Standard", "noise_offset_type": "Original", "loss_type": "l2"}),
    "ai-toolkit": ("a.json", {"config": {"name": "a", "process": [
        {"train": {"steps": 9}, "network": {"linear": 4}, "model": {"arch": "flux"}, "datasets": [{"folder_path": "x"}],
         "sample": {"samples": [{"prompt": "a cat"}]}, "save": {}}]}}),
    "onetrainer": ("o.json", {"model_type": "STABLE_DIFFUSION_15", "training_method": "LORA"}),
    "sdxl": ("s.json", {"model_type": "STABLE_DIFFUSION_XL_10_BASE", "training_method": "LORA"}),
    "z-image": ("z.json", {"model_type": "Z_IMAGE", "training_method": "LORA"}),
    "diffusion-pipe": ("d.json", {"model": {"type": "flux"}, "adapter": {"type": "lora"}, "dataset": "away.toml"}),
}  # fmt: skip
NOTHING = ("", "")  # a word that says nothing of the training: it is counted, and not in the table


@pytest.mark.parametrize(
    ("trainer", "place", "value", "became"),
    [
        ("kohya", "gradient_checkpointing", True, ("left out", "where the model does not fit")),
        ("kohya", "blocks_to_swap", 18, ("left out", "blocks move by themselves")),
        ("kohya", "no_half_vae", True, ("left out", "precision that it needs")),
        ("kohya", "cache_text_encoder_outputs_to_disk", True, ("left out", "always cached")),
        ("kohya", "timestep_sampling", "sigmoid", ("taken", "train.loss.timesteps: logit-normal")),
        ("kohya", "timestep_sampling", "flux_shift", ("taken", "train.loss.shift: auto")),
        ("kohya", "timestep_sampling", "sigma", NOTHING),
        ("kohya", "timestep_sampling", "qinglong", ("no equivalent", "")),
        ("kohya", "weighting_scheme", "logit_normal", ("taken", "train.loss.timesteps: logit-normal")),
        ("kohya", "weighting_scheme", "cosmap", ("no equivalent", "")),
        ("kohya", "t5xxl", "t5.safetensors", ("no equivalent", "one file that holds them all")),
        ("kohya", "learning_rate_te2", 1e-5, ("left out", "one rate")),
        ("kohya", "huber_c", 0.1, NOTHING),
        ("kohya", "max_timestep", 1000, NOTHING),
        ("kohya", "max_timestep", 900, ("no equivalent", "")),
        ("kohya", "persistent_data_loader_workers", True, NOTHING),
        ("kohya", "dataset_config", "away.toml", ("left out", "no such file")),
        ("kohya", "full_bf16", True, ("left out", "in float32")),
        ("gui", "lora_network_weights", "old.safetensors", ("taken", "start_from.continue")),
        ("gui", "multires_noise_iterations", 8, NOTHING),
        ("gui", "huber_schedule", "snr", NOTHING),
        ("gui", "loss_type", "huber", ("no equivalent", "")),
        ("gui", "resume_from_huggingface", "False", NOTHING),
        ("gui", "LoRA_type", "Kohya LoCon", ("left out", "it is a LoRA")),
        ("gui", "LoRA_type", "LyCORIS/LoHa", ("no equivalent", "a plain LoRA")),
        ("gui", "image_folder", "pictures", ("taken", "dataset.folders")),
        ("gui", "train_text_encoder", True, ("taken", "network.text_encoder")),
        ("ai-toolkit", "model.qtype", "uint3|a/b/c.safetensors", ("no equivalent", "belongs to their quantisation")),
        ("ai-toolkit", "model.text_encoder_bits", 8, ("left out", "text encoders leave")),
        ("ai-toolkit", "model.layer_offloading", True, ("left out", "blocks move by themselves")),
        ("ai-toolkit", "model.assistant_lora_path", "a.safetensors", ("taken", "weight 1, sample: false")),
        ("ai-toolkit", "model.lora_path", "a.safetensors", ("taken", "start_from.stack, weight 1")),
        ("ai-toolkit", "train.content_or_style", "balanced", NOTHING),
        ("ai-toolkit", "train.content_or_style", "style", ("no equivalent", "")),
        ("ai-toolkit", "train.timestep_type", "flux_shift", ("taken", "train.loss.shift: auto")),
        ("ai-toolkit", "train.ema_config", {"use_ema": False}, NOTHING),
        ("ai-toolkit", "train.max_denoising_steps", 1000, NOTHING),
        ("ai-toolkit", "train.unload_text_encoder", True, ("left out", "text encoders leave")),
        ("ai-toolkit", "datasets.mask_min_value", 0.1, NOTHING),
        ("ai-toolkit", "sample.network_multiplier", 1.0, NOTHING),
        ("ai-toolkit", "sample.network_multiplier", 0.8, ("no equivalent", "sample.strengths")),
        ("ai-toolkit", "save.save_format", "diffusers", ("taken", "save.format")),
        ("onetrainer", "text_encoder_layer_skip", 1, ("taken", "model.clip_skip: 2")),
        ("sdxl", "text_encoder_layer_skip", 1, ("no equivalent", "")),
        ("onetrainer", "layer_filter_preset", "blocks", ("taken", "network.targets: all")),
        ("onetrainer", "output_model_format", "ORIGINAL_SINGLE_FILE", ("left out", "a LoRA is written")),
        ("onetrainer", "attention_mechanism", "CUDNN", ("left out", "fused")),
        ("onetrainer", "compile", True, NOTHING),
        ("z-image", "text_encoder.weight_dtype", "FLOAT_8", ("taken", "model.quantize_text_encoders: fp8")),
        ("onetrainer", "unmasked_weight", 0.1, NOTHING),
        ("onetrainer", "normalize_masked_area_loss", True, ("left out", "always is")),
        ("onetrainer", "effnet_encoder", {"train": False}, NOTHING),
        ("onetrainer", "backup_after", 30, ("left out", "save.every")),
        ("onetrainer", "max_noising_strength", 0.8, ("no equivalent", "")),
        ("diffusion-pipe", "dataset", "away.toml", ("left out", "no such file")),
        ("diffusion-pipe", "caching_batch_size", 8, NOTHING),
        ("kohya", "ae", "ae.safetensors", ("taken", "model.vae")),
        ("kohya", "base_weights", ["a.safetensors"], ("taken", "start_from.stack, weight 1")),
        ("kohya", "clip_g", "g.safetensors", ("no equivalent", "one file that holds them all")),
        ("kohya", "clip_l", "l.safetensors", ("no equivalent", "one file that holds them all")),
        ("kohya", "full_fp16", True, ("left out", "in float32")),
        ("kohya", "huber_scale", 2.0, NOTHING),
        ("kohya", "logit_mean", 0.5, NOTHING),
        ("kohya", "lr_decay_steps", 10, ("left out", "no schedule")),
        ("kohya", "lr_scheduler_power", 1, ("left out", "no schedule")),
        ("kohya", "model_prediction_type", "raw", ("left out", "the model's own")),
        ("kohya", "network_weights", "old.safetensors", ("taken", "start_from.continue")),
        ("kohya", "qwen3", "q.safetensors", ("taken", "model.text_encoder")),
        ("kohya", "train_blocks", "all", NOTHING),
        ("kohya", "train_blocks", "single", ("no equivalent", "")),
        ("kohya", "timestep_sampling", "uniform", ("taken", "train.loss.timesteps")),
        ("kohya", "weighting_scheme", "uniform", NOTHING),
        ("kohya", "use_8bit_adam", True, ("left out", "optimizer: adamw")),
        ("kohya", "use_lion_optimizer", True, ("left out", "optimizer: lion")),
        ("kohya", "validation_split", 0.1, ("taken", "validate.fraction")),
        ("kohya", "validation_split", 0.0, NOTHING),
        ("kohya", "caption_prefix", "p, ", ("taken", "dataset.captions.prefix")),
        ("gui", "caption_suffix", ", s", ("taken", "dataset.captions.suffix")),
        ("gui", "caption_tag_dropout_rate", 0.1, ("taken", "dataset.captions.tag_dropout")),
        ("gui", "fp8_base_unet", True, ("taken", "model.quantize: fp8")),
        ("gui", "lr_warmup", 10, ("left out", "no schedule")),
        ("gui", "multires_noise_discount", 0.3, NOTHING),
        ("gui", "sdxl_no_half_vae", True, ("left out", "precision that it needs")),
        ("gui", "v_parameterization", True, ("taken", "model.prediction: v")),
        ("ai-toolkit", "train.attn_masking", True, ("no equivalent", "")),
        ("ai-toolkit", "model.attn_masking", True, NOTHING),
        ("ai-toolkit", "model.auto_memory", True, ("left out", "blocks move by themselves")),
        ("ai-toolkit", "model.is_v_pred", True, ("taken", "model.prediction: v")),
        ("ai-toolkit", "model.quantize_te", True, ("taken", "model.quantize_text_encoders: fp8")),
        ("ai-toolkit", "model.te_dtype", "bf16", NOTHING),
        ("ai-toolkit", "model.te_name_or_path", "t", ("taken", "model.text_encoder")),
        ("ai-toolkit", "model.vae_dtype", "bf16", NOTHING),
        ("ai-toolkit", "model.vae_path", "v.safetensors", ("taken", "model.vae")),
        ("ai-toolkit", "train.bypass_guidance_embedding", True, NOTHING),
        ("ai-toolkit", "train.diff_output_preservation_multiplier", 0.5, NOTHING),
        ("ai-toolkit", "train.disable_sampling", True, ("taken", "sample.every: 0")),
        ("ai-toolkit", "train.switch_boundary_every", 1, NOTHING),
        ("ai-toolkit", "datasets.cache_tensors_to_disk", True, ("left out", "always cached")),
        ("ai-toolkit", "datasets.default_caption", "a cat", ("taken", "dataset.captions.default")),
        ("ai-toolkit", "datasets.loss_multiplier", 1.0, NOTHING),
        ("ai-toolkit", "datasets.loss_multiplier", 0.5, ("no equivalent", "")),
        ("ai-toolkit", "datasets.num_workers", 2, NOTHING),
        ("ai-toolkit", "datasets.prefetch_factor", 2, NOTHING),
        ("ai-toolkit", "datasets.token_dropout_rate", 0.1, ("taken", "dataset.captions.tag_dropout")),
        ("ai-toolkit", "network.conv", 16, ("left out", "no convolutions")),
        ("ai-toolkit", "network.pretrained_lora_path", "old.safetensors", ("taken", "start_from.continue")),
        ("ai-toolkit", "sample.sample_start_step", 0, NOTHING),
        ("ai-toolkit", "sample.sample_start_step", 100, ("no equivalent", "")),
        ("onetrainer", "aspect_ratio_bucketing", True, ("left out", "keep their shape")),
        ("onetrainer", "clip_grad_norm", 0.5, ("taken", "train.max_grad_norm")),
        ("onetrainer", "dynamic_timestep_shifting", True, ("taken", "train.loss.shift: auto")),
        ("onetrainer", "ema", "GPU", ("taken", "train.ema: true")),
        ("onetrainer", "ema", "CPU", ("taken", "train.ema: true")),
        ("onetrainer", "ema", "OFF", NOTHING),
        ("onetrainer", "ema_update_step_interval", 5, NOTHING),
        ("onetrainer", "force_epsilon_prediction", True, ("taken", "model.prediction: epsilon")),
        ("onetrainer", "force_v_prediction", True, ("taken", "model.prediction: v")),
        ("onetrainer", "latent_caching", True, ("left out", "always cached")),
        ("onetrainer", "layer_filter_preset", "attn-mlp", ("taken", "network.targets")),
        ("onetrainer", "layer_filter_preset", "full", ("taken", "network.targets: all")),
        ("onetrainer", "lokr_dim", 4, NOTHING),
        ("onetrainer", "lora_model_name", "old.safetensors", ("taken", "start_from.continue")),
        ("onetrainer", "lora_weight_dtype", "BFLOAT_16", ("left out", "in float32")),
        ("onetrainer", "output_model_format", "COMFY_LORA", ("taken", "save.format: comfyui")),
        ("onetrainer", "output_model_format", "DIFFUSERS_LORA", ("taken", "save.format: diffusers")),
        ("onetrainer", "output_model_format", "LEGACY_LORA", ("taken", "save.format: auto")),
        ("onetrainer", "output_model_format", "ORIGINAL_LORA", ("taken", "save.format: auto")),
        ("onetrainer", "quantization", {"layer_filter": "x"}, ("left out", "chosen here")),
        ("onetrainer", "rolling_backup_count", 3, ("taken", "save.keep_last")),
        ("onetrainer", "tensorboard", True, ("taken", "log.tensorboard")),
        ("onetrainer", "timestep_distribution", "UNIFORM", ("taken", "train.loss.timesteps: uniform")),
        ("onetrainer", "timestep_distribution", "SIGMOID", ("taken", "train.loss.timesteps: logit-normal")),
        ("onetrainer", "timestep_distribution", "COS_MAP", ("no equivalent", "")),
        ("onetrainer", "timestep_shift", 3.0, ("taken", "train.loss.shift")),
        ("onetrainer", "unmasked_probability", 0.1, NOTHING),
        ("onetrainer", "validate_after", 100, NOTHING),
        (
            "diffusion-pipe",
            "adapter.fuse_adapters",
            [{"path": "a.safetensors", "weight": 0.5}],
            ("taken", "start_from.stack, weight 0.5"),
        ),
        ("diffusion-pipe", "adapter.init_from_existing", "/runs/old", ("taken", "start_from.continue")),
        ("diffusion-pipe", "eval_before_first_step", True, ("left out", "always measured first")),
        ("diffusion-pipe", "force_constant_lr", 1e-05, ("left out", "no learning rate to set")),
        ("diffusion-pipe", "model.llm_path", "llm", ("taken", "model.text_encoder")),
        ("diffusion-pipe", "model.merge_adapters", ["a.safetensors"], ("taken", "start_from.stack, weight 1")),
        ("diffusion-pipe", "model.text_encoder_1_lr", 1e-05, ("taken", "network.text_encoder: true")),
        ("diffusion-pipe", "model.text_encoder_2_lr", 0, NOTHING),
        ("diffusion-pipe", "model.text_encoder_path", "t", ("taken", "model.text_encoder")),
        ("diffusion-pipe", "model.transformer_dtype", "float8", ("taken", "model.quantize: fp8")),
        ("diffusion-pipe", "model.timestep_sample_method", "uniform", ("taken", "train.loss.timesteps")),
        ("diffusion-pipe", "model.v_pred", True, ("taken", "model.prediction: v")),
        ("diffusion-pipe", "model.vae_path", "v.safetensors", ("taken", "model.vae")),
    ],
)
def test_words_of_their_own_examples(trainer: str, place: str, value: Any, became: tuple[str, str], here: Path) -> None:
    name, config = MINIMAL[trainer]
    config = json.loads(json.dumps(config))
    *sections, word = place.split(".")
    at = config["config"]["process"][0] if trainer == "ai-toolkit" else config
    for section in sections:
        at = at.setdefault(section, {})
        at = at[0] if isinstance(at, list) else at
    at[word] = value
    if word == "qtype":
        at["quantize"] = True
    (here / name).write_text(json.dumps(config))
    found = imported(name)
    rows = [(row.kind, row.what) for row in found.rows if row.word == place or row.word == word]
    if became == NOTHING:
        assert rows == []
        assert found.num_off >= 1
    else:
        assert rows[-1][0] == became[0]
        assert became[1] in rows[-1][1]
    load(written(here, found))


@pytest.mark.parametrize(
    ("trainer", "place", "words", "became"),
    [
        ("kohya", "", {"base_weights": ["a.safetensors"], "base_weights_multiplier": [0.5]},
         ("base_weights", "taken", "weight 0.5")),
        ("kohya", "", {"weighting_scheme": "logit_normal", "logit_mean": 0.5}, ("logit_mean", "no equivalent", "")),
        ("kohya", "", {"weighting_scheme": "logit_normal", "logit_std": 2.0}, ("logit_std", "no equivalent", "")),
        ("kohya", "", {"weighting_scheme": "mode", "mode_scale": 1.3}, ("mode_scale", "no equivalent", "")),
        ("ai-toolkit", "train", {"diff_output_preservation": True, "diff_output_preservation_class": "woman",
                                 "diff_output_preservation_multiplier": 0.5},
         ("train.diff_output_preservation_multiplier", "no equivalent", "one strength")),
        ("ai-toolkit", "model", {"quantize_te": True, "qtype_te": "qint4"},
         ("model.quantize_te", "taken", "model.quantize_text_encoders: nf4")),
        ("ai-toolkit", "network", {"type": "lokr", "lokr_full_rank": False},
         ("network.lokr_full_rank", "left out", "whole")),
        ("onetrainer", "", {"validation": True, "validate_after": 50, "validate_after_unit": "STEP"},
         ("validate_after", "taken", "validate.every")),
        ("onetrainer", "", {"validation": True, "validate_after": 1, "validate_after_unit": "EPOCH"},
         ("validate_after", "left out", "counts steps")),
        ("onetrainer", "", {"peft_type": "LOKR", "lokr_dim": 4}, ("lokr_dim", "left out", "whole")),
        ("onetrainer", "", {"masked_training": True, "unmasked_probability": 0.1},
         ("unmasked_probability", "no equivalent", "")),
    ],
)  # fmt: skip
def test_words_that_mean_something_beside_another(
    trainer: str, place: str, words: dict[str, Any], became: tuple[str, str, str], here: Path
) -> None:
    name, config = MINIMAL[trainer]
    config = json.loads(json.dumps(config))
    at = config["config"]["process"][0] if trainer == "ai-toolkit" else config
    (at.setdefault(place, {}) if place else at).update(words)
    (here / name).write_text(json.dumps(config))
    found = imported(name)
    rows = [(row.kind, row.what) for row in found.rows if row.word == became[0]]
    assert rows[-1][0] == became[1]
    assert became[2] in rows[-1][1]
    load(written(here, found))


def test_regularisation_folders_of_ai_toolkit_count_what_reg_weight_says(here: Path) -> None:
    name, config = MINIMAL["ai-toolkit"]
    config = json.loads(json.dumps(config))
    process = config["config"]["process"][0]
    process["train"]["reg_weight"] = 0.5
    process["datasets"].append({"folder_path": "regular", "is_reg": True})
    (here / name).write_text(json.dumps(config))
    dataset = load(written(here, imported(name))).preset.dataset
    assert [folder.prior for folder in dataset.folders] == [None, 0.5]
    assert dataset.balance == "equal"  # every second step is theirs there


def kohya(here: Path, **words: Any) -> Imported:
    """A config of a training on folders named as kohya names them."""
    for name in ("train/10_mika woman", "more/5_mika dress", "reg/1_woman"):
        (here / "kohya" / name).mkdir(parents=True)
    shutil.copytree(here / "kohya" / "train", here / "kohya" / "several")
    shutil.copytree(here / "kohya" / "more", here / "kohya" / "several", dirs_exist_ok=True)
    base = {"pretrained_model_name_or_path": "builtin:tiny-sd", "network_module": "networks.lora"}
    (here / "kohya" / "k.json").write_text(json.dumps(base | words))
    return imported("kohya/k.json")


def test_a_folders_name_is_the_caption_of_pictures_without_one_as_kohya_has_it(here: Path) -> None:
    found = kohya(here, train_data_dir="train", reg_data_dir="reg")
    dataset = load(written(here, found)).preset.dataset
    assert [Path(one.path).name for one in dataset.folders] == ["train", "reg"]
    assert [one.caption for one in dataset.folders] == ["mika woman", "woman"]
    assert [one.prior for one in dataset.folders] == [None, 1.0]
    assert dataset.balance == "equal"  # regularisation pictures are half of kohya's samples


def test_several_named_folders_of_kohya_become_one_each(here: Path) -> None:
    found = kohya(here, train_data_dir="several", reg_data_dir="reg")
    dataset = load(written(here, found)).preset.dataset
    assert [(Path(one.path).name, one.repeats, one.caption) for one in dataset.folders] == [
        ("10_mika woman", 10, "mika woman"), ("5_mika dress", 5, "mika dress"), ("reg", 1, "woman"),
    ]  # fmt: skip
    assert dataset.balance == "repeats"
    (row,) = [row for row in found.rows if row.word == "reg_data_dir" and row.kind == "left out"]
    assert "dataset.balance" in row.what


def test_regularisation_pictures_that_count_nothing_are_not_trained_as_others(here: Path) -> None:
    found = kohya(here, train_data_dir="train", reg_data_dir="reg", prior_loss_weight=0)
    dataset = load(written(here, found)).preset.dataset
    assert [Path(one.path).name for one in dataset.folders] == ["train"]
    assert dataset.balance == "repeats"


def test_one_word_for_several_models_is_told_apart(here: Path) -> None:
    for name, config, preset in (
        ("c.json", {"network_module": "networks.lora_flux", "model_type": "chroma"}, "chroma"),
        ("f.json", {"network_module": "networks.lora_flux", "model_type": "flux"}, "flux"),
        ("d.json", {"model_type": "FLUX_2", "base_model_name": "black-forest-labs/FLUX.2-dev"}, "flux2-dev"),
        ("k.json", {"model_type": "FLUX_2", "base_model_name": "./flux-2-klein-base-9b.safetensors"}, "klein-9b"),
    ):
        (here / name).write_text(json.dumps(config))
        assert f"extends: {preset}\n" in imported(name).text


def test_a_quantisation_of_fewer_bits_is_nf4(here: Path) -> None:
    name, config = MINIMAL["ai-toolkit"]
    config["config"]["process"][0]["model"] |= {"quantize": True, "qtype": "uint3|a/b/c.safetensors"}
    (here / name).write_text(json.dumps(config))
    assert load(written(here, imported(name))).preset.model.quantize == "nf4"


def test_sizes_of_buckets_and_splits_are_taken(here: Path) -> None:
    (here / "b.toml").write_text("size_buckets = [[960, 960, 1], [1280, 720, 1]]\n[[directory]]\npath = 'pictures'\n")
    assert "resolution:\n  - 960\n" in imported("b.toml").text
    (here / "v.toml").write_text(
        "[general]\nvalidation_split = 0.1\n[[datasets]]\nresolution = 512\n"
        "[[datasets.subsets]]\nimage_dir = 'pictures'\n"
    )
    assert load(written(here, imported("v.toml"))).preset.validate_.fraction == 0.1
