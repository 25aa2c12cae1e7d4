"""extends, --set, names, cross-key rules, and the words of the messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from emotrain.config.builtin import shipped_presets
from emotrain.config.dump import dump_preset
from emotrain.config.load import load, load_preset
from emotrain.config.names import check_run_name, name_from_file
from emotrain.config.schema import Preset
from emotrain.errors import ConfigError, ExitCode

GOOD = "model: builtin:tiny-sd\ndataset: builtin:example\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def errors(path: Path | str, *overrides: str, name: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, name)
    assert caught.value.exit_code == ExitCode.USAGE
    return [
        problem.message.replace(f"{Path(path).parent}/", "") + (f" | {problem.hint}" if problem.hint else "")
        for problem in caught.value.problems
    ]


def test_two_keys_are_enough(tmp_path: Path) -> None:
    preset = load_preset(write(tmp_path / "mika.yaml", GOOD))
    assert preset.name == "mika"
    assert preset.train.optimizer.name == "emosens"
    assert preset.model.base == "builtin:tiny-sd"


def test_missing_keys_are_both_named(tmp_path: Path) -> None:
    assert errors(write(tmp_path / "p.yaml", "name: x\n")) == [
        "p.yaml: model is missing | two keys are enough: `model:` and `dataset:`",
        "p.yaml: dataset is missing | two keys are enough: `model:` and `dataset:`",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: ~\ndataset: ./p\n", "p.yaml:1: model.base is missing | `model: ./models/x.safetensors` names"),
        ("model: m\ndataset: ~\n", "p.yaml:2: dataset.folders is missing | `dataset: ./mika` names the folder"),
        (f"{GOOD}\ntrigger: [mika]\n", "dataset.trigger is a list, which is not text | put the text in quotes"),
        (f"{GOOD}\nprompts: [[trigger], a cat: asleep]\n", "prompts[0] is a list, which is not text | put the text"),
        (f"{GOOD}\nprompts: [{{a cat: asleep}}]\n", "prompts[0] is a mapping, which is not text | put the text"),
    ],
)
def test_what_yaml_read_otherwise_is_answered_with_the_right_way(tmp_path: Path, text: str, problem: str) -> None:
    assert any(problem in error for error in errors(write(tmp_path / "p.yaml", text)))


def test_every_error_comes_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = """\
model: {base: builtin:tiny-sd, famly: flux, dtype: bf61}
dataset:
  folders: [{path: ./pics, repeats: yes, reapeats: 2}]
  shard: 3/2
network: {rnak: 5, targets: atn, rank_pattern: {"a[": 3}}
train:
  max_steps: 1.5
  optimizer: emosense
  gradient_checkpointing: yes
