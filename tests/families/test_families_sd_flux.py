"""sd and flux: encoding, predicting and sampling agree with the stock diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emotrain.batch import Conditioning
from emotrain.families.common import DrawRequest
from emotrain.families.flux.model import image_ids, pack, unpack
from emotrain.families.loading import load_family
from emotrain.families.sampling import draw_sample
from emotrain.families.table import sniff

TEXTS = ["tiger face", "", "inkmoji, " + "a very long caption, " * 20]


def no_sizes(count: int) -> Conditioning:
    zeros = torch.zeros(count, 2, dtype=torch.int64)
    return Conditioning(zeros, zeros, zeros)


def test_sd_text_embeds_equal_the_pipelines_own(sd_folder: Path) -> None:
    family = load_family(str(sd_folder), device="cpu")
    ours = family.encode_texts(TEXTS)["prompt_embeds"]
    theirs, _ = family.pipeline().encode_prompt(TEXTS, "cpu", 1, False)
    assert ours.shape == (3, 32, 128)
    assert torch.equal(ours, theirs)


def test_flux_text_embeds_equal_the_pipelines_own(flux_folder: Path) -> None:
    family = load_family(str(flux_folder), device="cpu")
    ours = family.encode_texts(TEXTS)
    theirs, pooled, _ = family.pipeline().encode_prompt(TEXTS, max_sequence_length=24, device="cpu")
    assert ours["prompt_embeds"].shape == (3, 24, 128)
    assert torch.equal(ours["prompt_embeds"], theirs)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)


def test_packing_and_ids_are_those_of_the_flux_pipeline() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(0))
    theirs = FluxPipeline._pack_latents(latents, 2, 8, 6, 10)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, 6, 10), latents)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(image_ids(6, 10, latents), ids)


@pytest.mark.parametrize("kind", ["sd_folder", "flux_folder"])
def test_vae_round_trip_uses_scale_and_shift_as_diffusers_does(kind: str, request: pytest.FixtureRequest) -> None:
    family = load_family(str(request.getfixturevalue(kind)), device="cpu")
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = family.encode_images(pixels)
    assert latents.shape == (2, 8, 8, 12)
    vae: Any = family.vae
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(raw).sample
    shift = vae.config.shift_factor or 0.0
    assert torch.allclose(latents, (raw - shift) * vae.config.scaling_factor)
    assert torch.allclose(family.decode_latents(latents), decoded, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd_folder", "flux_folder"])
def test_predict_is_float32_and_keeps_the_shape(kind: str, request: pytest.FixtureRequest) -> None:
    family = load_family(str(request.getfixturevalue(kind)), device="cpu")
    latents = torch.randn(3, 8, 16, 8, generator=torch.Generator().manual_seed(2))
    times = torch.tensor([0.1, 0.5, 1.0]) if family.prediction == "flow" else torch.tensor([1.0, 500.0, 999.0])
    output = family.predict(latents, times, family.encode_texts(TEXTS), no_sizes(3))
    assert output.shape == latents.shape
    assert output.dtype == torch.float32
    alone = family.predict(latents[1:2], times[1:2], family.encode_texts(TEXTS[1:2]), no_sizes(1))
    assert torch.allclose(alone, output[1:2], atol=1e-4)


def draw(family: Any, seed: int = 3) -> np.ndarray:
    embeds, nothing = family.encode_texts(["tiger face"]), family.encode_texts([""])
    return np.asarray(draw_sample(family, DrawRequest(embeds, nothing, 64, 48, seed, steps=3)))


@pytest.mark.parametrize("kind", ["sd_folder", "flux_folder"])
def test_samples_are_repeatable_and_leave_the_global_random_state_alone(
    kind: str, request: pytest.FixtureRequest
) -> None:
    family = load_family(str(request.getfixturevalue(kind)), device="cpu")
    family.denoiser.train()
    before = torch.random.get_rng_state()
    first, again, other = draw(family), draw(family), draw(family, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.shape == (48, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert family.denoiser.training


@pytest.mark.parametrize("kind", ["sd_folder", "flux_folder"])
def test_samples_equal_the_pipelines_and_need_no_encoders(kind: str, request: pytest.FixtureRequest) -> None:
    family = load_family(str(request.getfixturevalue(kind)), device="cpu")
    embeds, nothing = family.encode_texts(["tiger face"]), family.encode_texts([""])
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    words: dict[str, Any] = {"width": 64, "height": 48, "num_inference_steps": 3}
    words["generator"] = torch.Generator().manual_seed(3)
    if family.name == "flux":
        theirs = pipeline(
            "tiger face",
            negative_prompt="",
            true_cfg_scale=3.0,
            max_sequence_length=24,
            guidance_scale=0.0,
            **words,
        ).images[0]
    else:
        theirs = pipeline("tiger face", negative_prompt="", guidance_scale=3.0, **words).images[0]
    family.free_encoders()
    ours = draw_sample(family, DrawRequest(embeds, nothing, 64, 48, 3, steps=3, guidance=3.0))
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_identities_change_with_the_weights_and_survive_freeing(sd_folder: Path) -> None:
    family = load_family(str(sd_folder), device="cpu")
    other = load_family(str(sd_folder), device="cpu")
    assert family.vae_identity() == other.vae_identity()
    assert family.text_identity() == other.text_identity()
    changed = load_family(str(sd_folder), device="cpu")
    with torch.no_grad():
        next(changed.text_encoders[0].encoder.parameters()).mul_(1.001)
        next(changed.vae.parameters()).mul_(1.001)
    assert changed.vae_identity() != family.vae_identity()
    assert changed.text_identity() != family.text_identity()
    before = other.vae_identity(), other.text_identity()
    other.free_encoders()
    assert (other.vae_identity(), other.text_identity()) == before
    assert other.text_encoders == []


def test_all_parameters_are_frozen(flux_folder: Path) -> None:
    family = load_family(str(flux_folder), device="cpu")
    modules = [family.denoiser, family.vae, *(part.encoder for part in family.text_encoders)]
    assert not any(p.requires_grad for module in modules for p in module.parameters())


def test_folders_are_recognised(sd_folder: Path, flux_folder: Path) -> None:
    found = sniff(str(sd_folder))
    assert (found.family, found.variant, found.prediction) == ("sd15", "custom", "v_prediction")
    assert (found.resolution, found.bucket_step, found.vae_scale, found.max_rank) == (64, 8, 4, 96)
    found = sniff(str(flux_folder))
    assert (found.family, found.variant, found.prediction) == ("flux", "custom", "flow")
    assert (found.resolution, found.bucket_step, found.vae_scale, found.max_rank) == (64, 8, 4, 128)
