"""In which order a model's parts get the device: the encoders have it for themselves before the denoiser comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emotrain.config.load import load_preset
from emotrain.families.common import LoadedFamily
from emotrain.families.flux.model import Flux
from emotrain.runs.loaded import load


def test_pictures_captions_and_prompts_are_encoded_before_the_denoiser_is_placed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    acts: list[str] = []

    def watch(owner: Any, name: str, said: str = "") -> None:
        plain = getattr(owner, name)

        def call(self: Any, *args: Any, **words: Any) -> Any:
            acts.append(said or name)
            return plain(self, *args, **words)

        monkeypatch.setattr(owner, name, call)

    watch(LoadedFamily, "encode_images")
    watch(Flux, "encode_texts")
    watch(LoadedFamily, "free_encoders")
    watch(LoadedFamily, "place_denoiser")
    monkeypatch.setenv("EMOTRAIN_CACHE", str(tmp_path))  # or there may be nothing to encode
    loaded = load(load_preset("quickstart-flux"), lambda event: None)
    placed = acts.index("place_denoiser")
    assert {"encode_images", "encode_texts"} == set(acts[: acts.index("free_encoders")])
    assert acts[placed - 1] == "free_encoders"
    assert "encode_texts" not in acts[placed:]
    assert loaded.sampler is not None
    assert loaded.model.family.text_encoders == []
