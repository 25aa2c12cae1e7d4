"""Z-Image and FLUX.2 against their stock pipelines: prompts, latents, the denoiser's call, whole pictures, files."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from newer_models import in_one_file, pipeline_of, save_folder, separate_files, text_model, vae_of
from original_files import in_scaled_fp8, same_weights, vae_tensors
from safetensors.torch import load_file, save_file

from emotrain.batch import Conditioning
from emotrain.cli.app import main
from emotrain.config.schema import ModelSection
from emotrain.diffusion import shift_for
from emotrain.errors import ModelError
from emotrain.families import quantize
from emotrain.families.common import DrawRequest
from emotrain.families.fitting import refuse_misfit, refuse_misfit_file
from emotrain.families.flux.model import unpack
from emotrain.families.loading import family_class, load_family
from emotrain.families.memory import GIB
from emotrain.families.quantize import RoundedLinear, make_plain
from emotrain.families.registry import FAMILIES, configs, encoder_configs
from emotrain.families.sampling import draw_sample
from emotrain.families.separate import (
    Given,
    diffusers_vae,
    load_separate,
    refuse_other_encoder,
    without_upper_layers,
)
from emotrain.families.stored import stored_parameters
from emotrain.families.table import sniff
from emotrain.runs.plan_ram import weights_of

KINDS = ["zimage", "flux2", "flux2-dev", "krea2", "qwen", "chroma"]
IN_ONE_FOLDER = ["flux2-dev", "chroma"]  # small ones of the same build are not read from separate files
PROMPTS = ["a red apple", "a very much longer caption, of a pear on a table near a window", ""]
NO_SIZES = Conditioning(*[torch.zeros(1, 2, dtype=torch.int64)] * 3)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """Name of the family, its stock pipeline, and the folder that it was saved in."""
    pipeline = pipeline_of(request.param)
    pipeline.set_progress_bar_config(disable=True)
    return (
        request.param,
        pipeline,
        save_folder(request.param, pipeline, tmp_path_factory.mktemp("newer") / request.param),
    )


def test_its_parts_fit_each_other(model: tuple[str, Any, Path]) -> None:
    assert refuse_misfit(sniff(model[2])).name == model[0].split("-")[0]


@pytest.fixture
def separable(model: tuple[str, Any, Path]) -> tuple[str, Any, Path]:
    """A model that ComfyUI's separate files can hold too."""
    if model[0] in IN_ONE_FOLDER:
        pytest.skip("of the public size alone")
    return model


def stock_embeds(kind: str, pipeline: Any, prompt: str) -> torch.Tensor:
    if kind == "zimage":
        return pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)[0][0]
    if kind == "chroma":
        embeds, mask = pipeline._get_t5_prompt_embeds([prompt])
        return embeds[0][mask[0].bool()]
    if kind == "qwen":
        return pipeline._get_qwen_prompt_embeds([prompt])[0][0]
    if kind == "krea2":
        states, mask = pipeline.get_text_hidden_states(prompt, 512, torch.device("cpu"))
        return states[0][mask[0]]
    if kind == "flux2-dev":
        return pipeline._get_mistral_3_small_prompt_embeds(
            pipeline.text_encoder, pipeline.tokenizer, prompt, hidden_states_layers=(1, 2, 3)
        )[0]
    return pipeline._get_qwen3_prompt_embeds(
        pipeline.text_encoder, pipeline.tokenizer, prompt, hidden_states_layers=(1, 2, 3)
    )[0]


def test_it_is_recognised(model: tuple[str, Any, Path]) -> None:
    kind, _, folder = model
    found = sniff(folder)
    assert (found.family, found.prediction, found.variant) == (kind.split("-")[0], "flow", "custom")
    assert found.vae_scale == {"flux2": 16}.get(found.family, 8)
    assert found.latent_channels == {"flux2": 16}.get(found.family, 4)


def test_prompts_are_encoded_as_by_the_stock_pipeline(model: tuple[str, Any, Path]) -> None:
    kind, pipeline, folder = model
    family = load_family(str(folder), device="cpu")
    embeds = family.encode_texts(PROMPTS)
    for row, mask, prompt in zip(embeds["prompt_embeds"], embeds["prompt_mask"], PROMPTS, strict=True):
        with torch.no_grad():
            expected = stock_embeds(kind, pipeline, prompt)
        assert int(mask.sum()) == len(expected)
        assert torch.equal(row[mask], expected)
    alone = family.encode_texts(PROMPTS[:1])  # a row does not depend on its neighbours
    assert torch.equal(alone["prompt_embeds"][0], embeds["prompt_embeds"][0][embeds["prompt_mask"][0]])


