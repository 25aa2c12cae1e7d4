"""Clip skip as A1111 counts it, against the stock pipelines, which count one (SD) or two (SDXL) less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from emotrain.config.load import load
from emotrain.families.loading import load_family
from emotrain.runs import start

TEXTS = ["tiger face", "", "inkmoji, two birds on a wire"]


@pytest.mark.parametrize("skip", [1, 2])
def test_sd_takes_the_layer_that_the_stock_pipeline_takes(skip: int) -> None:
    family = load_family("builtin:tiny-sd", device="cpu", clip_skip=skip)
    ours = family.encode_texts(TEXTS)["prompt_embeds"]
    pipeline = family.pipeline()
    if not hasattr(pipeline.text_encoder, "text_model"):  # transformers 5 dropped it, diffusers needs it
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    theirs, _ = pipeline.encode_prompt(TEXTS, "cpu", 1, False, clip_skip=skip - 1 or None)
    assert torch.equal(ours, theirs)
    usual = load_family("builtin:tiny-sd", device="cpu")
    assert torch.equal(ours, usual.encode_texts(TEXTS)["prompt_embeds"]) == (skip == 1)
    assert (family.text_identity() == usual.text_identity()) == (skip == 1)


@pytest.mark.parametrize("skip", [2, 3])
def test_sdxl_takes_the_layer_that_the_stock_pipeline_takes(skip: int, sdxl_folder: Path) -> None:
    family = load_family(str(sdxl_folder), device="cpu", clip_skip=skip)
    ours = family.encode_texts(TEXTS)
    theirs, _, pooled, _ = family.pipeline().encode_prompt(
        TEXTS, device="cpu", do_classifier_free_guidance=False, clip_skip=skip - 2 or None
    )
    assert torch.equal(ours["prompt_embeds"], theirs)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)
    usual = load_family(str(sdxl_folder), device="cpu").encode_texts(TEXTS)
    assert torch.equal(ours["prompt_embeds"], usual["prompt_embeds"]) == (skip == 2)


def test_a_run_trains_with_it_and_says_so(tmp_path: Path) -> None:
    words = [
        "train.max_steps=1", "train.loss.baseline=raw", "network.targets=[mid_block.*to_q]", "validate.probe_images=1",
        "sample.at_start=false", "sample.every=1", "sample.steps=1", "sample.prompts=[a cactus]",
    ]  # fmt: skip
    told: dict[int, Any] = {}
    for skip in (1, 2):
        preset = load("quickstart", [*words, f"model.clip_skip={skip}"], f"skip-{skip}").preset
        result = start.run(preset, runs_dir=tmp_path, observers=())
        with safe_open(result.folder.lora_path, "pt") as file:
            assert file.metadata()["ss_clip_skip"] == str(skip)
        rows = [json.loads(line) for line in result.folder.metrics_path.read_text().splitlines()]
        told[skip] = rows[0]["loss"]
        from PIL import Image

        said = Image.open(next((result.folder.path / "samples").glob("step-*.png"))).info["parameters"]
        assert ("Clip skip: 2" in said) == (skip == 2)
    assert told[1] != told[2]


def test_the_bare_word_of_other_trainers_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("extends: quickstart\nclip_skip: 2\n")
    loaded = load(str(tmp_path / "p.yaml"), [], None)
    assert loaded.preset.model.clip_skip == 2
