"""The sigmas that the loop trains at are those of the family's stock pipeline, at the sizes that people train at."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emotrain.batch import Batch, Conditioning
from emotrain.diffusion import build_objective
from emotrain.families.loading import load_family
from emotrain.families.registry import configs, family_of_variant
from emotrain.train import loop
from emotrain.train.state import TrainState

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from fake_run import Recorder, limits, make_parts  # noqa: E402

STEPS = 8
SIZES = [(512, 512), (768, 768), (1024, 1024), (832, 1216), (1344, 768)]  # width, height in pixels
SCHEDULERS = [
    ("flux_folder", "flux1-dev"),
    ("flux_folder", "flux1-schnell"),
    ("sd3_folder", "sd3-medium"),
    ("sd3_folder", "dynamic"),  # no public SD3 has it, but its pipeline knows it
]
DYNAMIC = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "num_train_timesteps": 1000, "shift": 3.0,
}  # fmt: skip


def sampled_sigmas(family: Any, width: int, height: int) -> Tensor:
    """The sigmas that the stock pipeline goes through, from its own call; the denoiser is not asked."""
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    text = family.encode_texts(["a cat"])
    pipeline.transformer.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states),)
    pipeline(
        **family.pipeline_kwargs(text, text, 1.0), width=width, height=height, num_inference_steps=STEPS,
        output_type="latent", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return pipeline.scheduler.sigmas[:-1]


def trained_sigmas(family: Any, places: Tensor, width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The sigmas at which `accumulate` asks the denoiser, where uniform numbers fall on `places`."""
    channels = family.vae.config.latent_channels
    latents = torch.zeros(len(places), channels, height // family.vae_scale, width // family.vae_scale)
    sizes = torch.zeros(len(places), 2, dtype=torch.int64)
    ids = tuple(str(i) for i in range(len(places)))
    batch = Batch(latents, {}, Conditioning(sizes, sizes, sizes), torch.ones(len(places)), None, ids, 0)
    asked: list[Tensor] = []

    def predict(noisy: Tensor, timesteps: Tensor, *_: Any) -> Tensor:
        asked.append(timesteps)
        return torch.zeros_like(noisy).requires_grad_()

    class Data:
        batches_per_epoch = 1

        def batch(self, micro_step: int) -> Batch:
            return batch

    monkeypatch.setattr(family, "predict", predict)
    monkeypatch.setattr(loop, "uniforms", lambda seed, first, count: places)
    objective = build_objective("flow", family.scheduler_config, timesteps="uniform")
    parts = replace(make_parts(Recorder(), validation=False), family=family, objective=objective, data=Data())
    loop.accumulate(parts, limits(), TrainState())
    return asked[0]


@pytest.fixture(params=SCHEDULERS, ids=lambda pair: pair[1])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A small model with the scheduler of a real one and a VAE of 8 pixels per latent."""
    folder, name = request.param
    shutil.copytree(request.getfixturevalue(folder), tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    known = DYNAMIC if name == "dynamic" else configs(str(family_of_variant(name)))["scheduler"][name][1]
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", **known}))
    return load_family(str(tmp_path / "model"), device="cpu")


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_loop_trains_at_the_sigmas_of_the_stock_pipeline(
    family: Any, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = 8 // family.vae_scale  # the small VAE's latents stand for those of a real one
    width, height = width // scale, height // scale
    theirs = sampled_sigmas(family, width, height)
    if family.name == "flux":  # its pipeline names the sigmas; SD3's leaves them to the scheduler
        places = torch.linspace(1, 1 / STEPS, STEPS, dtype=torch.float64)
    else:
        places = torch.linspace(family.scheduler.sigma_max, family.scheduler.sigma_min, STEPS, dtype=torch.float64)
    ours = trained_sigmas(family, places.clamp(max=1 - 1e-12), width, height, monkeypatch)
    torch.testing.assert_close(ours.double(), theirs.double(), atol=2e-6, rtol=0)


def test_flux_dev_at_1024_pixels_has_the_published_shift() -> None:
    from emotrain.families.flux.model import Flux

    objective = build_objective("flow", configs("flux")["scheduler"]["flux1-dev"][1])
    family = Flux.__new__(Flux)
    family.name = "flux"
    tokens = family.num_image_tokens(128, 128)
    assert tokens == 4096
    assert objective.timesteps(torch.tensor([0.5]), tokens).item() == pytest.approx(0.7595, abs=1e-3)
