"""sdxl and sd3: encoding and predicting agree with the stock diffusers pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emotrain.batch import Conditioning
from emotrain.families.common import DrawRequest
from emotrain.families.loading import load_family
from emotrain.families.sampling import draw_sample
from emotrain.families.table import sniff

TEXTS = ["tiger face", "", "inkmoji, " + "a very long caption, " * 20]
# The small T5 knows 24 tokens; the stock SD3 pipeline pads to max_sequence_length.


def test_sdxl_text_embeds_equal_the_pipelines_own(sdxl_folder: Path) -> None:
    family = load_family(str(sdxl_folder), device="cpu")
    ours = family.encode_texts(TEXTS)
    theirs, _, pooled, _ = family.pipeline().encode_prompt(TEXTS, device="cpu", do_classifier_free_guidance=False)
    assert ours["prompt_embeds"].shape == (3, 32, 192)
    assert torch.equal(ours["prompt_embeds"], theirs)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)


def encode_sd3(family: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    embeds, _, pooled, _ = family.pipeline().encode_prompt(
        TEXTS, TEXTS, TEXTS, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
    )
    return embeds, pooled


def test_sd3_text_embeds_equal_the_pipelines_own(sd3_folder: Path) -> None:
    family = load_family(str(sd3_folder), device="cpu")
    ours = family.encode_texts(TEXTS)
    embeds, pooled = encode_sd3(family, 24)
    assert ours["prompt_embeds"].shape == (3, 32 + 24, 128)
    assert torch.equal(ours["prompt_embeds"], embeds)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)


def test_sd3_without_t5_has_zeros_in_its_place(sd3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no-t5"
    shutil.copytree(sd3_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder_3")
    family = load_family(str(folder), device="cpu")
    ours = family.encode_texts(TEXTS)
    embeds, pooled = encode_sd3(family, 256)
    assert torch.equal(ours["prompt_embeds"], embeds)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)
    assert not ours["prompt_embeds"][:, 32:].any()


@pytest.mark.parametrize("kind", ["sdxl_folder", "sd3_folder"])
def test_predict_is_what_the_pipeline_feeds_its_scheduler(kind: str, request: pytest.FixtureRequest) -> None:
    family = load_family(str(request.getfixturevalue(kind)), device="cpu")
    seen: list[dict[str, Any]] = []

    def note(module: Any, args: tuple[Any, ...], words: dict[str, Any], output: Any) -> None:
        names = ("sample", "timestep") if args else ()
        seen.append({**dict(zip(names, args, strict=True)), **words, "output": output[0]})

    handle = family.denoiser.register_forward_hook(note, with_kwargs=True)
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    words: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": 3, "width": 32, "height": 48}
    if family.name == "sdxl":
        words |= {"original_size": (50, 40), "crops_coords_top_left": (3, 5)}
    else:
        words |= {"max_sequence_length": 24}
    pipeline("tiger face", generator=torch.Generator().manual_seed(0), output_type="latent", **words)
    handle.remove()
    sizes = Conditioning(torch.tensor([[50, 40]]), torch.tensor([[3, 5]]), torch.tensor([[48, 32]]))
    latents = seen[1].get("sample", seen[1].get("hidden_states"))
    times = torch.as_tensor(seen[1]["timestep"]).float().reshape(1)
    if family.name == "sd3":
        times = times / 1000
    with torch.no_grad():
        ours = family.predict(latents, times, family.encode_texts(["tiger face"]), sizes)
        other = family.predict(latents, times, family.encode_texts(["grapes"]), sizes)
    assert torch.allclose(ours, seen[1]["output"], atol=1e-5)
    assert not torch.allclose(other, seen[1]["output"], atol=1e-5)


def test_sdxl_sizes_change_the_prediction(sdxl_folder: Path) -> None:
    family = load_family(str(sdxl_folder), device="cpu")
    text = family.encode_texts(["tiger face"])
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    size, none = torch.tensor([[64, 64]]), torch.zeros(1, 2, dtype=torch.int64)
    one = family.predict(latents, torch.tensor([500.0]), text, Conditioning(size, none, size))
    crop = family.predict(latents, torch.tensor([500.0]), text, Conditioning(size, size, size))
    assert not torch.allclose(one, crop)


@pytest.mark.parametrize("kind", ["sdxl_folder", "sd3_folder"])
def test_samples_need_no_encoders(kind: str, request: pytest.FixtureRequest) -> None:
    family = load_family(str(request.getfixturevalue(kind)), device="cpu")
    embeds, nothing = family.encode_texts(["tiger face"]), family.encode_texts([""])
    request_ = DrawRequest(embeds, nothing, 64, 48, 3, steps=2)
    first = np.asarray(draw_sample(family, request_))
    family.free_encoders()
    assert np.array_equal(first, np.asarray(draw_sample(family, request_)))


def test_folders_are_recognised(sdxl_folder: Path, sd3_folder: Path) -> None:
    assert sniff(str(sdxl_folder)).family == "sdxl"
    assert sniff(str(sdxl_folder)).prediction == "epsilon"
    assert sniff(str(sd3_folder)).family == "sd3"
    assert sniff(str(sd3_folder)).prediction == "flow"


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_samples_are_the_stock_pipelines_pictures(sdxl_folder: Path, tmp_path: Path, zeros: bool) -> None:
    """A prompt and nothing else: what stands for the negative prompt is said by the model, zeros in the public one."""
    from diffusers import StableDiffusionXLPipeline

    from emotrain.config.prompts import SamplePrompt
    from emotrain.runs.draw import Sampler

    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": zeros}))
    family = load_family(str(folder), device="cpu")
    empty = family.encode_texts([""])
    assert family.no_negative(empty)["prompt_embeds"].any() == (not zeros)
    words: dict[str, Any] = {"size": (64, 64), "seed": 3, "steps": 2, "guidance": 5.0, "notify": lambda event: None}
    sampler = Sampler(family, [SamplePrompt("red apple")], **words)
    sampler.folder = tmp_path / "samples"
    sampler.draw(1)
    stock = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    made = stock(
        "red apple", width=64, height=64, num_inference_steps=2, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    said = Image.open(sampler.path(1, 1)).text
    assert said["parameters"] == "red apple\nSteps: 2, CFG scale: 5, Seed: 3, Size: 64x64, LoRA step: 1"
    assert json.loads(said["emotrain"])["step"] == 1
    ours, theirs = (np.asarray(p, int) for p in (Image.open(sampler.path(1, 1)), made.images[0]))
    assert np.abs(ours - theirs).max() <= 1


def test_a_sheet_that_is_stopped_is_lacking_and_the_first_one_is_not(sdxl_folder: Path, tmp_path: Path) -> None:
    """No checkpoint is saved before the first step, so no resumed run could draw that one."""
    from emotrain.config.prompts import SamplePrompt
    from emotrain.runs.draw import Sampler

    family = load_family(str(sdxl_folder), device="cpu")
    calls: list[int] = []
    family.denoiser.register_forward_hook(lambda *args: calls.append(1))
    words: dict[str, Any] = {"size": (64, 64), "seed": 3, "steps": 4, "guidance": 1.0, "notify": lambda event: None}
    sampler = Sampler(family, [SamplePrompt("a"), SamplePrompt("b")], **words)
    sampler.folder = tmp_path
    sampler.stopped = lambda: len(calls) >= 6
    for step, count, lacks in ((5, 6, True), (0, 14, False)):
        assert (len(sampler.draw(step)), sampler.lacks(step), len(calls)) == (0 if lacks else 2, lacks, count)
    assert sampler.path(5, 1).is_file()  # in the middle of the second picture
    assert not sampler.path(5, 2).exists()