def test_latents_are_the_stock_vaes_and_come_back(model: tuple[str, Any, Path]) -> None:
    kind, pipeline, folder = model
    family = load_family(str(folder), device="cpu")
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels)
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels[:, :, None] if kind in ("krea2", "qwen") else pixels).latent_dist.mode()
        if kind in ("krea2", "qwen"):
            config = pipeline.vae.config
            mean, deviation = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
            expected = ((raw - mean) / deviation)[:, :, 0]
        elif kind in ("zimage", "chroma"):
            expected = (raw - 0.1) * 0.5
        else:
            norm = pipeline.vae.bn
            expected = pipeline._patchify_latents(raw)
            expected = (expected - norm.running_mean.view(1, -1, 1, 1)) / torch.sqrt(
                norm.running_var.view(1, -1, 1, 1) + pipeline.vae.config.batch_norm_eps
            )
        assert torch.allclose(latents, expected, atol=1e-6)
        pixels = pipeline.vae.decode(raw).sample
        pixels = pixels[:, :, 0] if kind in ("krea2", "qwen") else pixels
        assert torch.allclose(family.decode_latents(latents), pixels, atol=1e-5)


# The small text encoder has fewer layers than the real one.
SHALLOW = {kind: {"text_encoder_out_layers": (1, 2, 3)} if kind.startswith("flux2") else {} for kind in KINDS}


def capture(pipeline: Any, **words: Any) -> tuple[list[dict[str, Any]], Any]:
    """What a stock pipeline asks of its denoiser, call by call, and the picture's latents."""
    calls: list[dict[str, Any]] = []
    inner = pipeline.transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        calls.append({"args": args, "kwargs": kwargs, "output": output[0]})
        return output

    pipeline.transformer.forward = forward
    try:
        latents = pipeline(output_type="latent", **words).images
    finally:
        pipeline.transformer.forward = inner
    return calls, latents


