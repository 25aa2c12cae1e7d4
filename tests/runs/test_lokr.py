"""Runs with a LoKr: resumed bit for bit, continued, stacked, imported from others' configs, planned."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from emotrain.config.load import load, load_preset
from emotrain.lora.file import read_lora
from emotrain.runs import plan, start
from emotrain.runs.imports import import_config
from emotrain.runs.start import Result
from emotrain.train.events import StepEnd

WORDS = (
    "network.type=lokr", "network.factor=4", "network.targets=[mid_block]", "train.max_steps=4", "sample.every=0",
    "validate.every=2", "train.loss.baseline=raw",
    "validate.probe_images=1", "save.every=1", "train.micro_batch_size=2",
)  # fmt: skip


class Stop:
    """Sends Ctrl-C at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def handle(self, event: Any) -> None:
        if isinstance(event, StepEnd) and event.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def close(self) -> None:
        pass


def train(name: str, runs_dir: Path, *words: str, observers: tuple[Any, ...] = ()) -> Result:
    preset = load("quickstart", [*WORDS, *words], name).preset
    return start.run(preset, runs_dir=runs_dir, observers=observers)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train("straight", tmp_path_factory.mktemp("lokr"))


@pytest.mark.slow
def test_a_run_that_is_stopped_and_goes_on_equals_one_that_was_not(straight: Result, tmp_path: Path) -> None:
    stopped = train("straight", tmp_path, observers=(Stop(2),))
    assert stopped.exit_code == 130
    start.resume(stopped.folder, load("quickstart", list(WORDS), "straight").preset, observers=())
    for name in ("lora.safetensors", "lora-last.safetensors"):
        one, other = load_file(straight.folder.path / name), load_file(stopped.folder.path / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_file_says_what_it_is_and_holds_convolutions_too(straight: Result) -> None:
    with safe_open(straight.folder.lora_path, "pt") as file:
        words = file.metadata()
    assert words["ss_network_module"] == "lycoris.kohya"
    assert json.loads(words["ss_network_args"]) | {"targets": ""} == {
        "algo": "lokr", "factor": "4", "full_matrix": "True", "conv_rank": 0, "targets": "",
    }  # fmt: skip
    assert "ss_network_dim" not in words
    assert any(value.ndim == 4 for value in read_lora(straight.folder.lora_path).state.values())


@pytest.mark.parametrize("kind", ["continue", "stack"])
def test_another_run_builds_on_it(kind: str, straight: Result, tmp_path: Path) -> None:
    lora = straight.folder.lora_path
    word = f"start_from.continue={lora}" if kind == "continue" else f"start_from.stack=[{{path: {lora}, weight: 1.0}}]"
    other = ("network.type=lora", "network.rank=2", "train.max_steps=1")
    second = train("second", tmp_path, word, *other)
    info = second.folder.info()
    assert [parent["kind"] for parent in info["parents"]] == [kind]
    assert info["base_loss"] == pytest.approx(straight.folder.info()["best_loss"], rel=1e-3)
    assert read_lora(second.folder.lora_path).is_lokr == (kind == "continue")


def test_plan_counts_the_factors(straight: Result) -> None:
    made = plan.make_plan(load_preset("quickstart", list(WORDS)))
    numbers = sum(value.numel() for value in read_lora(straight.folder.lora_path).state.values())
    assert (made.num_trained, made.factor, made.rank) == (numbers, 4, None)
    assert made.network == "LoKr with factor 4"
    assert {"twice the factor", "half the rank"} & dict(made.savings).keys() <= {"twice the factor"}


def test_words_without_effect_are_noted_where_they_stand_beside_the_kind(tmp_path: Path) -> None:
    text = "extends: quickstart\nnetwork: {type: lokr, rank: 4}\n"
    (tmp_path / "p.yaml").write_text(text)
    assert load(str(tmp_path / "p.yaml"), [], None).notes == (
        f"{tmp_path / 'p.yaml'}:2: network.rank has no effect on a LoKr",
    )  # fmt: skip


KOHYA = """
pretrained_model_name_or_path = "./sdxl.safetensors"
network_module = "lycoris.kohya"
network_args = ["algo=lokr", "factor=6"]
network_dim = 16
"""
AI_TOOLKIT = """
job: extension
config:
  process:
    - type: sd_trainer
      network: {type: lokr, lokr_full_rank: true, lokr_factor: 6}
      model: {name_or_path: ./sdxl, arch: sdxl}
"""


@pytest.mark.parametrize(("name", "text"), [("a.toml", KOHYA), ("a.yaml", AI_TOOLKIT)])
def test_a_lokr_of_another_trainer_is_imported(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    made = import_config(tmp_path / name, None, tmp_path)
    assert "type: lokr" in made.text
    assert "factor: 6" in made.text
    assert not any("plain LoRA" in str(row) for row in made.rows)