save: {keep_last: 1}
log: {tensorboard: yes, every: "5"}
stop: of
lr_scheduler: cosine
train.seed: 3
epochs: 10
"""
    assert errors(write(tmp_path / "p.yaml", text)) == [
        "p.yaml:1: model.dtype is `bf61`, but must be one of `auto`, `bf16`, `fp16`, `fp32` | did you mean `bf16`?",
        "p.yaml:1: `famly` is not a key of `model` (got `flux`) | did you mean `family`?",
        "p.yaml:3: dataset.folders[0].repeats is `yes`, which is not a whole number",
        "p.yaml:3: `reapeats` is not a key of `dataset.folders[0]` (got `2`) | did you mean `repeats`?",
        'p.yaml:4: dataset.shard is `3/2`, which is not a part such as "1/2"',
        "p.yaml:5: network.targets is `atn`, but must be one of `attn`, `attn-mlp`, `all` or a list"
        " | did you mean `attn`?",
        "p.yaml:5: network.rank_pattern has the key `a[`, which is not a regular expression: "
        "unterminated character set at position 1",
        "p.yaml:5: `rnak` is not a key of `network` (got `5`) | did you mean `rank`?",
        "p.yaml:7: train.max_steps is `1.5`, which is not a whole number",
        "p.yaml:8: train.optimizer is `emosense`, which is not an optimizer | did you mean `emosens`?",
        "p.yaml:9: train.gradient_checkpointing is `yes`, but must be `auto` or `true` or `false` | write `true`",
        "p.yaml:10: save.keep_last is `1`, but must be at least 2",
        "p.yaml:11: log.tensorboard is `yes`, which is not `true` or `false` | write `true`",
        "p.yaml:11: log.every is `5`, which is not a whole number | leave the quotes out",
        "p.yaml:12: stop.mode is `of`, but must be one of `off`, `signal`, `trusted` | did you mean `off`?",
        "p.yaml:13: `lr_scheduler` is not a key of a preset (got `cosine`)"
        " | leave it out: there is no schedule, an emo optimizer sets its own learning rate",
        "p.yaml:14: `train.seed` is not a key of a preset (got `3`) | write `train:` and, indented below it, `seed:`",
        "p.yaml:15: `epochs` is not a key of a preset (got `10`)"
        " | leave it out: the run stops automatically, and `train.max_steps` is the ceiling",
    ]


def test_a_key_in_the_wrong_section_is_sent_to_its_own(tmp_path: Path) -> None:
    got = errors(write(tmp_path / "p.yaml", GOOD + "network: {max_steps: 3}\nkeep_last: 4\n"))
    assert got == [
        "p.yaml:3: `max_steps` is not a key of `network` (got `3`) | did you mean `train.max_steps`?",
        "p.yaml:4: `keep_last` is not a key of a preset (got `4`) | did you mean `save.keep_last`?",
    ]


def test_an_optimizer_that_is_not_emo_needs_a_learning_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", GOOD + "train:\n  optimizer: adamw\n")
    assert errors(path) == [
        "p.yaml:4: train.lr is missing, and only the emo optimizers do without: `adamw` needs one"
        " | a usual one for a LoRA is `lr: 1e-4`"
    ]
    assert load_preset(path, ["train.lr=1e-4"]).train.lr == 1e-4


def test_keys_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    text = GOOD + "train: {optimizer: adamw, lr: 1}\nstop: signal\n"
    assert "p.yaml:4: stop.mode is `signal`, which `adamw` does not give" in errors(write(tmp_path / "p.yaml", text))[0]
    text = "model: builtin:tiny-sd\ndataset: {path: builtin:example, buckets: {min: 96, max: 64}}\n"
    assert "dataset.buckets.min is 96, which is above" in errors(write(tmp_path / "p.yaml", text))[0]


def test_emo_words_on_another_optimizer_are_noted(tmp_path: Path) -> None:
    text = GOOD + "train: {lr: 1, optimizer: {name: adamw, use_shadow: true}}\n"
    notes = load(write(tmp_path / "p.yaml", text)).notes
    assert notes[0].endswith("p.yaml:3: train.optimizer.use_shadow has no effect on `adamw`")


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("adamw", ["train.gain has no effect on `adamw`: emosens alone measures it"]),
        ("{name: emosens, generation: 3.7.0}", ["train.gain has no effect on generation 3.7.0"]),
        ("{name: emosens, generation: '3.7'}", []),
    ],
)
def test_a_gain_that_nothing_measures_is_noted(tmp_path: Path, optimizer: str, said: list[str]) -> None:
    text = f"{GOOD}train: {{optimizer: {optimizer}, lr: 1, gain: auto}}\n"
    notes = load(write(tmp_path / "p.yaml", text)).notes
    assert len(notes) == len(said)
    assert all(want in note for want, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    ("train", "noted"),
    [
        ("{optimizer: emocats}", True),
        ("{optimizer: emoairy, lr: 1}", True),
        ("{optimizer: emocats, lr: 0.3}", False),  # a length that somebody chose
        ("{optimizer: emosens}", False),  # it measures its own
        ("{optimizer: emonavi}", False),  # whose lr is the rate itself
    ],
)
def test_a_step_length_that_nobody_measured_is_noted(tmp_path: Path, train: str, noted: bool) -> None:
    notes = load(write(tmp_path / "p.yaml", f"{GOOD}train: {train}\n")).notes
    assert ["takes steps of the published length" in note for note in notes] == [True] * noted


def test_extends_merges_deep_and_keeps_each_file_s_paths(tmp_path: Path) -> None:
    write(
        tmp_path / "base" / "b.yaml",
        "name: base\nmodel: {base: ./m.safetensors, dtype: bf16}\ndataset: ./pics\n"
        "network: {rank: 4, targets: all}\nsample: {prompts: [a, b]}\n",
    )
    path = write(
        tmp_path / "p.yaml",
        "extends: base/b.yaml\nmodel: {family: sdxl}\nnetwork_dim: 8\nsample: {prompts: [c]}\n",
    )
    loaded = load(path)
    preset = loaded.preset
    assert preset.model.base == str(tmp_path / "base" / "m.safetensors")
    assert preset.dataset.folders[0].path == str(tmp_path / "base" / "pics")
    assert (preset.model.dtype, preset.model.family) == ("bf16", "sdxl")
    assert (preset.network.rank, preset.network.targets) == (8, "all")
    assert preset.sample.prompts == ("c",)
    assert preset.name == "p"
    assert loaded.where("network.rank").endswith("p.yaml:3")
    assert loaded.where("network.targets").endswith("b.yaml:4")
    assert loaded.where("dataset.folders.0.path").endswith("b.yaml:3")


def test_extends_takes_a_shipped_name_whose_paths_are_this_file_s(tmp_path: Path) -> None:
    preset = load_preset(write(tmp_path / "p.yaml", "extends: sdxl\ndataset: {trigger: mika}\n"))
    assert preset.model.family == "sdxl"
    assert preset.dataset.trigger == "mika"
    assert preset.dataset.folders[0].path == str(tmp_path / "pictures")


def test_another_optimizer_brings_neither_old_words_nor_old_lr(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", GOOD + "train: {lr: 1.0, optimizer: {name: emosens, eps: 1e-3}}\n")
    path = write(tmp_path / "p.yaml", "extends: b.yaml\ntrain: {optimizer: adamw}\n")
    assert "train.lr is missing" in errors(path)[0]
    path = write(tmp_path / "q.yaml", "extends: b.yaml\ntrain: {lr: 1e-4, optimizer: adamw}\n")
    assert load_preset(path).train.optimizer.eps == 1e-8
    path = write(tmp_path / "r.yaml", "extends: b.yaml\ntrain: {optimizer: {notify: false}}\n")
    assert load_preset(path).train.lr == 1.0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("p.yaml", "extends `p.yaml`, which extends it again"),
        ("ring.yaml", "extends `p.yaml`, which extends it again"),
        ("none.yaml", "extends `none.yaml`, which does not exist"),
        ("sdlx", "`sdlx` is not a shipped preset, and no file has this name"),
        ("[a, b]", "extends is not a preset's name"),
        ("bad.yaml", "an empty file is not a preset"),
    ],
)
def test_extends_that_leads_nowhere_is_refused(word: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "ring.yaml", "extends: p.yaml\n" + GOOD)
    write(tmp_path / "bad.yaml", "")
    got = errors(write(tmp_path / "p.yaml", f"extends: {word}\n" + GOOD))
    assert any(message in line for line in got)


def test_errors_in_an_extended_file_name_that_file(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", GOOD + "network: {rank: 0}\n")
    got = errors(write(tmp_path / "p.yaml", "extends: b.yaml\ntrain: {max_steps: x}\n"))
    assert got[0].startswith("b.yaml:3: network.rank is `0`")
    assert got[1].startswith("p.yaml:2: train.max_steps is `x`")


def test_set_overrides_any_key_and_is_cited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "sub" / "p.yaml", GOOD)
    preset = load_preset(
        path,
        [
            "network.rank=32",
            "train.lr=5e-1",
            "dataset.folders.0.repeats=3",
            "sample.prompts=[a, '[trigger], b']",
            "dataset.trigger=[trigger], odd",
            "dataset.background=#ffffff",
            "model=./m.safetensors",
            "train.max_grad_norm=null",
            "batch_size=2",
        ],
    )
    assert preset.network.rank == 32
    assert preset.train.lr == 0.5
    assert preset.dataset.folders[0].repeats == 3
    assert preset.sample.prompts == ("a", "[trigger], b")
    assert preset.dataset.trigger == "[trigger], odd"
    assert preset.dataset.background == "#ffffff"
    assert preset.model.base == str(tmp_path / "m.safetensors")  # as typed, not as in sub/
    assert preset.train.max_grad_norm is None
    assert preset.train.micro_batch_size == 2
    assert errors(path, "network.rank=0") == ["--set network.rank: network.rank is `0`, but must be above 0"]
    assert errors(path, "network.rnak=4")[0].startswith("--set network.rnak: `rnak` is not a key")
    assert errors(path, "dataset.folders.7.repeats=2") == [
        "--set dataset.folders.7.repeats: the preset has no such list or item"
    ]


@pytest.mark.parametrize("override", ["network.rank", "=3", "network..rank=3", "extends=sdxl"])
def test_an_override_of_the_wrong_form_is_refused(override: str, tmp_path: Path) -> None:
    got = errors(write(tmp_path / "p.yaml", GOOD), override)
    assert got[0].startswith("--set ")


@pytest.mark.parametrize(
    "name",
    [
        "", " ", ".", "..", "a/b", "a\\b", "../x", "/x", "C:x", "a:b", "CON", "nul.txt", "Com1", "LPT9.log",
        "x.", "x ", " x", "-x", "~x", ".x", "a\nb", "a\0b", "a\x1bb", "a\u202eb", "x" * 201, "ü" * 101,
        "a*b", "a?b", 'a"b', "a<b", "a|b",
    ],
)  # fmt: skip
def test_a_name_that_is_no_plain_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="^which "):
        check_run_name(name)


@pytest.mark.parametrize("name", ["mika_v1", "Mika v2", "a.b", "日本語", "über", "con_1", "x" * 200])
def test_ordinary_names_are_taken(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    ("file", "name"),
    [("mika.yaml", "mika"), ("my preset: 1.yaml", "my preset_ 1"), ("con.yaml", "run_con"), ("....yaml", "run")],
)
def test_the_default_name_is_the_file_s_made_safe(file: str, name: str) -> None:
    assert name_from_file(Path(file)) == name
    assert check_run_name(name_from_file(Path(file))) == name


def test_the_name_flag_wins_and_is_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", GOOD + "name: a\n")
    assert load_preset(path, name="b").name == "b"
    assert errors(path, name="../b")[0].startswith("--name: name is `../b`, which is not a plain")


@pytest.mark.parametrize("name", shipped_presets())
def test_shipped_presets_load_without_notes_and_are_named_after_their_file(name: str) -> None:
    loaded = load(name)
    assert loaded.notes == ()
    assert loaded.preset.name == name
    assert shipped_presets()[name].read_text(encoding="utf-8").startswith("# ")


def test_the_issue_s_six_presets_are_shipped() -> None:
    wanted = {"quickstart", "quickstart-flux", "sd15", "sdxl", "sd3", "flux"}
    assert wanted <= set(shipped_presets())


@pytest.mark.parametrize("name", ["quickstart", "quickstart-flux"])
def test_quickstart_prompts_are_not_training_captions(name: str) -> None:
    preset = load_preset(name)
    folder = Path(__file__).parents[2] / "emotrain" / "assets" / "example"
    captions = {path.read_text(encoding="utf-8").strip() for path in folder.glob("*.txt")}
    assert captions
    trigger = preset.dataset.trigger
    assert trigger is not None
    assert len(captions) >= 30
    assert all(caption.startswith(trigger) for caption in captions)
    for prompt in preset.sample.prompts:
        assert prompt.replace("[trigger]", trigger) not in captions


def test_a_misspelt_shipped_name_is_guessed() -> None:
    with pytest.raises(ConfigError) as caught:
        load("quickstrat")
    assert caught.value.hint == "did you mean `quickstart`?"


@pytest.mark.parametrize("name", shipped_presets())
def test_a_dumped_preset_loads_as_the_same(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    assert load_preset(write(tmp_path / "p.yaml", dump_preset(preset))) == preset


def test_odd_texts_survive_dumping(tmp_path: Path) -> None:
    preset = load_preset(write(tmp_path / "p.yaml", GOOD))
    texts = ("1e-4", "no", "null", "~", "", " x ", "[trigger], a: b # c", "007", ".5e3", "*a", "ü\u2028\n\t")
    odd = Preset.model_validate({**preset.model_dump(by_alias=True), "sample": {"prompts": texts}})
    again = load_preset(write(tmp_path / "q.yaml", dump_preset(odd)))
    assert again.sample.prompts == texts


def test_a_preset_is_frozen(tmp_path: Path) -> None:
    preset = load_preset(write(tmp_path / "p.yaml", GOOD))
    with pytest.raises(ValueError, match="frozen"):
        preset.train.max_steps = 3  # type: ignore[misc]