def no_guidance(kind: str) -> dict[str, Any]:
    """What keeps a stock pipeline from guidance."""
    return {"true_cfg_scale": 1.0} if kind == "qwen" else {"guidance_scale": 1.0 if kind.startswith("flux2") else 0.0}


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_a_prediction_is_the_stock_pipelines_call(model: tuple[str, Any, Path], size: tuple[int, int]) -> None:
    kind, pipeline, folder = model
    family = load_family(str(folder), device="cpu")
    width, height = size
    calls, _ = capture(
        pipeline, prompt=PROMPTS[0], width=width, height=height, num_inference_steps=3,
        generator=torch.Generator().manual_seed(5), **no_guidance(kind), **SHALLOW[kind],
    )  # fmt: skip
    text = family.encode_texts(PROMPTS[:1])
    for call in calls:
        if kind == "zimage":
            noisy = torch.stack(call["args"][0])[:, :, 0]
            sigmas = 1.0 - call["args"][1]
            expected = -torch.stack(call["output"])[:, :, 0]
        elif kind in ("krea2", "qwen", "chroma"):
            tokens = call["kwargs"]["hidden_states"]
            noisy = unpack(tokens, height // 8, width // 8)
            sigmas = call["kwargs"]["timestep"]
            expected = unpack(call["output"], height // 8, width // 8)
        else:
            tokens = call["kwargs"]["hidden_states"]
            noisy = tokens.transpose(1, 2).reshape(1, -1, height // 16, width // 16)
            sigmas = call["kwargs"]["timestep"]
            expected = call["output"].transpose(1, 2).reshape(noisy.shape)
        with torch.no_grad():
            ours = family.predict(noisy, sigmas, text, NO_SIZES)
        assert torch.allclose(ours, expected, atol=1e-5)
        assert float(expected.abs().max()) > 1e-3
    assert len(calls) == 3


def test_captions_of_different_lengths_in_one_batch(model: tuple[str, Any, Path]) -> None:
    _, _, folder = model
    family = load_family(str(folder), device="cpu")
    channels = family.denoiser.config.in_channels // FAMILIES[family.name].packed_channels
    latents = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    sigmas = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        both = family.predict(latents, sigmas, family.encode_texts(PROMPTS[:2]), NO_SIZES)
        for i in range(2):
            alone = family.predict(latents[i : i + 1], sigmas[i : i + 1], family.encode_texts([PROMPTS[i]]), NO_SIZES)
            assert torch.allclose(both[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_is_the_stock_pipelines_picture(model: tuple[str, Any, Path], guidance: float) -> None:
    kind, pipeline, folder = model
    family = load_family(str(folder), device="cpu")
    words: dict[str, Any] = {"prompt": PROMPTS[0], "width": 64, "height": 96, "num_inference_steps": 4, **SHALLOW[kind]}
    if kind == "qwen":
        words |= {"true_cfg_scale": guidance, "negative_prompt": "" if guidance > 1 else None}
    else:
        words["guidance_scale"] = guidance - 1.0 if kind in ("zimage", "krea2") else guidance  # theirs counts from 0
    picture = pipeline(generator=torch.Generator().manual_seed(7), **words).images[0]
    text, negative = family.encode_texts(PROMPTS[:1]), family.encode_texts([""])
    family.free_encoders()  # as during a run
    ours = draw_sample(
        family,
        DrawRequest(
            text=text, negative=negative, width=64, height=96, seed=7,
            steps=4, guidance=guidance,
        ),
    )  # fmt: skip
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(picture, dtype=int))
    assert difference.max() <= 1
    assert np.asarray(picture).std() > 1


@pytest.mark.parametrize("model", ["krea2", "qwen"], indirect=True)
def test_guidance_is_the_stock_pipelines_to_the_latents(model: tuple[str, Any, Path]) -> None:
    """Small random models hardly move a picture's levels; their latents tell how guidance was mixed."""
    kind, pipeline, folder = model
    family = load_family(str(folder), device="cpu")
    words: dict[str, Any] = {"guidance_scale": 7.0}
    if kind == "qwen":
        words = {"true_cfg_scale": 8.0, "negative_prompt": ""}
    theirs = pipeline(
        prompt=PROMPTS[0], width=64, height=96, num_inference_steps=4, output_type="latent",
        generator=torch.Generator().manual_seed(7), **words,
    ).images  # fmt: skip
    text, negative = family.encode_texts(PROMPTS[:1]), family.encode_texts([""])
    request = DrawRequest(text=text, negative=negative, width=64, height=96, seed=7, steps=4, guidance=8.0)
    with torch.no_grad():
        ours = family.draw(request, text, negative)
    assert torch.allclose(ours, unpack(theirs, 12, 8), atol=1e-4)


def test_comfyuis_separate_files_are_the_same_model(separable: tuple[str, Any, Path], tmp_path: Path) -> None:
    kind, pipeline, folder = separable
    files = separate_files(kind, pipeline, tmp_path / "comfy")
    whole = load_family(str(folder), device="cpu")
    found = sniff(files["denoiser"])
    assert (found.family, found.kind, found.missing) == (kind, "file", ("vae", "text_encoder"))
    assert found.variant == "custom"  # by the config beside it: nothing of the public model's sizes is expected
    family = load_family(
        str(files["denoiser"]), device="cpu", vae=str(files["vae"]), text_encoder=str(files["text_encoder"]),
        tokenizer=str(files["tokenizer"]),
    )  # fmt: skip
    for ours, theirs in ((family.denoiser, whole.denoiser), (family.vae, whole.vae)):
        assert {k: v.tolist() for k, v in ours.state_dict().items()} == {
            k: v.tolist() for k, v in theirs.state_dict().items()
        }
    one, other = family.encode_texts(PROMPTS), whole.encode_texts(PROMPTS)
    assert torch.equal(one["prompt_embeds"], other["prompt_embeds"])


@pytest.mark.parametrize("inside", [False, True], ids=["comfyui", "maker"])
def test_flux2s_vae_is_read_under_its_original_names(inside: bool) -> None:
    """Its maker's file has the convolutions between the halves inside these, diffusers' and others beside them."""
    vae = vae_of("flux2")
    tensors = {key.removeprefix("first_stage_model."): value for key, value in vae_tensors(vae).items()}
    if inside:
        tensors = {re.sub("^post_quant_conv", "decoder.post_quant_conv", key): t for key, t in tensors.items()}
        tensors = {re.sub("^quant_conv", "encoder.quant_conv", key): t for key, t in tensors.items()}
    found = diffusers_vae(tensors, "AutoencoderKLFlux2", dict(vae.config))
    own = vae.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_scaled_fp8_files_stay_so_in_the_denoiser_and_in_the_text_encoder(
    separable: tuple[str, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, pipeline, _ = separable
    monkeypatch.setattr(quantize, "SMALLEST", 32)
    files = separate_files(kind, pipeline, tmp_path / "comfy")
    words = {name: str(files[name]) for name in ("vae", "text_encoder", "tokenizer")}
    tensors, texts = load_file(files["denoiser"]), load_file(files["text_encoder"])
    stored, plain = in_scaled_fp8(tensors)
    embeddings = {key: value for key, value in texts.items() if "embed" in key}
    stored_texts, plain_texts = in_scaled_fp8({key: value for key, value in texts.items() if key not in embeddings})
    families = []
    for denoiser, text_encoder in ((plain, plain_texts), (stored, stored_texts)):
        save_file(denoiser, files["denoiser"])
        save_file(text_encoder | embeddings, files["text_encoder"])
        families.append(load_family(str(files["denoiser"]), device="cpu", dtype="bf16", **words))
    theirs, ours = families
    large = [one for one in theirs.denoiser.modules() if type(one) is torch.nn.Linear and min(one.weight.shape) >= 32]
    assert same_weights(ours.denoiser, theirs.denoiser) == len(large) > 8
    encoder = ours.text_encoders[0].encoder
    assert same_weights(encoder, theirs.text_encoders[0].encoder) >= 10
    numbers = sum(one.weight.numel() for one in encoder.modules() if isinstance(one, RoundedLinear))
    in_eights = {"": sum(one.weight.numel() for one in large), "text_encoder": numbers}
    assert stored_parameters(sniff(files["denoiser"]), words["text_encoder"]) == in_eights
    assert ours.text_identity() == theirs.text_identity()
    text, plain_text = (family.encode_texts(PROMPTS)["prompt_embeds"] for family in (ours, theirs))
    if kind == "qwen":  # a bias is added after the product has been rounded
        assert (text - plain_text).norm() < 0.02 * plain_text.norm()
    else:
        assert torch.equal(text, plain_text)
    if kind == "zimage":  # a layer of its timestep that is kept only here, so small, tells its dtype to what comes in
        return
    text = ours.encode_texts(PROMPTS[:1])
    noise = torch.randn(1, 16, 4, 4) if kind == "flux2" else torch.randn(1, 4, 8, 8)
    one, other = (family.predict(noise, torch.tensor([500.0]), text, NO_SIZES) for family in families)
    assert (one - other).norm() < 0.02 * other.norm()  # a bias is added after the product has been rounded


def rounded_to_int8(tensors: dict[str, torch.Tensor], group: int, said: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As ComfyUI stores them: a scale a row, the inputs rotated by a regular Hadamard matrix before."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.kron(four, four) / 4 if group else None
    stored = {}
    for key, value in tensors.items():
        layer = key.removesuffix(".weight")
        if value.ndim != 2 or "embed" in key or not key.endswith(".weight") or value.shape[1] % 16:
            stored[key] = value
            continue
        if matrix is not None:
            parts = [value[:, i : i + group] @ matrix.T for i in range(0, value.shape[1], group)]
            value = torch.cat(parts, dim=1)
        scale = value.abs().amax(dim=1, keepdim=True) / 127
        stored[key] = (value / scale).round().to(torch.int8)
        stored[f"{layer}.weight_scale"] = scale
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return stored


@pytest.mark.parametrize("group", [0, 16], ids=["rows", "convrot"])
def test_int8_files_of_comfyui_are_kept_with_their_scales_and_rotation(
    separable: tuple[str, Any, Path], group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, pipeline, folder = separable
    monkeypatch.setattr(quantize, "SMALLEST", 32)
    files = separate_files(kind, pipeline, tmp_path / "comfy")
    said = {"format": "int8_tensorwise", **({"convrot": True, "convrot_groupsize": group} if group else {})}
    for name in ("denoiser", "text_encoder"):
        save_file(rounded_to_int8(load_file(files[name]), group, said), files[name])
    words = {name: str(files[name]) for name in ("vae", "text_encoder", "tokenizer")}
    family = load_family(str(files["denoiser"]), device="cpu", **words)
    in_eights = stored_parameters(sniff(files["denoiser"]), words["text_encoder"])
    counted = weights_of(sniff(files["denoiser"]), ModelSection(base=str(files["denoiser"]), **words), torch.float32)
    held = 0
    for part, ours, theirs in (
        ("", family.denoiser, pipeline.transformer), ("text_encoder", family.text_encoders[0].encoder, None)
    ):  # fmt: skip
        kept = [one for one in ours.modules() if isinstance(one, RoundedLinear)]
        assert sum(one.weight.numel() for one in kept) == in_eights[part] > 10_000
        assert {one.group for one in kept} == {group}
        held += sum(p.nbytes for p in ours.parameters())
        make_plain(ours)
        original = (theirs or text_model(pipeline)).state_dict()
        for key, value in ours.state_dict().items():
            if value.ndim == 2 and value.numel() > 100:
                most = original[key].abs().amax(dim=1, keepdim=True) * (group or 1) ** 0.5
                assert bool(((value - original[key]).abs() <= most / 100 + 1e-6).all()), key
    held += sum(p.nbytes for p in family.vae.parameters())
    assert counted.whole * GIB == pytest.approx(held, rel=0.1)  # layers above those that are read too, and scales
    whole = load_family(str(folder), device="cpu").encode_texts(PROMPTS)["prompt_embeds"]
    family = load_family(str(files["denoiser"]), device="cpu", **words)
    given = family.encode_texts(PROMPTS)["prompt_embeds"]
    assert 0 < (given - whole).norm() < 0.1 * whole.norm()
    for other in ({**said, "format": "nvfp4"}, {**said, "convrot": True, "convrot_groupsize": 8}):
        save_file(
            rounded_to_int8(
                load_file(separate_files(kind, pipeline, tmp_path / other["format"])["denoiser"]), 0, other
            ),
            files["denoiser"],
        )
        with pytest.raises(ModelError, match="quantised form"):
            sniff(files["denoiser"])


def test_a_checkpoint_with_everything_in_it_is_the_same_model_in_8_bits_too(
    separable: tuple[str, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, pipeline, _ = separable
    monkeypatch.setattr(quantize, "SMALLEST", 32)
    files = separate_files(kind, pipeline, tmp_path / "comfy")
    texts = load_file(files["text_encoder"])
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in texts.items()}, files["text_encoder"])
    words = {name: str(files[name]) for name in ("vae", "text_encoder", "tokenizer")}
    theirs = load_family(str(files["denoiser"]), device="cpu", dtype="bf16", **words)
    path = in_one_file(files)
    assert not sniff(path).missing
    ours = load_family(str(path), device="cpu", dtype="bf16")
    assert ours.text_identity() == theirs.text_identity()
    assert ours.vae_identity() == theirs.vae_identity()
    for key, value in theirs.encode_texts(PROMPTS).items():
        assert torch.equal(ours.encode_texts(PROMPTS)[key], value)
    state = ours.denoiser.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.denoiser.state_dict().items())
    found, section = sniff(path), ModelSection(base=str(path))
    refuse_misfit_file(found)
    refuse_other_encoder(found, None)
    in_eights = stored_parameters(sniff(files["denoiser"]), words["text_encoder"])
    assert stored_parameters(found) == in_eights
    apart = weights_of(sniff(files["denoiser"]), ModelSection(base=str(files["denoiser"]), **words), torch.bfloat16)
    assert in_eights["text_encoder"] > 10_000
    assert weights_of(found, section, torch.bfloat16).whole == pytest.approx(apart.whole, rel=1e-4)
    given = ModelSection(base=str(path), **words)  # what lies in the file is not read then
    assert weights_of(found, given, torch.bfloat16).whole == pytest.approx(apart.whole, rel=1e-4)


def test_a_checkpoint_of_chroma_has_other_names_for_its_parts(tmp_path: Path) -> None:
    """ComfyUI has no names of its own for them: VAE and T5 begin as those of SD."""
    pipeline = pipeline_of("chroma")
    files = separate_files("chroma", pipeline, tmp_path / "comfy")
    path = in_one_file(files, "cond_stage_model.t5xxl.", "first_stage_model.")
    found = sniff(path)
    assert (found.family, found.missing) == ("chroma", ())
    pieces = load_separate(found, torch.float32, Given(denoiser=pipeline.transformer))
    for ours, theirs in ((pieces["vae"], pipeline.vae), (pieces["text_encoder"], pipeline.text_encoder)):
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    parts = {name: sum(p.nbytes for p in getattr(pipeline, name).parameters()) for name in ("vae", "text_encoder")}
    words = {name: str(files[name]) for name in ("vae", "text_encoder")}
    inside, apart = (ModelSection(base=str(path), **more) for more in ({}, words))  # what is given apart counts alone
    whole = sum(p.nbytes for p in pipeline.transformer.parameters()) + sum(parts.values())
    assert weights_of(found, inside, torch.float32).whole * GIB == pytest.approx(whole, rel=0.01)
    assert weights_of(found, apart, torch.float32).whole * GIB == pytest.approx(whole, rel=0.01)


def test_a_checkpoint_with_another_text_encoder_in_it_is_refused(
    separable: tuple[str, Any, Path], tmp_path: Path
) -> None:
    kind, pipeline, _ = separable
    files = separate_files(kind, pipeline, tmp_path / "comfy")
    texts = {key: value for key, value in load_file(files["text_encoder"]).items() if ".layers.0.mlp" not in key}
    save_file(texts, files["text_encoder"])
    path = in_one_file(files)
    with pytest.raises(ModelError, match="the text encoder in `.*all.safetensors` lacks 3 tensors"):
        load_family(str(path), device="cpu")


def test_what_is_missing_is_named_with_its_key(separable: tuple[str, Any, Path], tmp_path: Path) -> None:
    kind, pipeline, _ = separable
    files = separate_files(kind, pipeline, tmp_path / "comfy")
    with pytest.raises(ModelError, match="does not hold vae and text_encoder") as caught:
        load_family(str(files["denoiser"]), device="cpu")
    assert "model.vae" in str(caught.value.hint)
    assert "model.text_encoder" in str(caught.value.hint)


@pytest.mark.parametrize("harm", ["smaller", "lacking", "other", "narrow", "words"])
def test_a_text_encoder_of_another_kind_is_refused(
    separable: tuple[str, Any, Path], harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `check` too, from header and config alone, in the same words."""
    kind, pipeline, _ = separable
    files = separate_files(kind, pipeline, tmp_path / "comfy")
    tensors = load_file(files["text_encoder"])
    if harm == "smaller":
        tensors["model.norm.weight"] = torch.ones(8)
    elif harm == "lacking":
        del tensors["model.norm.weight"]
    else:
        tensors["model.layers.99.norm.weight"] = torch.ones(8)
    save_file(tensors, files["text_encoder"])
    if harm == "narrow":  # a whole and sound one, of another width
        config = json.loads((tmp_path / "comfy" / "text_encoder" / "config.json").read_text())
        (tmp_path / "comfy" / "text_encoder" / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    if harm == "words":
        files["text_encoder"].write_text("these are words")
    with pytest.raises(ModelError) as refused:
        load_family(
            str(files["denoiser"]), device="cpu", vae=str(files["vae"]), text_encoder=str(files["text_encoder"]),
            tokenizer=str(files["tokenizer"]),
        )  # fmt: skip
    assert "text_encoder" in refused.value.message
    (tmp_path / "p.yaml").write_text(
        f"model: {{base: {files['denoiser']}, vae: {files['vae']}, text_encoder: {files['text_encoder']}}}\n"
        "dataset: {trigger: rkt, resolution: 64, buckets: {step: 64, min: 64}, folders: [{path: builtin:example}]}\n"
    )
    for command in ("check", "run"):
        assert main([command, str(tmp_path / "p.yaml"), "--runs-dir", str(tmp_path / "runs")]) == 4
        assert f"error: {refused.value.message}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_run_and_one_that_continues_its_lora(
    model: tuple[str, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emotrain.lora.file import read_lora

    kind, _, folder = model
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(
        f"model: {folder}\n"
        "dataset: {trigger: rkt, resolution: 64, buckets: {step: 64, min: 64}, folders: [{path: builtin:example}]}\n"
        "network: {rank: 2}\ntrain: {max_steps: 3}\nvalidate: {every: 2}\nsave: {every: 2}\n"
        'sample: {every: 2, steps: 2, prompts: ["a [trigger]"]}\nstop: {mode: "off"}\n'
    )
    assert main(["check", "p.yaml"]) == 0
    assert main(["run", "p.yaml", "--plain"]) == 0
    lora = read_lora(tmp_path / "runs" / "p" / "lora.safetensors")
    assert lora.family == kind.split("-")[0]
    assert list((tmp_path / "runs" / "p" / "samples").glob("step-*-1.png"))
    assert main(["run", "p.yaml", "--plain", "--name", "on", "--set", f"start_from.continue={lora.path}"]) == 0


LANGUAGE_MODELS = [
    (family, variant)
    for family, spec in FAMILIES.items()
    for variant in spec.variants
    if spec.text_encoders[0].kind == "llm"
]


@pytest.mark.parametrize(("family", "variant"), LANGUAGE_MODELS)
def test_the_parameters_of_text_encoders_are_those_of_their_configs(family: str, variant: str) -> None:
    import diffusers
    import transformers

    spec = FAMILIES[family]
    for encoder in spec.encoders_of(variant):
        kind, words = encoder_configs(family, variant)[encoder.name]
        with torch.device("meta"):
            if encoder.kind == "adapter":
                model = getattr(diffusers, kind).from_config(words)
            else:
                cls = getattr(transformers, kind)
                model = cls(cls.config_class(**words))
        assert sum(p.numel() for p in model.parameters()) == encoder.parameters


def hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of bf16 tensors of the real sizes, in which only the header takes room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


@pytest.mark.parametrize("layers", [30, 40])
def test_the_text_encoder_of_flux2_dev_is_whole_with_the_layers_that_are_read(layers: int, tmp_path: Path) -> None:
    """ComfyUI has it pruned, without a last norm, and with the tokenizer among the weights."""
    from transformers import MistralConfig, MistralModel

    sign = {"double_stream_modulation_img.lin.weight": (36864, 6144), "img_in.weight": (6144, 128)}
    blocks = {
        f"{kind}_blocks.{i}.x.weight": (1,) for kind, count in (("double", 8), ("single", 48)) for i in range(count)
    }
    found = sniff(hollow(tmp_path / "flux2_dev.safetensors", {**sign, **blocks}))
    assert (found.family, found.variant) == ("flux2", "flux2-dev")
    _, words = encoder_configs("flux2", "flux2-dev")["text_encoder"]
    with torch.device("meta"):
        model = MistralModel(MistralConfig(**{**words, "num_hidden_layers": layers}))
    shapes = {f"model.{key}": tuple(value.shape) for key, value in model.state_dict().items()}
    if layers == 30:
        del shapes["model.norm.weight"]
        shapes["tekken_model"] = (19399895,)
    path = hollow(tmp_path / "mistral.safetensors", shapes)
    assert refuse_other_encoder(found, str(path)) == path
    del shapes["model.layers.29.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        refuse_other_encoder(found, str(hollow(tmp_path / "mistral.safetensors", shapes)))


@pytest.mark.parametrize("model", ["flux2-dev"], indirect=True)
def test_layers_that_are_not_read_change_nothing(model: tuple[str, Any, Path]) -> None:
    _, _, folder = model
    family = load_family(str(folder), device="cpu")
    whole = family.encode_texts(PROMPTS)["prompt_embeds"]
    part = family.text_encoders[0]
    without_upper_layers(part.encoder, replace(FAMILIES["flux2"].encoders_of("flux2-dev")[0], layers_read=3))
    assert len(part.encoder.layers) == 3
    assert torch.equal(family.encode_texts(PROMPTS)["prompt_embeds"], whole)


@pytest.mark.parametrize(
    ("family", "side", "shift"),
    [
        ("zimage", 512, 3.0), ("zimage", 1024, 3.0), ("anima", 1024, 3.0), ("flux2", 512, 1.88), ("flux2", 768, 2.33),
        ("flux2", 1024, 3.16), ("krea2", 512, 1.79), ("krea2", 1024, 2.48), ("qwen", 512, 1.71), ("qwen", 1024, 2.0),
    ],
)  # fmt: skip
def test_training_shifts_by_the_tokens_of_the_real_size(family: str, side: int, shift: float) -> None:
    """FLUX.2's tokens are its latents of 16 pixels; counted in 2x2 of them, the shift would be far too small."""
    spec = FAMILIES[family]
    built = object.__new__(family_class(family))
    built.name = family
    tokens = built.num_image_tokens(side // spec.vae_scale, side // spec.vae_scale)
    assert tokens == (side // 16) ** 2
    scheduler = next(iter(configs(family)["scheduler"].values()))[1]
    assert shift_for(tokens, scheduler) == pytest.approx(shift, abs=0.01)
