"""`verify-resume`: which kernels its runs are told to take, and what it says of weights that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from emotrain.config.load import load_preset
from emotrain.runs import verify


@pytest.mark.parametrize(("said", "wanted"), [("auto", True), ("true", True), ("false", False)])
def test_its_runs_take_deterministic_kernels_unless_the_preset_says_no(
    said: str, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_emotrain", lambda *words: words)
    preset = load_preset("quickstart", [f"train.deterministic={said}"])
    words: Any = verify._start(preset, 3, tmp_path, "straight")
    assert load_preset(words[1]).train.deterministic is wanted


def test_weights_that_differ_are_said_with_how_far_apart_they_are(tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_file({"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(3)}, one)
    save_file({"a": torch.tensor([1.0, 2.25]), "b": torch.zeros(3)}, other)
    assert verify._tensors("weights", one, one).equal
    found = verify._tensors("weights", one, other)
    assert (found.equal, found.apart) == (False, 0.25)
