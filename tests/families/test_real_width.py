"""Training against each family's stock pipeline at the public models' widths: one denoiser, the same arguments.

What depends on size or width (position and time ids, guidance, packing, the timestep's scale, latent statistics) shows
here and not on small models.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stock import VARIANTS, build, latents_of, listen, nothing, overheard, text_of
from torch import Tensor

from emotrain.batch import Batch, Conditioning
from emotrain.families.common import LoadedFamily
from emotrain.train.losses import predict

SIZES = [(1024, 768), (512, 512)]  # width, height in pixels
NOT_COMPARED = {"return_dict", "joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"}
ORIGINAL, CROP = (1365, 2049), (3, 171)  # height, width; top, left


def asked(family: LoadedFamily, latents: Tensor, text: dict[str, Tensor], timesteps: Tensor) -> Tensor:
    """The prediction as `accumulate` gets it, for a picture that was cut out of a larger one."""
    target = torch.tensor([latents.shape[-2:]]) * family.vae_scale
    sizes = Conditioning(torch.tensor([ORIGINAL]), torch.tensor([CROP]), target)
    batch = Batch(latents, text, sizes, torch.ones(1), None, ("a",), 0, ("a cat",))
    with torch.no_grad():
        return predict(family, batch, latents, timesteps)


def timesteps_of(family: LoadedFamily, given: dict[str, Any]) -> Tensor:
    """Our timesteps [1] for those that the stock pipeline gave its denoiser."""
    time = given["t"] if "t" in given else given["timestep"]
    time = torch.as_tensor(time).reshape(1).float()
    return {"zimage": 1 - time, "sd3": time / 1000}.get(family.name, time)


def sizes_of(family: LoadedFamily) -> dict[str, Any]:
    """What SDXL's pipeline is told of the picture."""
    return {"original_size": ORIGINAL, "crops_coords_top_left": CROP} if family.name == "sdxl" else {}


def plain(value: Any) -> Any:
    """Tensors without a batch of one; a mask that hides nothing is none; lists of tensors as one tensor."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        value = torch.stack(value)
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            return None if bool(value.all()) else value
        return value.double().squeeze()
    return value


def as_stock(family: LoadedFamily, given: dict[str, Any]) -> dict[str, Any]:
    """Our arguments in the stock's form: Anima's padding mask is a channel of ours, and an argument there."""
    if family.name == "anima":
        film = given["hidden_states"]
        mask = torch.nn.functional.interpolate(film[:, 16], scale_factor=8)[:, None].squeeze(1)
        given = {**given, "hidden_states": film[:, :16], "padding_mask": mask}
    return given


def same(ours: Any, theirs: Any, where: str) -> None:
    """Equal values under equal names; what is not named is None."""
    if isinstance(theirs, dict):
        for key in {*ours, *theirs} - {
            "return_dict",
            "joint_attention_kwargs",
            "attention_kwargs",
            "cross_attention_kwargs",
        }:
            same(ours.get(key), theirs.get(key), f"{where}.{key}")
    elif isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=lambda text: f"{where}: {text}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_denoiser_is_given_what_the_stock_pipeline_gives_it(variant: str, size: tuple[int, int]) -> None:
    """Every argument, at the sizes that people train at; the weights play no part, so there are none."""
    family = build(variant, weights=False)
    latents, text = latents_of(family, *size), text_of(family)
    theirs = listen(family, latents, text, nothing, decoded=False, **sizes_of(family))
    assert len(theirs.calls) == 3
    for call in theirs.calls:
        with overheard(family.denoiser, nothing) as ours:
            asked(family, latents, text, timesteps_of(family, call.given))
        same(plain(as_stock(family, ours[0].given)), plain(call.given), variant)


def test_sdxls_sizes_are_whole_numbers_in_bf16_too() -> None:
    """The stock pipeline rounds them to bf16, to 1368 and 2048; in float32 it gives what was asked, as we always do."""
    family = build("sdxl", weights=False)
    family.dtype = torch.bfloat16
    with overheard(family.denoiser, nothing) as calls:
        asked(family, latents_of(family, 1024, 768), text_of(family), torch.tensor([500.0]))
    assert calls[0].given["added_cond_kwargs"]["time_ids"].tolist() == [[*ORIGINAL, *CROP, 768, 1024]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_are_scaled_as_the_stock_pipeline_takes_it_back(variant: str) -> None:
    """Encoded by us and decoded by its call, a picture meets the VAE as the VAE gave it."""
    family = build(variant, weights=False)
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels)
    seen = listen(family, latents, text_of(family), nothing)
    film = family.name in ("anima", "krea2", "qwen", "qwen21")
    seen_by_vae = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1) if family.name == "qwen21" else pixels
    with torch.no_grad():
        expected = family.vae.encode(seen_by_vae[:, :, None] if film else seen_by_vae).latent_dist.mode()
    torch.testing.assert_close(seen.raw_latents, expected, atol=1e-5, rtol=1e-5)
    assert float((expected - latents.reshape(expected.shape)).abs().mean()) > 1e-2  # the scales are not 1
    torch.testing.assert_close(family.decode_latents(latents).clamp(-1, 1), seen.pixels[:, :3], atol=1e-5, rtol=0)


@pytest.fixture
def alone() -> Iterator[None]:
    """The models of other tests go first: they lie in circles of objects, and each takes up to 7 GB."""
    gc.collect()
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(128, 96), (64, 64)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prediction_is_the_stock_pipelines(variant: str, size: tuple[int, int], alone: None) -> None:
    family = build(variant)
    latents, text = latents_of(family, *size), text_of(family)
    for call in listen(family, latents, text, **sizes_of(family)).calls:
        with overheard(family.denoiser) as ours:
            asked(family, latents, text, timesteps_of(family, call.given))
        output, expected = plain(ours[0].output), plain(call.output)
        assert expected.std() > 1e-2
        largest = max(1.0, float(expected.abs().max()))  # Z-Image's 1 - sigma is not exact in float32
        assert float((output - expected).abs().max()) <= 1e-5 * largest
