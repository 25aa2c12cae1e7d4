"""What people copy from other trainers: read, or refused with a hint that means the right thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from emotrain.config.load import load
from emotrain.config.prompts import SamplePrompt, parse_prompt
from emotrain.errors import ConfigError

BASE = "model: builtin:tiny-sd\ndataset: {folders: [{path: builtin:example}]}\n"


def loaded(tmp_path: Path, text: str, *overrides: str):  # type: ignore[no-untyped-def]
    (tmp_path / "p.yaml").write_text(BASE + text, encoding="utf-8")
    return load(tmp_path / "p.yaml", overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, text, *overrides)
    return "\n".join(f"{problem.message} | {problem.hint}" for problem in error.value.problems)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("xformers: true", "fused"),
        ("output_dir: ./out", "--runs-dir"),
        ("network_module: networks.lora", "rank and alpha"),
        ("bucket_no_upscale: true", "buckets.upscale"),
        ("enable_bucket: true", "keep their shape"),
        ("reg_data_dir: ./reg", "prior"),
        ("unet_lr: 1e-4", "train.lr"),
        ("optimizer_args: [a=1]", "under the optimizer"),
        ("fp8_base: true", "model.quantize: fp8"),
        ("negative_prompt: bad", "--n"),
        ("v_parameterization: true", "model.prediction: v"),
        ("lr_scheduler: cosine", "no schedule"),
        ("optimizer: optimizer.emosens.EmoSens", "did you mean `emosens`"),
        ('resolution: "1024,1024"', "`1024`"),
        ("trigger: @mika", 'quotes make it text: "@mika"'),
    ],
)
def test_a_word_of_another_trainer_gets_a_hint_that_means_the_right_thing(tmp_path: Path, text: str, says: str) -> None:
    assert says in refused(tmp_path, text)


@pytest.mark.parametrize("key", ["is_reg: true", "caption_ext: txt"])
def test_a_word_inside_a_folder_too(tmp_path: Path, key: str) -> None:
    (tmp_path / "p.yaml").write_text(f"model: builtin:tiny-sd\ndataset: {{folders: [{{path: a, {key}}}]}}\n")
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "p.yaml")
    assert ("prior" if "reg" in key else "dataset.captions.extension") in str(error.value.hint)


@pytest.mark.parametrize("path", ["$HOME/pics", "${DATA}/pics", "'%USERPROFILE%/pics'"])
def test_a_variable_in_a_path_is_refused_and_not_looked_for(tmp_path: Path, path: str) -> None:
    (tmp_path / "p.yaml").write_text(f"model: builtin:tiny-sd\ndataset: {path}\n")
    with pytest.raises(ConfigError, match="not replaced"):
        load(tmp_path / "p.yaml")


@pytest.mark.parametrize("optimizer", ["emosens", "emoairy", "emocats", "{name: emosens, generation: '3.7'}"])
@pytest.mark.parametrize("rate", ["1e-4", "0.00005", "0.09"])
def test_the_rate_of_another_optimizer_is_refused_for_one_that_scales_its_own(
    tmp_path: Path, optimizer: str, rate: str
) -> None:
    said = refused(tmp_path, f"learning_rate: {rate}\noptimizer: {optimizer}\n")
    assert "hardly learn anything" in said
    assert "optimizer: adamw" in said


def test_the_few_who_mean_a_small_rate_can_have_it(tmp_path: Path) -> None:
    text = "train: {lr: 0.01, optimizer: emosens, allow_small_lr: true}"
    assert loaded(tmp_path, text).preset.train.lr == 0.01


@pytest.mark.parametrize("text", ["lr: 1.0", "lr: 0.5", "lr: 1e-3\noptimizer: emonavi", "lr: 1e-4\noptimizer: adamw"])
def test_rates_that_are_meant_like_this_pass(tmp_path: Path, text: str) -> None:
    loaded(tmp_path, text)


def test_the_word_of_the_version_before_is_read_with_a_note(tmp_path: Path) -> None:
    found = loaded(tmp_path, "train: {loss: {ear: corrected}}")
    assert found.preset.train.loss.baseline == "corrected"
    assert any("train.loss.ear" in note for note in found.notes)


def test_the_flags_of_a_prompt_are_read() -> None:
    found = parse_prompt("[trigger], a rocket --n lowres, bad --w 768 --h 1024 --d 1 --l 7.5 --s 10")
    assert found == SamplePrompt("[trigger], a rocket", "lowres, bad", 768, 1024, 1, 7.5, 10)
    assert parse_prompt("a cat -- and a dog") == SamplePrompt("a cat -- and a dog")


@pytest.mark.parametrize("prompt", ["a --x 3", "a --w 12", "a --w 1e9", "a --s 2 --s 3", "a --d \u00b2", "a --l nan"])
def test_a_flag_that_cannot_be_is_refused_with_its_line(tmp_path: Path, prompt: str) -> None:
    assert "p.yaml:" in refused(tmp_path, f'sample: {{prompts: ["{prompt}"]}}')


def test_a_file_of_prompts_stands_for_its_lines(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\n\n[trigger], rocket --s 5\na hat\n", encoding="utf-8")
    found = loaded(tmp_path, "trigger: mika\nsample_prompts: ./prompts.txt\n")
    assert found.preset.sample.prompts == ("[trigger], rocket --s 5", "a hat")
    (tmp_path / "prompts.txt").write_text("a cat --z 1\n", encoding="utf-8")
    flag = f"sample.prompts={tmp_path / 'prompts.txt'}"
    assert "prompts.txt:1" in refused(tmp_path, "sample_prompts: ./prompts.txt\n")
    assert "prompts.txt:1" in refused(tmp_path, "", flag)
    (tmp_path / "prompts.txt").write_text("a hat\n", encoding="utf-8")
    assert loaded(tmp_path, "", flag).preset.sample.prompts == ("a hat",)


def test_a_file_of_prompts_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "p.yaml:3: sample.prompts: " in refused(tmp_path, "sample_prompts: ./none.txt\n")


@pytest.mark.parametrize("key", ["sample.prompts=[/none.txt]", "sample.prompts.0=/none.txt"])
def test_a_flag_is_named_once(key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load("quickstart", [key])
    assert str(refused.value).startswith("--set sample.prompts")
    assert str(refused.value).count("sample.prompts") == 1


def test_weights_in_a_prompt_are_named_as_words(tmp_path: Path) -> None:
    found = loaded(tmp_path, 'sample: {prompts: ["(red:1.3) hat, <lora:x:0.8>"]}')
    assert any("drawn as words" in note for note in found.notes)
