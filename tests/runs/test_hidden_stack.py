"""A stacked LoRA with `sample: false` is trained on and not drawn with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from emotrain.config.load import load
from emotrain.families.loading import load_family
from emotrain.lora.adapter import HIDDEN, add_adapter, hidden_off, stack_frozen
from emotrain.lora.file import save_lora
from emotrain.ranks import ALONE
from emotrain.runs import build
from emotrain.runs import loaded as stage

WORDS = [
    "validate.probe_images=1", "network.targets=[mid_block.*to_q]",
    "sample.steps=2", 'sample.prompts=["[trigger], rocket", "[trigger], cactus"]',
]  # fmt: skip


@pytest.fixture(scope="module", params=[None, pytest.param(4, marks=pytest.mark.slow)], ids=["lora", "lokr"])
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


def at_the_start(folder: Path, *words: str) -> tuple[list[Image.Image], list[float]]:
    """The samples and the validation losses of a run before its first step."""
    loaded = stage.load(load("quickstart", [*WORDS, *words], "one").preset, lambda event: None)
    assert loaded.sampler is not None
    loaded.sampler.folder = folder
    loaded.sampler.draw(0)
    validation = build.build_validation(loaded.preset, loaded.model, loaded.data, ALONE, loaded.data.validation)
    return [Image.open(path) for path in sorted(folder.glob("step-00000000-*.png"))], validation.pictures()


def differ(ours: list[Image.Image], theirs: list[Image.Image]) -> bool:
    return any(ImageChops.difference(a, b).getbbox() is not None for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Image.Image], list[float]]:
    """Of a run without a stack: its pictures are those of the base."""
    return at_the_start(tmp_path_factory.mktemp("base"))


def test_samples_are_drawn_without_it_and_the_training_is_not(
    training_adapter: Path, base: tuple[list[Image.Image], list[float]], tmp_path: Path
) -> None:
    pictures, loss = base
    stack = f"path: {training_adapter}, weight: 1.0"
    shown, shown_loss = at_the_start(tmp_path / "shown", f"start_from.stack=[{{{stack}}}]")
    hidden, hidden_loss = at_the_start(tmp_path / "hidden", f"start_from.stack=[{{{stack}, sample: false}}]")
    assert len(pictures) > 1
    assert differ(shown, pictures)
    assert not differ(hidden, pictures)
    assert shown_loss == hidden_loss != loss


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
