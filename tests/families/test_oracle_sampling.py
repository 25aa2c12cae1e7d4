"""Each objective against its own sampler: noised half-way by it, denoised by a stock scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stock import VARIANTS, build, latents_of, listen, oracle, overheard, text_of

from emotrain.batch import Batch, Conditioning
from emotrain.diffusion import build_objective
from emotrain.families.common import DrawRequest
from emotrain.families.loading import load_family
from emotrain.train.losses import sample_losses, timesteps_at

CLEAN = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(5))
NOISE = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(6))
SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}


@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True)],
)
def test_a_perfect_denoiser_brings_the_picture_back_through_ddim(prediction: str, zero_snr: bool) -> None:
    from diffusers import DDIMScheduler

    config = {**SD, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    scheduler = DDIMScheduler(**config, clip_sample=False, timestep_spacing="trailing")
    objective = build_objective(prediction, config)
    scheduler.set_timesteps(20)
    half = scheduler.timesteps[10:]
    latents = objective.add_noise(CLEAN, NOISE, half[:1].float())
    assert (latents - CLEAN).abs().mean() > 0.3
    for t in half:
        output = objective.target(CLEAN, NOISE, t[None].float())
        latents = scheduler.step(output, t, latents).prev_sample
    assert (latents - CLEAN).abs().max() < 0.1


def test_a_perfect_denoiser_brings_the_picture_back_through_flow_euler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = build_objective("flow", scheduler.config)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(10)
    latents = objective.add_noise(CLEAN, NOISE, scheduler.sigmas[10:11])
    assert (latents - CLEAN).abs().mean() > 0.3
    for t in scheduler.timesteps[10:]:
        latents = scheduler.step(objective.target(CLEAN, NOISE, t[None] / 1000), t, latents).prev_sample
    assert (latents - CLEAN).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["sd_folder", "flux_folder"])
def test_predict_calls_the_denoiser_as_the_pipeline_does(kind: str, request: pytest.FixtureRequest) -> None:
    family = load_family(str(request.getfixturevalue(kind)), device="cpu")
    seen: list[dict[str, Any]] = []

    def note(module: Any, args: tuple[Any, ...], words: dict[str, Any], output: Any) -> None:
        names = ("sample", "timestep") if args else ()
        seen.append({**dict(zip(names, args, strict=True)), **words, "output": output[0]})

    handle = family.denoiser.register_forward_hook(note, with_kwargs=True)
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    words: dict[str, Any] = {
        "guidance_scale": 1.0,
        "num_inference_steps": 3,
        "width": 32,
        "height": 48,
        "output_type": "latent",
    }
    if family.name == "flux":
        words["max_sequence_length"] = 24
    pipeline("tiger face", generator=torch.Generator().manual_seed(0), **words)
    theirs = seen[1]
    handle.remove()
    text = family.encode_texts(["tiger face"])
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    latents = theirs.get("sample", theirs.get("hidden_states"))
    output = theirs["output"]
    if family.name == "flux":
        latents, output = (
            family.unpack_sampled(latents, 32, 48),
            family.unpack_sampled(output, 32, 48),
        )
    times = torch.as_tensor(theirs["timestep"]).float().reshape(1)
    with torch.no_grad():
        ours = family.predict(latents, times, text, Conditioning(zeros, zeros, zeros))
    assert torch.allclose(ours, output, atol=1e-5)


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
MODELS = [(variant, {}) for variant in VARIANTS] + [("sdxl", ZERO_SNR)]


@pytest.mark.parametrize(("variant", "scheduler"), MODELS)
def test_a_denoiser_that_knows_the_picture_learns_nothing_and_draws_it(variant: str, scheduler: dict[str, Any]) -> None:
    """Of every public model: encoded by us, its loss is 0 at all noise levels, and both samplers end at the picture."""
    family = build(variant, weights=False, **scheduler)
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clean, text = family.encode_images(pixels), text_of(family)
    answer = oracle(family, clean, text)
    sizes = Conditioning(*[torch.tensor([[64, 96]])] * 3)
    batch = Batch(clean, text, sizes, torch.ones(1), None, ("a",), 0, ("a cat",))
    objective = build_objective(family.prediction, family.scheduler_config)
    noise = latents_of(family, 96, 64)
    with torch.no_grad(), overheard(family.denoiser, answer):
        for place in (0.1, 0.5, 0.9):
            at = timesteps_at(family, objective, torch.tensor([place]), clean)
            assert float(sample_losses(family, objective, batch, noise, at)) < 1e-6
            wrong = Batch(clean + 0.1, text, sizes, torch.ones(1), None, ("a",), 0, ("a cat",))
            assert float(sample_losses(family, objective, wrong, noise, at)) > 1e-4  # the oracle does not know this one
        request = DrawRequest(text=text, negative=text, width=96, height=64, seed=3, steps=4, guidance=1.0)
        ours = family.draw(request, text, text)
    theirs = listen(family, noise, text, answer, steps=4, stand=False)
    expected = family.decode_latents(clean)
    for drawn in (family.decode_latents(ours), theirs.pixels[:, :3]):
        torch.testing.assert_close(drawn.clamp(-1, 1), expected.clamp(-1, 1), atol=1e-4, rtol=0)
