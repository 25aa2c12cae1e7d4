"""Diffusers folders from strangers: nothing is filled up at random, and nothing of theirs is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emotrain.errors import ModelError
from emotrain.families import fitting
from emotrain.families.component import weight_files
from emotrain.families.fitting import refuse_misfit, refuse_other_types
from emotrain.families.loading import load_family
from emotrain.families.registry import FAMILIES, configs, encoder_configs
from emotrain.families.table import sniff


@pytest.fixture
def copy(tmp_path: Path, sd_folder: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


@pytest.mark.parametrize("how", ["missing", "renamed"])
def test_a_text_encoder_with_a_tensor_that_is_not_there_is_refused(copy: Path, how: str) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "q_proj.weight" in key)
    value = tensors.pop(name)
    if how == "renamed":
        tensors[name.replace("q_proj", "query")] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of its tensors") as refused:
        load_family(str(copy), device="cpu")
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("unet", ["diffusers", "DiffusionPipeline"]),
        ("scheduler", ["diffusers", "os.system"]),
        ("tokenizer", "AutoTokenizer"),
    ],
)
def test_a_class_that_this_part_cannot_be_is_refused_and_never_asked_about(
    copy: Path, part: str, entry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`AutoTokenizer` with an `auto_map` would ask whether to run the folder's own code."""
    marker = copy / "ran"
    (copy / "tokenizer" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    config = copy / "tokenizer" / "tokenizer_config.json"
    words = json.loads(config.read_text()) if config.is_file() else {}
    config.write_text(json.dumps({**words, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, part: entry}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ModelError):
        load_family(str(copy), device="cpu")
    assert not marker.exists()


def spoil(copy: Path, part: str, **fields: Any) -> None:
    (file,) = (copy / part).glob("*config.json")
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("unet", {"norm_num_groups": "16"}),
        ("unet", {"down_block_types": [1, 2]}),
        ("unet", {"flip_sin_to_cos": None}),
        ("unet", {"mid_block_scale_factor": {"x": 1.0}}),
        ("unet", {"norm_eps": [1e-5]}),
        ("unet", {"time_embedding_dim": 10**9}),
        ("vae", {"force_upcast": 1}),
        ("vae", {"scaling_factor": "0.5"}),
        ("vae", {"layers_per_block": 1.5}),
        ("vae", {"sample_size": []}),
        ("text_encoder", {"layer_norm_eps": "1e-5"}),
        ("text_encoder", {"hidden_size": None}),
        ("text_encoder", {"hidden_act": 7}),
        ("scheduler", {"beta_end": "0.012"}),
        ("scheduler", {"num_train_timesteps": 10**9}),
        ("scheduler", {"trained_betas": ["x"]}),
        ("scheduler", {"clip_sample": "no"}),
    ],
)
def test_a_value_of_another_type_or_size_is_refused_with_its_file_and_field(
    copy: Path, part: str, fields: dict[str, Any]
) -> None:
    spoil(copy, part, **fields)
    with pytest.raises(ModelError, match=rf"{part}/\w+\.json` says {next(iter(fields))} is ") as refused:
        refuse_misfit(sniff(copy))
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        ("unet", {"layers_per_block": 10**6}, "its config asks for many more"),
        ("text_encoder", {"num_hidden_layers": 10**6}, "its config asks for many more"),
        ("unet", {"cross_attention_dim": 64}, "and its config"),
        ("vae", {"block_out_channels": [16, 32, 48]}, "and its config"),
        ("unet", {"act_fn": "swosh"}, "swosh"),
        ("unet", {"norm_num_groups": 7}, "unet"),
        ("unet", {"time_embedding_type": "fourier"}, "unet"),
        ("text_encoder", {"hidden_act": "swosh"}, "swosh"),
        ("text_encoder", {"num_attention_heads": 7}, "text_encoder"),
        ("scheduler", {"num_train_timesteps": 0}, "scheduler"),
        ("scheduler", {"timestep_spacing": "often"}, "often"),
        ("scheduler", {"beta_schedule": "steep"}, "steep"),
        ("tokenizer", {"model_max_length": 60}, "text_encoder"),
    ],
)
def test_what_only_building_or_calling_the_model_meets_is_refused_without_a_weight(
    copy: Path, part: str, fields: dict[str, Any], words: str
) -> None:
    spoil(copy, part, **fields)
    with pytest.raises(ModelError, match=words):
        refuse_misfit(sniff(copy))


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
@pytest.mark.parametrize("entry", [7, "CLIPTextModel", [], ["transformers"], ["transformers", 7], {"x": 1}, True])
def test_an_entry_of_the_index_that_names_no_class_is_refused(copy: Path, part: str, entry: Any) -> None:
    file = copy / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), part: entry}), encoding="utf-8")
    with pytest.raises(ModelError, match=part):
        refuse_misfit(sniff(copy))


