"""Anima from ComfyUI's separate files against the stock blocks of diffusers: captions, latents, calls, a picture."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.models.transformers.transformer_cosmos as cosmos
import numpy as np
import pytest
import torch
from newer_models import anima_files, anima_parts, denoiser_of, in_one_file

from emotrain.batch import Conditioning
from emotrain.errors import ModelError
from emotrain.families.common import DrawRequest, LoadedFamily, TextEncoderPart, refuse_larger_tokenizer
from emotrain.families.fitting import refuse_misfit
from emotrain.families.loading import load_family
from emotrain.families.sampling import draw_sample
from emotrain.families.table import sniff

PROMPTS = ["1girl, red apple", "1girl, solo, a very much longer caption, pear, table, window, indoors"]
NO_SIZES = Conditioning(*[torch.zeros(1, 2, dtype=torch.int64)] * 3)


@pytest.fixture(scope="module")
def parts(tokenizers: dict[str, Any]) -> dict[str, Any]:
    return anima_parts(tokenizers["t5"])


@pytest.fixture(scope="module")
def files(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return anima_files(parts, tmp_path_factory.mktemp("anima"))


def load(files: Path) -> LoadedFamily:
    return load_family(
        str(files / "anima.safetensors"), device="cpu", vae=str(files / "vae.safetensors"),
        text_encoder=str(files / "text_encoder.safetensors"),
    )  # fmt: skip


@pytest.fixture
def stock(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers' modular pipeline; the resize of its mask, which asks for torchvision, is stood in for."""
    from diffusers.modular_pipelines.anima.modular_blocks_anima import AnimaAutoBlocks

    def resize(mask: torch.Tensor, size: list[int], interpolation: Any) -> torch.Tensor:
        return torch.nn.functional.interpolate(mask, size, mode="nearest")

    shim = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(cosmos, "transforms", shim, raising=False)
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(**{**parts, "transformer": denoiser_of("anima")})
    return pipeline


def test_its_file_is_recognised_with_the_conditioner_in_it(files: Path) -> None:
    found = sniff(files / "anima.safetensors")
    assert (found.family, found.variant, found.missing) == ("anima", "custom", ("vae", "text_encoder"))


def test_a_checkpoint_with_everything_in_it_is_the_same_model(files: Path, tmp_path: Path) -> None:
    """ComfyUI has no names of its own for VAE and Qwen3 in it: they begin as those of SD."""
    shutil.copytree(files, tmp_path / "comfy")
    apart = {"denoiser": "anima", "vae": "vae", "text_encoder": "text_encoder"}
    parts = {part: tmp_path / "comfy" / f"{name}.safetensors" for part, name in apart.items()}
    path = in_one_file(parts, "cond_stage_model.qwen3_06b.", "first_stage_model.")
    assert sniff(path).missing == ()
    ours, theirs = load_family(str(path), device="cpu"), load(files)
    assert ours.vae_identity() == theirs.vae_identity()
    assert ours.text_identity() == theirs.text_identity()
    state = ours.denoiser.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.denoiser.state_dict().items())
    assert torch.equal(ours.encode_texts(PROMPTS)["prompt_embeds"], theirs.encode_texts(PROMPTS)["prompt_embeds"])


def stock_embeds(stock: Any, prompt: str) -> torch.Tensor:
    from diffusers.modular_pipelines.anima.before_denoise import AnimaTextConditioningStep
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

    told = AnimaTextEncoderStep.encode_prompt(stock, prompt, prepare_unconditional_embeds=False)
    names = ("qwen_prompt_embeds", "qwen_attention_mask", "t5_input_ids", "t5_attention_mask")
    with torch.no_grad():
        return AnimaTextConditioningStep._condition_prompt_embeds(
            stock, **{name: told[name] for name in names}, device=torch.device("cpu"),
            conditioning_dtype=torch.float32, output_dtype=torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize("prompt", [*PROMPTS, ""])
def test_captions_are_encoded_as_by_the_stock_blocks(files: Path, stock: Any, prompt: str) -> None:
    embeds = load(files).encode_texts([prompt])["prompt_embeds"]
    expected = stock_embeds(stock, prompt)
    assert expected.shape == (1, 512, 32)
    assert torch.isfinite(embeds).all()
    count = embeds.shape[1]
    assert torch.allclose(embeds, expected[:, :count], atol=1e-6)
    assert not expected[:, count:].any()


def test_the_modular_folder_of_diffusers_is_the_same_model(files: Path, stock: Any, tmp_path: Path) -> None:
    """Its index is another file, with more in it, and its parts have names of their own."""
    stock.save_pretrained(str(tmp_path / "anima"))
    found = sniff(tmp_path / "anima")
    assert (found.family, found.kind, found.missing) == ("anima", "folder", ())
    folder, apart = load_family(str(tmp_path / "anima"), device="cpu"), load(files)
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    answers = []
    for family in (folder, apart):
        text = family.encode_texts(PROMPTS[:1])
        with torch.no_grad():
            answers.append((text["prompt_embeds"], family.predict(noisy, torch.tensor([0.4]), text, NO_SIZES)))
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))
    assert refuse_misfit(found).name == "anima"
    (tmp_path / "anima" / "text_conditioner").rename(tmp_path / "anima" / "away")
    with pytest.raises(ModelError, match="not complete: text_conditioner missing"):
        sniff(tmp_path / "anima")


