"""Single files in the original layout: written here from diffusers models, read back, compared."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from original_files import (
    clip_of,
    clip_tensors,
    open_clip_tensors,
    same,
    same_weights,
    save_configs,
    small_vae,
    unet_name,
    vae_tensors,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.families import quantize
from emotrain.families.loading import load_family
from emotrain.families.table import sniff

NF4 = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def unet_of(width: int, **words: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8, **words,
    )  # fmt: skip


def write(path: Path, parts: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """The file, and beside it a folder with configs and tokenizers but no weights."""
    unet = {unet_name(k, 2): v for k, v in parts["unet"].state_dict().items()}
    # Without attention in the first block up, its upsampler comes second.
    unet = {re.sub(r"^output_blocks\.2\.2\.conv", "output_blocks.2.1.conv", k): v for k, v in unet.items()}
    tensors = {"model.diffusion_model." + k: v for k, v in unet.items()} | tensors
    tensors |= vae_tensors(parts["vae"])
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    save_configs(path.with_suffix(""), parts)
    return path


@pytest.fixture
def sd_parts(tokenizers: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "unet": unet_of(768), "vae": small_vae(), "tokenizer": tokenizers["clip"],
        "text_encoder": clip_of(768, tokenizers["clip"], False),
    }  # fmt: skip


def write_sd(path: Path, parts: dict[str, Any], extra: dict[str, Tensor] | None = None) -> Path:
    tensors = clip_tensors(parts["text_encoder"], "cond_stage_model.transformer.")
    return write(path, parts, tensors | (extra or {}))


def test_an_sd_file_is_read_back_tensor_by_tensor(tmp_path: Path, sd_parts: dict[str, Any]) -> None:
    path = write_sd(tmp_path / "model.safetensors", sd_parts)
    found = sniff(str(path))
    assert (found.family, found.prediction, found.kind) == ("sd15", "epsilon", "file")
    family = load_family(str(path), device="cpu")
    same(family.denoiser, sd_parts["unet"])
    same(family.vae, sd_parts["vae"])
    same(family.text_encoders[0].encoder, sd_parts["text_encoder"])
    assert family.latent_scale == 0.3
    assert family.encode_texts(["tiger"])["prompt_embeds"].shape == (1, 32, 768)
    assert type(family.scheduler).__name__ == "DDIMScheduler"


def test_marker_tensors_make_it_v_prediction_with_zero_terminal_snr(tmp_path: Path, sd_parts: dict[str, Any]) -> None:
    markers = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    path = write_sd(tmp_path / "v.safetensors", sd_parts, markers)
    assert sniff(str(path)).prediction == "v_prediction"
    family = load_family(str(path), device="cpu")
    assert family.prediction == "v_prediction"
    assert family.scheduler_config["rescale_betas_zero_snr"] is True
    assert family.scheduler_config["prediction_type"] == "v_prediction"


def test_an_sdxl_file_is_read_back_tensor_by_tensor(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    torch.manual_seed(1)
    clip = tokenizers["clip"]
    parts: dict[str, Any] = {
        "unet": unet_of(
            2048, addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
            projection_class_embeddings_input_dim=1280 + 48,
        ),
        "vae": small_vae(), "tokenizer": clip, "tokenizer_2": clip,
        "text_encoder": clip_of(768, clip, False), "text_encoder_2": clip_of(1280, clip, True),
    }  # fmt: skip
    tensors = clip_tensors(parts["text_encoder"], "conditioner.embedders.0.transformer.")
    tensors |= open_clip_tensors(parts["text_encoder_2"], "conditioner.embedders.1.model.")
    path = write(tmp_path / "xl.safetensors", parts, tensors)
    assert sniff(str(path)).family == "sdxl"
    family = load_family(str(path), device="cpu")
    same(family.denoiser, parts["unet"])
    same(family.text_encoders[0].encoder, parts["text_encoder"])
    same(family.text_encoders[1].encoder, parts["text_encoder_2"])
    assert family.encode_texts(["tiger"])["prompt_embeds"].shape == (1, 32, 2048)


def test_pieces_that_the_file_lacks_come_from_the_folder_beside_it(tmp_path: Path, sd_parts: dict[str, Any]) -> None:
    path = write(tmp_path / "bare.safetensors", sd_parts, {})
    with pytest.raises(ModelError) as refused:
        load_family(str(path), device="cpu")
    assert "does not hold text_encoder" in str(refused.value)
    assert "a folder `bare` beside it" in str(refused.value.hint)
    sd_parts["text_encoder"].save_pretrained(tmp_path / "bare" / "text_encoder")
    family = load_family(str(path), device="cpu")
    same(family.text_encoders[0].encoder, sd_parts["text_encoder"])


def test_without_network_and_tokenizer_the_error_says_what_to_do(tmp_path: Path, sd_parts: dict[str, Any]) -> None:
    path = write_sd(tmp_path / "model.safetensors", sd_parts)
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    with pytest.raises(ModelError) as refused:
        load_family(str(path), device="cpu")
    assert "needs a tokenizer" in str(refused.value)
    assert "go online once, or put a folder `model/tokenizer` beside" in str(refused.value.hint)
    assert refused.value.exit_code == 4


def test_a_file_that_lacks_tensors_is_refused(tmp_path: Path, sd_parts: dict[str, Any]) -> None:
    tensors = clip_tensors(sd_parts["text_encoder"], "cond_stage_model.transformer.")
    gone = next(name for name in tensors if "layers.1.mlp.fc2" in name)
    del tensors[gone]
    path = write(tmp_path / "holes.safetensors", sd_parts, tensors)
    with pytest.raises(ModelError, match="lacks 1 tensors of its text_encoder"):
        load_family(str(path), device="cpu")


@pytest.mark.parametrize("layout", ["folder", "diffusers file", "original file"])
def test_another_vae_is_read_from_a_folder_or_a_file(tmp_path: Path, sd_parts: dict[str, Any], layout: str) -> None:
    path = write_sd(tmp_path / "model.safetensors", sd_parts)
    torch.manual_seed(5)
    vae = small_vae()
    vae.save_pretrained(tmp_path / "vae")
    other = tmp_path / "vae"
    if layout == "diffusers file":
        other = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    elif layout == "original file":
        other = tmp_path / "other.safetensors"
        save_file({k: v.contiguous().clone() for k, v in vae_tensors(vae).items()}, other)
    family = load_family(str(path), device="cpu", vae=str(other))
    same(family.vae, vae)
    assert next(family.vae.parameters()).dtype == torch.float32


def test_a_vae_of_another_kind_is_refused(tmp_path: Path, sd_folder: Path) -> None:
    small_vae().save_pretrained(tmp_path / "four")
    with pytest.raises(ModelError, match="4 latent channels, but the model needs 8"):
        load_family(str(sd_folder), device="cpu", vae=str(tmp_path / "four"))


def test_weights_that_are_stored_with_a_scale_are_multiplied_by_it(tmp_path: Path, sd_parts: dict[str, Any]) -> None:
    """Scaled fp8, as ComfyUI users hold it: without the scale they are up to 12,426 times too large."""
    path = write_sd(tmp_path / "model.safetensors", sd_parts)
    plain = load_family(str(path), device="cpu").denoiser.state_dict()
    tensors, scaled = load_file(path), 0
    for name in list(tensors):
        if name.startswith("model.diffusion_model.") and name.endswith(".weight") and tensors[name].ndim == 2:
            scale = tensors[name].abs().max() / 448
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + "scale_weight"] = scale.float()
            scaled += 1
    tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    assert scaled > 10
    for name, value in load_family(str(path), device="cpu").denoiser.state_dict().items():
        assert (value - plain[name]).norm() <= 0.05 * plain[name].norm(), name


def test_a_unet_in_plain_fp8_stays_so(
    tmp_path: Path, sd_parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SMALLEST", 32)
    path = write_sd(tmp_path / "model.safetensors", sd_parts)
    tensors = load_file(path)
    for name, value in tensors.items():
        tensors[name] = value.to(torch.float8_e4m3fn) if name.startswith("model.diffusion_model.") else value
    families = []
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):
        save_file({k: v.to(dtype) if v.element_size() == 1 else v for k, v in tensors.items()}, path)
        families.append(load_family(str(path), device="cpu", dtype="bf16"))
    assert same_weights(families[0].denoiser, families[1].denoiser) > 10


@pytest.mark.parametrize("kind", ["fp8", pytest.param("nf4", marks=NF4)])
def test_a_file_and_a_folder_are_quantised_alike(
    kind: str, tmp_path: Path, sd_parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' own way takes a single file for already quantised."""
    monkeypatch.setattr(quantize, "SMALLEST", 32)
    file = write_sd(tmp_path / "model.safetensors", sd_parts)
    parts = {**sd_parts, "scheduler": DDIMScheduler(clip_sample=False), "safety_checker": None}
    pipeline = StableDiffusionPipeline(**parts, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "folder")
    states = []
    for base in (file, tmp_path / "folder"):
        family = load_family(str(base), device="cpu", dtype="fp32", quantize=kind)
        family.place_denoiser()
        linear = [module for module in family.denoiser.modules() if isinstance(module, torch.nn.Linear)]
        assert sum(type(module) is not torch.nn.Linear for module in linear) > 10
        states.append(dict(family.denoiser.named_parameters()))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_vae_that_is_given_serves_a_file_without_one(tmp_path: Path, sd_parts: dict[str, Any]) -> None:
    path = write_sd(tmp_path / "model.safetensors", sd_parts)
    kept = {name: value for name, value in load_file(path).items() if not name.startswith("first_stage_model.")}
    save_file(kept, path)
    with pytest.raises(ModelError, match="does not hold vae"):
        load_family(str(path), device="cpu")
    sd_parts["vae"].save_pretrained(tmp_path / "vae")
    same(load_family(str(path), vae=str(tmp_path / "vae"), device="cpu").vae, sd_parts["vae"])
