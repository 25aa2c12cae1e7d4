"""Before anything is trained the data is looked at: errors stop the run, warnings make one line, folders stay apart."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emotrain.cli.app import main
from emotrain.config.load import load, load_preset
from emotrain.errors import DatasetError
from emotrain.pulse.gain import START
from emotrain.runs.build import build_optimizer_of, build_stop_rule, validate_every
from emotrain.runs.data import evenly, read_pictures
from emotrain.runs.lint import lint_preset
from emotrain.runs.preflight import SHOWN, preflight


def write(folder: Path, names: str, seed: int = 0) -> Path:
    """Pictures of 64 pixels with captions, one a letter."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        colours = np.random.default_rng((seed, k)).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(colours).resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"x, thing {seed} {name}", encoding="utf-8")
    return folder


def preset(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text("model: builtin:tiny-sd\n" + "\n".join(lines), encoding="utf-8")
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_damaged_picture_stops_before_anything_is_trained_or_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = write(tmp_path / "data", "abcd")
    cut(folder / "b.png")
    (folder / "c.png").write_bytes(b"")
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    path = preset(tmp_path, "dataset: ./data")
    arguments = ["run", str(path), "--plain", "--runs-dir", str(tmp_path / "runs")]
    assert main(arguments if command == "run" else ["check", str(path)]) == 3
    err = capsys.readouterr().err
    assert "error: data/b.png is cut off before its end" in err
    assert "error: data/c.png is empty" in err
    assert "hint: " in err
    assert not (tmp_path / "runs").exists()
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()} == before


def test_many_errors_are_counted_and_a_hint_is_given_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "ok")
    for k in range(SHOWN + 5):
        (folder / f"bad{k:02}.png").write_bytes(b"")
    loaded = load(preset(tmp_path, "dataset: ./data"))
    (failure,) = preflight(loaded.preset, loaded.where).failures
    assert isinstance(failure, DatasetError)
    assert len(failure.problems) == SHOWN + 1
    assert failure.problems[-1].message == "and 5 more files that cannot be used"
    assert sum(problem.hint is not None for problem in failure.problems[:-1]) == 1


def test_warnings_make_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "abc")
    (folder / "a.txt").unlink()
    (folder / "copy.png").write_bytes((folder / "b.png").read_bytes())
    loaded = load(preset(tmp_path, "dataset: {path: ./data, trigger: x}"))
    found = preflight(loaded.preset, loaded.where)
    assert not found.failures
    (line,) = (text for text in found.warnings if "lint" in text)
    assert line == "the data has 3 warnings (2 caption-missing, 1 duplicate); `emotrain lint` says more"


@pytest.mark.parametrize(
    "dataset",
    [
        "dataset: builtin:example\nvalidate: {folder: 'builtin:example-heldout'}",
        "dataset: {folders: [{path: builtin:example}, {path: builtin:example-heldout, prior: 0.5}]}",
        "dataset: {folders: [{path: ./data}, {path: ./reg/data, prior: 0.5}]}\nvalidate: {folder: ./val/data}",
    ],
)
def test_builtin_regularisation_and_held_out_folders_pass(tmp_path: Path, dataset: str) -> None:
    for seed, name in enumerate(("data", "reg/data", "val/data")):
        write(tmp_path / name, "abcdefgh", seed)
    loaded = load(preset(tmp_path, dataset))
    assert preflight(loaded.preset, loaded.where).failures == []


def test_every_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emotrain.dataset import lint_pictures

    write(tmp_path / "data", "abcd")
    opened: list[Any] = []
    whole = lint_pictures.load_picture
    monkeypatch.setattr(lint_pictures, "load_picture", lambda path, *more: opened.append(path) or whole(path, *more))
    told: list[tuple[int, int]] = []
    loaded = load(preset(tmp_path, "dataset: ./data"))
    preflight(loaded.preset, loaded.where, lambda done, total: told.append((done, total)))
    assert len(opened) == len(set(opened)) == 4
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_held_out_folder_of_the_same_name_has_ids_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "data", "abc")
    write(tmp_path / "val" / "data", "abc", 1)
    loaded = load_preset(preset(tmp_path, "dataset: ./data", "validate: {folder: ./val/data}"), (), "one")
    pictures = read_pictures(loaded)
    assert [example.id for example in pictures.train] == ["data/a.png", "data/b.png", "data/c.png"]
    assert [example.id for example in pictures.held_out] == ["data#2/a.png", "data#2/b.png", "data#2/c.png"]
    report = lint_preset(loaded)
    assert not report.has_errors
    assert {row.id for row in report.pictures} == {"data/a.png", "data/b.png", "data/c.png"}