def test_a_t5_tokenizer_that_knows_more_than_the_conditioner_is_refused(parts: dict[str, Any]) -> None:
    part = TextEncoderPart("text_encoder_2", parts["text_conditioner"], parts["t5_tokenizer"], 512)
    known = parts["text_conditioner"].config.target_vocab_size
    refuse_larger_tokenizer(part, known - 1)
    with pytest.raises(ModelError, match=f"makes token {known}, but the encoder knows {known} tokens"):
        refuse_larger_tokenizer(part, known)


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_a_prediction_is_the_stock_transformers(files: Path, stock: Any, size: tuple[int, int]) -> None:
    family = load(files)
    width, height = size
    noisy = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(2))
    sigmas = torch.tensor([0.6])
    with torch.no_grad():
        ours = family.predict(noisy, sigmas, family.encode_texts(PROMPTS[:1]), NO_SIZES)
        theirs = stock.transformer(
            hidden_states=noisy[:, :, None], timestep=sigmas, encoder_hidden_states=stock_embeds(stock, PROMPTS[0]),
            padding_mask=torch.zeros(1, 1, height, width),
        ).sample[:, :, 0]  # fmt: skip
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert float(theirs.abs().max()) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_is_the_stock_pipelines_picture(files: Path, stock: Any, guidance: float) -> None:
    from diffusers import ClassifierFreeGuidance

    family = load(files)
    stock.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance))
    picture = stock(
        prompt=PROMPTS[0], negative_prompt="", width=64, height=96, num_inference_steps=4,
        generator=torch.Generator().manual_seed(7), output="images",
    )[0]  # fmt: skip
    text, negative = family.encode_texts(PROMPTS[:1]), family.encode_texts([""])
    family.free_encoders()
    request = DrawRequest(text=text, negative=negative, width=64, height=96, seed=7, steps=4, guidance=guidance)
    ours = draw_sample(family, request)
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(picture, dtype=int)).max() <= 1
    assert np.asarray(picture).std() > 1


def test_captions_of_different_lengths_in_one_batch(files: Path) -> None:
    family = load(files)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigmas = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        both = family.predict(latents, sigmas, family.encode_texts(PROMPTS), NO_SIZES)
        for i in range(2):
            alone = family.predict(latents[i : i + 1], sigmas[i : i + 1], family.encode_texts([PROMPTS[i]]), NO_SIZES)
            assert torch.allclose(both[i], alone[0], atol=1e-5)


def test_a_whole_run(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emotrain.cli.app import main
    from emotrain.lora.file import read_lora

    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(
        f"model: {{base: {files}/anima.safetensors, vae: {files}/vae.safetensors, "
        f"text_encoder: {files}/text_encoder.safetensors}}\n"
        "dataset: {trigger: rkt, resolution: 64, buckets: {step: 64, min: 64}, folders: [{path: builtin:example}]}\n"
        "network: {rank: 2}\ntrain: {max_steps: 2, loss: {baseline: raw}}\nvalidate: {every: 2}\nsave: {every: 2}\n"
        'sample: {every: 2, steps: 2, prompts: ["a [trigger]"]}\nstop: {mode: "off"}\n'
    )
    assert main(["check", "p.yaml"]) == 0
    assert main(["run", "p.yaml", "--plain"]) == 0
    assert read_lora(tmp_path / "runs" / "p" / "lora.safetensors").family == "anima"