@pytest.mark.parametrize(("part", "name"), [("unet", "block_out_channels"), ("vae", "block_out_channels")])
def test_levels_that_are_no_list_are_refused(copy: Path, part: str, name: str) -> None:
    spoil(copy, part, **{name: 64})
    with pytest.raises(ModelError, match=f"says {name} is 64"):
        sniff(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("how", ["missing", "other shape", "left over", "quantised"])
def test_weights_that_do_not_belong_to_the_config_are_refused_in_run_s_words(copy: Path, part: str, how: str) -> None:
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(key for key in tensors if key.endswith("weight"))[3]
    if how == "missing":
        del tensors[name]
    elif how == "other shape":
        tensors[name] = tensors[name][:1].contiguous()
    else:
        tensors["odd.weight" if how == "left over" else f"{name}.absmax"] = tensors[name].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    if how == "left over" and part == "text_encoder":
        refuse_misfit(sniff(copy))  # heads and eyes lie in such files, and are not needed
        return
    with pytest.raises(ModelError) as early:
        refuse_misfit(sniff(copy))
    if how == "missing":
        assert f"lacks 1 of its tensors, such as `{name.removeprefix('text_model.')}`" in str(early.value)
        with pytest.raises(ModelError) as late:
            load_family(str(copy), device="cpu")
        assert str(late.value) == str(early.value)


def test_a_tokenizer_that_knows_more_than_its_encoder_is_refused(copy: Path) -> None:
    file = copy / "tokenizer" / "tokenizer.json"
    words = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    vocabulary["odd"] = len(vocabulary) + 50
    file.write_text(json.dumps(words), encoding="utf-8")
    with pytest.raises(ModelError, match="the tokenizer of text_encoder makes token"):
        refuse_misfit(sniff(copy))


def test_parts_of_two_models_are_refused(copy: Path, flux_folder: Path) -> None:
    """Each is whole, and what one gives is not what the next takes."""
    shutil.rmtree(copy / "text_encoder")
    shutil.copytree(flux_folder / "text_encoder_2", copy / "text_encoder")
    with pytest.raises(ModelError, match="text_encoder"):
        refuse_misfit(sniff(copy))


@pytest.mark.parametrize("name", ["sd_folder", "flux_folder", "sdxl_folder", "sd3_folder"])
def test_good_folders_are_accepted(name: str, request: pytest.FixtureRequest) -> None:
    refuse_misfit(sniff(request.getfixturevalue(name)))


def test_a_folder_is_called_once_until_its_files_change(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(fitting, "_call", lambda found, family: called.append(found.family))
    families = [refuse_misfit(sniff(copy)) for _ in range(2)]
    assert called == ["sd15"]
    assert families[0].denoiser is not families[1].denoiser  # the caller puts its LoRA on it
    spoil(copy, "vae", force_upcast=False)
    refuse_misfit(sniff(copy))
    assert called == ["sd15"] * 2
    monkeypatch.setattr(fitting, "_call", lambda *_: fitting._refuse_shape("x", "y", torch.ones(1), (2,)))
    spoil(copy, "vae", force_upcast=True)
    for _ in range(2):  # what was refused is asked again
        with pytest.raises(ModelError):
            refuse_misfit(sniff(copy))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_public_models_own_configs_are_of_their_classes_types(family: str) -> None:
    import diffusers
    import transformers

    spec, public = FAMILIES[family], configs(family)
    kinds = [(getattr(diffusers, spec.vae_class), public["vae"])]
    for variant in spec.variants:
        scheduler, words = public["scheduler"][variant]
        kinds += [(getattr(diffusers, scheduler), words)]
        kinds += [(getattr(diffusers, spec.denoiser_class), public["denoiser"][variant])]
        for kind, config in encoder_configs(family, variant).values():
            cls = getattr(transformers, kind, None) or getattr(diffusers, kind)
            kinds.append((getattr(cls, "config_class", None) or cls, config))
    for cls, config in kinds:
        refuse_other_types(Path(family), config, cls)


def test_where_two_variants_lie_together_the_plain_one_counts(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    shutil.copyfile(file, file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    assert weight_files(copy / "unet") == [file]
    refuse_misfit(sniff(copy))
