"""What a resumed run must agree with, where a newer version has keys that the checkpoint's preset lacks."""

from __future__ import annotations

from typing import Any

import pytest

from emotrain.config.load import load_preset
from emotrain.errors import CheckpointError
from emotrain.runs.changes import Identity, preset_changes, refuse


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The same plain values as an older version has written them: with no such key."""
    head, _, rest = key.partition(".")
    if isinstance(values, list):
        return [without(one, rest) if str(at) == head else one for at, one in enumerate(values)]  # type: ignore[return-value]
    if not rest:
        return {name: value for name, value in values.items() if name != head}
    return {name: without(value, rest) if name == head else value for name, value in values.items()}


@pytest.mark.parametrize("key", ["train.compile", "model.clip_skip", "dataset.folders.0.flip", "train.max_grad_norm"])
def test_a_key_that_the_checkpoint_does_not_know_stood_at_its_default(key: str) -> None:
    now = load_preset("quickstart").to_dict()
    assert preset_changes(without(now, key), now) == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.compile=true", "train.compile was 'auto'"),
        ("model.clip_skip=2", "model.clip_skip was 'auto'"),
        ("dataset.folders.0.flip=true", "dataset.folders.0.flip was False"),
    ],
)
def test_another_value_than_its_default_is_a_change(word: str, said: str) -> None:
    now = load_preset("quickstart", [word]).to_dict()
    (line,) = preset_changes(without(now, word.partition("=")[0]), now)
    assert line.startswith(said)


@pytest.mark.parametrize("key", ["train.gain", "train.ema", "train.loss.baseline"])
def test_what_the_checkpoint_depends_on_is_never_taken_for_its_default(key: str) -> None:
    now = load_preset("quickstart").to_dict()
    (line,) = preset_changes(without(now, key), now)
    assert line.startswith(f"{key} was None")


@pytest.mark.parametrize("word", ["validate.likeness=/clip", "sample.every=7", "save.every=9", "log.every=3"])
def test_what_does_not_touch_the_training_may_change(word: str) -> None:
    before, after = load_preset("quickstart").to_dict(), load_preset("quickstart", [word]).to_dict()
    assert before != after
    assert preset_changes(before, after) == []


@pytest.mark.parametrize(
    "key", ["model.base", "model.vae", "model.text_encoder", "model.tokenizer", "start_from.continue"]
)
def test_a_model_that_has_moved_and_is_the_same_is_no_change(key: str) -> None:
    before, after = load_preset("quickstart").to_dict(), load_preset("quickstart", [f"{key}=/elsewhere"]).to_dict()
    assert before != after
    one = Identity(before, "base", {}, {"the VAE": "v"})
    assert refuse(one, Identity(after, "base", {}, {"the VAE": "v"}), allow=False) == []
    for other in (Identity(after, "other", {}, {"the VAE": "v"}), Identity(after, "base", {}, {"the VAE": "w"})):
        with pytest.raises(CheckpointError):
            refuse(one, other, allow=False)