def test_a_held_out_folder_inside_a_training_folder_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "data", "abc")
    write(tmp_path / "data" / "val", "xy", 1)
    loaded = load_preset(preset(tmp_path, "dataset: ./data", "validate: {folder: ./data/val}"), (), "one")
    pictures = read_pictures(loaded)
    assert {example.path.stem for example in pictures.train} == set("abc")
    assert {example.path.stem for example in pictures.held_out} == set("xy")
    assert not [finding for finding in lint_preset(loaded).findings if finding.code == "leak"]


def test_a_training_folder_inside_the_held_out_one_is_not_held_out(tmp_path: Path) -> None:
    write(tmp_path / "all", "xy", 1)
    write(tmp_path / "all" / "train", "abc")
    pictures = read_pictures(
        load_preset(preset(tmp_path, "dataset: ./all/train", "validate: {folder: ./all}"), (), "one")
    )
    assert {example.path.stem for example in pictures.train} == set("abc")
    assert {example.path.stem for example in pictures.held_out} == set("xy")


def test_the_same_folder_cannot_be_trained_on_and_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", "abc")
    path = preset(tmp_path, "dataset: ./data", "validate: {folder: ./data}")
    assert main(["check", str(path)]) == 3
    assert "which dataset.folders trains on" in capsys.readouterr().err


def test_a_run_with_a_held_out_folder_of_the_same_name_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOTRAIN_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "data", "abcd")
    write(tmp_path / "val" / "data", "abcd", 1)
    path = preset(
        tmp_path, "dataset: {path: ./data, resolution: 64, buckets: {step: 8, min: 64, max: 64}}",
        "validate: {folder: ./val/data, every: 2}", "train: {max_steps: 2, loss: {baseline: raw}}",
        "sample: {every: 0}", "network: {targets: [mid_block.*to_q]}",
        "save: {every: 2}", "log: {tensorboard: false}",
    )  # fmt: skip
    assert main(["run", str(path), "--json", "--runs-dir", str(tmp_path / "runs")]) == 0


@pytest.mark.parametrize(("count", "held"), [(11, 0), (12, 3), (23, 3), (24, 4)])
def test_some_pictures_are_held_out_where_there_are_enough(tmp_path: Path, count: int, held: int) -> None:
    write(tmp_path / "data", "abcdefghijklmnopqrstuvwx"[:count])
    pictures = read_pictures(load_preset(preset(tmp_path, "dataset: ./data"), (), "one"))
    assert (len(pictures.train), len(pictures.held_out)) == (count - held, held)


@pytest.mark.parametrize(
    ("words", "every"),
    [
        ("gain: fixed", 160),
        ("gain: fixed, micro_batch_size: 4", 40),
        ("micro_batch_size: 64", 10),
        ("optimizer: adamw, lr: 1e-4", 160),
        ("", 80),  # validations set the step length: twice as often
    ],
)
def test_validations_are_so_rare_that_they_take_a_twentieth_of_the_run(tmp_path: Path, words: str, every: int) -> None:
    words = f"train: {{{words}}}"
    loaded = load_preset(preset(tmp_path, "dataset: ./data", words), ("model.base=./sdxl.safetensors",), "one")
    assert validate_every(loaded, 4) == every


@pytest.mark.parametrize(("size", "held_out", "every"), [(1, 4, 40), (1, 3, 30), (4, 4, 20), (1, 0, 70)])
def test_validations_of_a_built_in_model_take_a_tenth(tmp_path: Path, size: int, held_out: int, every: int) -> None:
    words = f"train: {{micro_batch_size: {size}, gain: fixed}}"
    loaded = load_preset(preset(tmp_path, "dataset: ./data", words), (), "one")
    assert validate_every(loaded, held_out) == every


@pytest.mark.parametrize("held_out", [True, False])
def test_the_step_length_is_measured_by_pictures_that_are_not_trained_on_alone(tmp_path: Path, held_out: bool) -> None:
    loaded = load_preset(preset(tmp_path, "dataset: ./data"), (), "one")
    weights = [torch.nn.Parameter(torch.zeros(2, 2))]
    optimizer = build_optimizer_of(loaded, weights, held_out=held_out)
    assert optimizer.param_groups[0]["scope"] == (START if held_out else 1.0)
    assert (build_stop_rule(loaded, held_out=held_out).gain is not None) == held_out
    fixed = load_preset(preset(tmp_path, "dataset: ./data", "train: {gain: fixed}"), (), "one")
    assert validate_every(loaded, 0) == validate_every(fixed, 0)
    assert validate_every(loaded, 4) < validate_every(fixed, 4)


def test_the_preset_says_how_often_to_validation(tmp_path: Path) -> None:
    asked = load_preset(preset(tmp_path, "dataset: ./data", "validate: {every: 7}"), (), "one")
    assert validate_every(asked, 4) == 7


def test_pictures_are_chosen_over_the_whole_set() -> None:
    some: Any = list("abcdefg")
    assert evenly(some, 3) == ["a", "c", "e"]
    assert evenly(some, 9) == some
    assert evenly([], 3) == []
