"""Words from other trainers, short forms, and the traps of YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotrain.config.aliases import FOLDER_WORDS, INSIDE, NESTED, OPTIMIZER_WORDS, TOP
from emotrain.config.explain import field_names, section_at
from emotrain.config.load import LoadedPreset, load
from emotrain.config.source import parse, resolve_scalar
from emotrain.errors import ConfigError

GOOD = "model: builtin:tiny-sd\ndataset: builtin:example\n"


def loaded(tmp_path: Path, text: str, *overrides: str) -> LoadedPreset:
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, overrides)


def errors(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text, *overrides)
    shown = str(tmp_path / "p.yaml")
    return [
        problem.message.replace(shown, "p.yaml") + (f" | {problem.hint}" if problem.hint else "")
        for problem in caught.value.problems
    ]


def value_at(found: LoadedPreset, dotted: str) -> Any:
    value: Any = found.preset.to_dict()
    for part in dotted.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    return value


SAMPLES = {
    "model.base": "builtin:tiny-flux",
    "model.vae": "other/vae",
    "model.dtype": "bf16",
    "model.family": "sd15",
    "name": "other",
    "dataset.trigger": "mika",
    "dataset.resolution": 128,
    "dataset.folders": "./more",
    "dataset.folders.0.path": "./more",
    "dataset.folders.0.mask": "alpha",
    "dataset.captions.extension": ".caption",
    "dataset.captions.default": "a picture",
    "network.targets": "all",
    "start_from.continue": "old_run",
    "train.optimizer": "emoairy",
    "train.gradient_checkpointing": True,
    "train.ema": False,
    "sample.prompts": "a cat",
    "save.dtype": "bf16",
}
TRUTHS = ("shuffle", "flip", "text_encoder")


def sample_for(target: str) -> Any:
    last = target.rsplit(".", 1)[-1]
    if target in SAMPLES:
        return SAMPLES[target]
    if last in TRUTHS:
        return True
    if last in ("dropout", "tag_dropout", "noise_offset"):
        return 0.25
    return "x" if last in ("prefix", "suffix", "caption") else 16


ALL_WORDS = [(None, word, to) for word, to in TOP.items()] + [
    (section, word, to) for section, words in INSIDE.items() for word, to in words.items()
]


@pytest.mark.parametrize(("section", "word", "target"), ALL_WORDS, ids=lambda value: str(value))
def test_every_foreign_word_sets_its_key(section: str | None, word: str, target: str, tmp_path: Path) -> None:
    value = sample_for(target)
    pieces = {"model": "  base: builtin:tiny-sd", "dataset": "  path: builtin:example"}
    if target.startswith("dataset.folders"):
        pieces["dataset"] = "  path: builtin:example" if target.count(".") == 3 else ""
        if target.endswith(".path") or target == "dataset.folders":
            pieces["dataset"] = ""
    if target == "model.base":
        pieces["model"] = ""
    line = f"{word}: {str(value).lower() if isinstance(value, bool) else value}"
    if section is None:
        lines = [line]
    else:
        pieces[section] = "\n".join([pieces.get(section, ""), f"  {line}"])
        lines = []
    text = "\n".join([*lines, *(f"{key}:\n{body}" for key, body in pieces.items())])
    if target.startswith("dataset.folders.0") and section is None and not target.endswith("path"):
        return  # a word of one folder makes sense beside its path alone
    found = loaded(tmp_path, text)
    got = value_at(found, target)
    if target == "train.optimizer":
        got = got["name"]
    elif target == "dataset.folders":
        got = got[0]["path"]
    if target.endswith("folders") or target.endswith("path"):
        assert got == str(tmp_path / "more")
    elif isinstance(got, list):
        assert got == [value]
    else:
        assert got == value
    own_short_form = section == "dataset" and word in (
        "path", "repeats", "flip", "mask", "prior", "caption", "folder",
    )  # fmt: skip
    own_short_form |= section is None and target.rpartition(".")[2] == word
    full = word if section is None else f"{section}.{word}"
    assert any(f"`{full}` is read as" in note for note in found.notes) is not own_short_form


def test_every_alias_points_to_a_key_that_exists() -> None:
    for _, _, target in ALL_WORDS:
        *parents, key = [part for part in target.split(".") if part != "0"]
        section = section_at(tuple(parents))
        assert section is not None
        assert key in field_names(section)
    for words, place in (
        (FOLDER_WORDS, ("dataset", "folders")),
        (NESTED["captions"], ("dataset", "captions")),
        (OPTIMIZER_WORDS, ("train", "optimizer")),
    ):
        section = section_at(place)
        assert section is not None
        assert set(words.values()) <= set(field_names(section))
        assert not set(words) & set(field_names(section))


def test_words_inside_folders_captions_and_optimizer_are_translated(tmp_path: Path) -> None:
    text = (
        "model: builtin:tiny-sd\n"
        "dataset:\n"
        "  folders:\n"
        "    - {image_dir: ./a, num_repeats: 3, flip_aug: true}\n"
        "    - ./b\n"
        "  captions: {shuffle_caption: true, keep_tokens: 2}\n"
        "train: {optimizer: {type: emolynx}}\n"
    )
    found = loaded(tmp_path, text)
    first, second = found.preset.dataset.folders
    assert (first.path, first.repeats, first.flip) == (str(tmp_path / "a"), 3, True)
    assert second.path == str(tmp_path / "b")
    assert found.preset.dataset.captions.shuffle
    assert found.preset.dataset.captions.keep_tokens == 2
    assert found.preset.train.optimizer.name == "emolynx"
    assert len(found.notes) == 5


def test_a_word_and_its_alias_together_are_refused(tmp_path: Path) -> None:
    assert errors(tmp_path, GOOD + "network: {rank: 4}\nnetwork_dim: 8\n") == [
        "p.yaml:4: `network_dim` and line 3 both set `network.rank` | keep one of them"
    ]
    folders = "model: builtin:tiny-sd\ndataset: {path: ./a, folders: [./b]}\n"
    assert "both set `dataset.folders`" in errors(tmp_path, folders)[0]
    other_way = "model: builtin:tiny-sd\ndataset: {folders: [./b], path: ./a}\n"
    assert "both set `dataset.folders[0].path`" in errors(tmp_path, other_way)[0]


def test_short_forms_spread_without_a_note(tmp_path: Path) -> None:
    found = loaded(
        tmp_path,
        "model: builtin:tiny-sd\ndataset: ./a\nstop: off\ntrain: {optimizer: emonavi}\n"
        "start_from: {stack: ./x.safetensors}\nsample: {prompts: a cat}\n",
    )
    preset = found.preset
    assert found.notes == ()
    assert preset.dataset.folders[0].path == str(tmp_path / "a")
    assert preset.stop.mode == "off"
    assert preset.train.optimizer.name == "emonavi"
    assert preset.start_from.stack[0].path == str(tmp_path / "x.safetensors")
    assert preset.start_from.stack[0].weight == 1.0
    assert preset.sample.prompts == ("a cat",)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 0.0001), ("1E5", 1e5), ("-.5", -0.5), ("1.", 1.0), ("010", 10), ("+3", 3),
        ("true", True), ("False", False), ("yes", "yes"), ("NO", "NO"), ("on", "on"), ("y", "y"),
        ("12:30:00", "12:30:00"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("0x1f", "0x1f"),
        ("~", None), ("null", None), ("", None), ("1e", "1e"), ("e5", "e5"), ("-", "-"), (".", "."),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(written: str, value: object) -> None:
    got = resolve_scalar(written)
    assert (got, type(got)) == (value, type(value))


def test_a_number_where_text_is_wanted_stays_as_it_was_written(tmp_path: Path) -> None:
    found = loaded(
        tmp_path,
        GOOD + "trigger: 007\nname: 1e4\ntrain: {optimizer: {generation: 3.9}}\nsample: {prompts: [1.50]}\n",
    )
    assert found.preset.dataset.trigger == "007"
    assert found.preset.name == "1e4"
    assert found.preset.train.optimizer.generation == "3.9"
    assert found.preset.sample.prompts == ("1.50",)


def test_traps_of_yaml_are_named(tmp_path: Path) -> None:
    escaped = 'model: "C:\\new\\table"\ndataset: ./a\n'
    found = loaded(tmp_path, escaped)
    assert "holds a tab or line break" in found.notes[0]
    assert "'single quotes'" in found.notes[0]
    unknown = errors(tmp_path, 'model: "C:\\models"\ndataset: ./a\n')
    assert "'single quotes' for Windows paths" in unknown[0]
    prompt = errors(tmp_path, GOOD + "sample:\n  prompts:\n    - [trigger], portrait\n")
    assert '"[trigger], portrait"' in prompt[0]
    bare = loaded(tmp_path, GOOD + "sample: {prompts: [trigger]}\n")
    assert "quotes keep the brackets" in bare.notes[0]
    cut_off = loaded(
        tmp_path, GOOD + "sample:\n  prompts:\n  - girl #3, ink\n  - 'girl #4'\n  - girl  # of the fourth set\n"
    )
    assert cut_off.preset.sample.prompts == ("girl", "girl #4", "girl")
    assert [note for note in cut_off.notes if "comment" in note] == [
        f"{tmp_path / 'p.yaml'}:5: `#3, ink` is a comment in YAML; if it is part of the text, quote all of it"
    ]
    colour = errors(tmp_path, "model: builtin:tiny-sd\ndataset:\n  path: ./a\n  background: #ff0000\n")
    assert "in YAML `#ff0000` is a comment: put it in quotes" in colour[0]
    colon = errors(tmp_path, GOOD + "train: lr: 3\n")
    assert colon[0].startswith("p.yaml:3:10: a `:` stands where no key can be")
    merge = errors(tmp_path, GOOD + "<<: {name: x}\n")
    assert "through `extends:`" in merge[0]
    aliased = errors(tmp_path, GOOD + "dataset_trigger: *x\n")
    assert "alias `*x`" in aliased[0]


def test_environment_variables_are_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICTURES", "/secret")
    preset = loaded(tmp_path, "model: builtin:tiny-sd\ndataset: ./a\nname: ${PICTURES}\n").preset
    assert preset.name == "${PICTURES}"


@given(st.text(alphabet=st.sampled_from("ab: -[]{},'\"#&*!|>%\n\t1e.~\\\x00é"), max_size=40))
def test_any_text_gives_a_tree_or_a_named_problem(text: str) -> None:
    messages: tuple[str, ...] = ()
    try:
        root, _ = parse(text, "x.yaml")
        root.plain()
    except ConfigError as error:
        messages = tuple(problem.message for problem in error.problems)
    assert all(message.startswith("x.yaml:") for message in messages)


def test_paths_are_relative_to_the_file_and_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "sub").mkdir()
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").mkdir()
    text = (
        "model: {base: org/model, vae: other/vae}\n"
        "dataset: {folders: [{path: ../a, mask: ./m}, ~/b, builtin:example, /abs/c]}\n"
        "start_from: {continue: some_run, stack: [x.safetensors]}\n"
        "validate: {folder: held}\n"
    )
    path = tmp_path / "sub" / "p.yaml"
    path.write_text(text)
    monkeypatch.chdir(tmp_path)
    preset = load(Path("sub/p.yaml")).preset
    folders = [folder.path for folder in preset.dataset.folders]
    assert folders == [str(tmp_path / "a"), "/home/me/b", "builtin:example", "/abs/c"]
    assert preset.dataset.folders[0].mask == str(tmp_path / "sub" / "m")
    assert preset.model.base == "org/model"  # no such folder beside the preset: a hub id
    assert preset.model.vae == "other/vae"
    assert preset.start_from.continue_ == "some_run"
    assert preset.start_from.stack[0].path == str(tmp_path / "sub" / "x.safetensors")
    assert preset.validate_.folder == str(tmp_path / "sub" / "held")
    (tmp_path / "p.yaml").write_text("model: org/model\ndataset: ./a\n")
    assert load("p.yaml").preset.model.base == os.path.join(tmp_path, "org", "model")


def test_a_folder_of_pictures_does_not_hide_the_run_of_its_name(tmp_path: Path) -> None:
    """`mika.yaml` trains on `./mika` and makes the run `mika`."""
    (tmp_path / "mika").mkdir()
    (tmp_path / "p.yaml").write_text("model: org/model\ndataset: ./mika\nstart_from: {stack: [mika]}\n")
    (tmp_path / "q.yaml").write_text("model: org/model\ndataset: ./mika\nstart_from: {continue: mika}\n")
    for expected in ("mika", str(tmp_path / "mika")):
        assert load(tmp_path / "p.yaml").preset.start_from.stack[0].path == expected
        assert load(tmp_path / "q.yaml").preset.start_from.continue_ == expected
        (tmp_path / "mika" / "run.json").touch()
