"""A stacked LoRA with `sample: false` is trained on and not drawn with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from emotrain.config.load import load
from emotrain.families import load_family
from emotrain.lora.adapter import HIDDEN, add_adapter, hidden_off, stack_frozen
from emotrain.lora.file import save_lora
from emotrain.runs import start
from emotrain.runs.folder import RunFolder

WORDS = [
    "train.max_steps=1", "validate.probe_images=1", "train.loss.baseline=raw", "network.targets=attn",
    "sample.every=99", "sample.steps=2", 'sample.prompts=["[trigger], rocket", "[trigger], cactus"]',
]  # fmt: skip


@pytest.fixture(scope="module", params=[None, 4], ids=["lora", "lokr"])
def training_adapter(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = load_family("builtin:tiny-sd", device="cpu")
    adapter = add_adapter(family.denoiser, rank=4, factor=request.param, targets="attn", family="sd15", seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_lora(path, adapter.file_state(), alphas=adapter.file_alphas(), family="sd15", metadata={})
    return path


def first_pictures(name: str, runs_dir: Path, *words: str) -> list[Image.Image]:
    result = start.run(load("quickstart", [*WORDS, *words], name).preset, runs_dir=runs_dir, observers=())
    return [Image.open(path) for path in sorted((result.folder.path / "samples").glob("step-00000000-*.png"))]


def differ(ours: list[Image.Image], theirs: list[Image.Image]) -> bool:
    return any(ImageChops.difference(a, b).getbbox() is not None for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a stack: its pictures are those of the base."""
    runs = tmp_path_factory.mktemp("base")
    first_pictures("base", runs)
    return runs / "base"


def test_samples_are_drawn_without_it_and_the_training_is_not(
    training_adapter: Path, base_run: Path, tmp_path: Path
) -> None:
    base = [Image.open(path) for path in sorted((base_run / "samples").glob("step-00000000-*.png"))]
    stack = f"path: {training_adapter}, weight: 1.0"
    shown = first_pictures("shown", tmp_path, f"start_from.stack=[{{{stack}}}]")
    hidden = first_pictures("hidden", tmp_path, f"start_from.stack=[{{{stack}, sample: false}}]")
    assert len(base) > 1
    assert differ(shown, base)
    assert not differ(hidden, base)
    infos = [RunFolder(path).info() for path in (base_run, tmp_path / "shown", tmp_path / "hidden")]
    assert infos[1]["base_loss"] == infos[2]["base_loss"] != infos[0]["base_loss"]


def test_everything_else_stays_on(training_adapter: Path) -> None:
    from emotrain.lora.file import read_lora

    file = read_lora(training_adapter)
    x, text = torch.randn(1, 8, 16, 16), torch.randn(1, 8, 128)
    outputs = {}
    for names in ((), ("stack",), ("stack", HIDDEN)):
        model = load_family("builtin:tiny-sd", device="cpu").denoiser
        for name in names:
            stack_frozen(model, [(file.state, file.alphas, 0.5)], part="unet", name=name)
        with torch.no_grad():
            outputs[names] = model(x, 10, text).sample
            with hidden_off(model):
                outputs[(*names, "off")] = model(x, 10, text).sample
            assert torch.equal(model(x, 10, text).sample, outputs[names])
    assert torch.allclose(outputs["stack", HIDDEN, "off"], outputs[("stack",)], atol=1e-5)
    assert (outputs["stack", HIDDEN] - outputs[("stack",)]).abs().max() > 1e-2
    assert (outputs[("stack",)] - outputs[()]).abs().max() > 1e-2
