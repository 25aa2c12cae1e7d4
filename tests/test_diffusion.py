"""Objectives against the schedulers' own arithmetic and against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from emotrain.diffusion import (
    add_offset,
    betas_of,
    build_objective,
    quantile,
    shift_for,
    shift_sigmas,
)
from emotrain.errors import ModelError

SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
DEV = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "shift": 3.0,
}  # fmt: skip
TIMES = torch.tensor([0.0, 1.0, 250.0, 500.0, 998.0, 999.0])


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 5, 7, generator=generator), torch.randn(6, 4, 5, 7, generator=generator)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_velocity_are_the_schedulers_own(schedule: str, zero_snr: bool) -> None:
    from diffusers import DDPMScheduler

    config = {**SD, "beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
    scheduler = DDPMScheduler(**config, prediction_type="v_prediction")
    objective = build_objective("v_prediction", config)
    latents, noise = pair()
    near = 5e-5 if schedule == "squaredcos_cap_v2" else 1e-5  # its betas reach 0.999: float32 rounding counts
    noisy = objective.add_noise(latents, noise, TIMES)
    assert torch.allclose(noisy, scheduler.add_noise(latents, noise, TIMES.long()), atol=near)
    velocity = objective.target(latents, noise, TIMES)
    assert torch.allclose(velocity, scheduler.get_velocity(latents, noise, TIMES.long()), atol=near)


def test_trained_betas_are_taken_as_they_are() -> None:
    assert torch.equal(betas_of({"trained_betas": [0.1, 0.2]}), torch.tensor([0.1, 0.2]))


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    objective = build_objective("v_prediction", {**SD, "rescale_betas_zero_snr": True})
    latents, noise = pair()
    last = torch.full((6,), 999.0)
    assert torch.allclose(objective.add_noise(latents, noise, last), noise, atol=1e-6)
    assert torch.allclose(objective.target(latents, noise, last), -latents, atol=1e-6)


def test_zero_terminal_snr_is_refused_for_epsilon() -> None:
    with pytest.raises(ModelError, match="zero terminal SNR"):
        build_objective("epsilon", {**SD, "rescale_betas_zero_snr": True})


def test_epsilon_target_is_the_noise() -> None:
    latents, noise = pair()
    assert build_objective("epsilon", SD).target(latents, noise, TIMES) is noise


def test_flow_noise_is_the_flow_schedulers_own_and_its_target_leads_back() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = build_objective("flow", {"shift": 3.0})
    latents, noise = pair()
    times = scheduler.timesteps[[0, 100, 500, 900, 998, 999]]
    sigmas = times / 1000
    noisy = objective.add_noise(latents, noise, sigmas)
    assert torch.allclose(noisy, scheduler.scale_noise(latents, times, noise), atol=1e-6)
    velocity = objective.target(latents, noise, sigmas)
    assert torch.allclose(noisy - sigmas.view(-1, 1, 1, 1) * velocity, latents, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weight_is_the_papers(prediction: str) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    objective = build_objective(prediction, SD, min_snr_gamma=5.0)
    snr = compute_snr(DDPMScheduler(**SD), TIMES.long())
    capped = torch.stack([snr, torch.full_like(snr, 5.0)]).amin(0)
    expected = capped / snr if prediction == "epsilon" else capped / (snr + 1)
    assert torch.allclose(objective.weight(TIMES), expected, rtol=1e-4)


def test_min_snr_weight_is_finite_at_zero_terminal_snr() -> None:
    objective = build_objective("v_prediction", {**SD, "rescale_betas_zero_snr": True}, min_snr_gamma=5.0)
    weight = objective.weight(TIMES)
    assert torch.isfinite(weight).all()
    assert weight[-1] == 0


def test_weights_are_one_unless_asked_for() -> None:
    for objective in (build_objective("epsilon", SD), build_objective("flow", DEV)):
        assert torch.equal(objective.weight(torch.tensor([0.5, 0.9])), torch.ones(2))


def test_noise_offset_has_the_law_of_an_added_constant_per_channel() -> None:
    noise = torch.randn(4000, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    offset = add_offset(noise, 0.1)
    means = offset.mean((2, 3))
    assert means.var() == pytest.approx(1 / 64 + 0.01, rel=0.05)
    inside = (
        (noise - noise.mean((2, 3), keepdim=True)),
        (offset - offset.mean((2, 3), keepdim=True)),
    )
    assert torch.allclose(*inside, atol=1e-5)


def test_noise_offset_of_zero_changes_nothing() -> None:
    latents, noise = pair()
    assert build_objective("epsilon", SD).noise(latents, noise) is noise
    changed = build_objective("epsilon", SD, noise_offset=0.05).noise(latents, noise)
    assert not torch.allclose(changed, noise)


def even(count: int) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_diffusion_timesteps_are_whole_and_each_as_likely() -> None:
    times = build_objective("epsilon", SD).timesteps(even(5000), 256)
    assert torch.equal(times.long().bincount(minlength=1000), torch.full((1000,), 5))
    assert times.dtype == torch.float32


def test_logit_normal_quantiles_are_those_of_the_normal() -> None:
    from statistics import NormalDist

    u = even(101)
    expected = [1 / (1 + math.exp(-NormalDist().inv_cdf(float(x)))) for x in u]
    assert torch.allclose(quantile(u, "logit-normal"), torch.tensor(expected, dtype=torch.float64), atol=1e-9)


def test_shift_is_the_papers_and_the_samplers() -> None:
    sigmas = torch.linspace(0.01, 1, 9)
    ratio = 3.0
    expected = ratio * sigmas / (1 + (ratio - 1) * sigmas)
    assert torch.allclose(shift_sigmas(sigmas, 3.0), expected)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_automatic_shift_is_the_flux_samplers_own(tokens: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(**DEV)
    sigmas = [1.0, 0.75, 0.5, 0.25]
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    ours = shift_sigmas(torch.tensor(sigmas), shift_for(tokens, DEV))
    assert torch.allclose(ours, scheduler.sigmas[:4], atol=1e-6)


def test_constant_shift_is_the_schedulers() -> None:
    assert shift_for(4096, {"shift": 3.0}) == 3.0
    assert shift_for(4096, {}) == 1.0


def test_flow_timesteps_stay_inside_and_shift_moves_them_to_the_noise() -> None:
    plain = build_objective("flow", {"shift": 1.0}).timesteps(even(1000), 64)
    shifted = build_objective("flow", {"shift": 1.0}, shift=3.0).timesteps(even(1000), 64)
    assert plain.median() == pytest.approx(0.5, abs=0.01)
    assert shifted.median() == pytest.approx(0.75, abs=0.01)
    edges = build_objective("flow", DEV).timesteps(torch.tensor([0.0, 0.9999999]), 4096)
    assert 0 < edges[0] <= edges[1] <= 1


@pytest.mark.parametrize(("prediction", "config"), [("epsilon", SD), ("v_prediction", SD), ("flow", DEV)])
def test_timesteps_and_positions_rise_with_u(prediction: str, config: dict[str, Any]) -> None:
    for density in ("uniform", "logit-normal"):
        objective = build_objective(prediction, config, timesteps=density)
        times = objective.timesteps(even(500), 1024)
        position = objective.position(times)
        assert (times.diff() >= 0).all()
        assert (position.diff() >= 0).all()
        assert position.min() >= 0
        assert position.max() < 1


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        ("sample", {}), ("epsilon", {"timesteps": "cosmap"}), ("flow", {"min_snr_gamma": 5.0}),
        ("flow", {"noise_offset": 0.1}), ("epsilon", {"shift": 3.0}),
    ],
)  # fmt: skip
def test_words_that_do_not_fit_are_refused(prediction: str, words: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|are for|is for"):
        build_objective(prediction, SD, **words)
