"""Single files in the original layout: written here from diffusers models, read back, compared."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.families import load_family
from emotrain.families.table import sniff

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_name(name: str, layers: int) -> str:
    """diffusers -> original, for UNets whose last level has no attention on the way down."""
    for ours, theirs in OUTSIDE.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    kind, rest = name.split(".", 1)
    if kind == "mid_block":
        part, index, rest = rest.split(".", 2)
        place = f"middle_block.{1 if part == 'attentions' else 2 * int(index)}"
    else:
        level, part, index, rest = rest.split(".", 3)
        if part == "downsamplers":
            return f"input_blocks.{(layers + 1) * (int(level) + 1)}.0.op.{rest.split('.', 1)[1]}"
        if kind == "down_blocks":
            number = (layers + 1) * int(level) + int(index) + 1
            place = f"input_blocks.{number}.{int(part == 'attentions')}"
        elif part == "upsamplers":
            return f"output_blocks.{(layers + 1) * int(level) + layers}.2.{rest}"
        else:
            number = (layers + 1) * int(level) + int(index)
            place = f"output_blocks.{number}.{int(part == 'attentions')}"
    if part == "resnets":
        inner, tail = rest.split(".", 1)
        rest = f"{RESNET[inner]}.{tail}"
    return f"{place}.{rest}"


def vae_name(name: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for ours, theirs in {
        "down_blocks.": "down.", ".resnets.": ".block.", "downsamplers.0.conv": "downsample.conv",
        "upsamplers.0.conv": "upsample.conv", "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm",
        "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    }.items():  # fmt: skip
        name = name.replace(ours, theirs)
    return "first_stage_model." + name


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    tensors = {}
    for name, value in vae.state_dict().items():
        original = vae_name(name, levels)
        is_attention = "attn_1" in original and value.dim() == 2
        tensors[original] = value[:, :, None, None] if is_attention else value
    return tensors


def clip_tensors(clip: Any, prefix: str) -> dict[str, Tensor]:
    return {
        prefix + "text_model." + name.removeprefix("text_model."): value for name, value in clip.state_dict().items()
    }


def open_clip_tensors(clip: Any, prefix: str) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): value for name, value in clip.state_dict().items()}
    tensors = {
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "text_projection": state.pop("text_projection.weight").T.contiguous(),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
    }
    state.pop("embeddings.position_ids", None)
    for layer in range(clip.config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{ours}self_attn.{x}_proj.{kind}") for x in "qkv"]
            tensors[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
            for one, other in {
                "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
            }.items():  # fmt: skip
                tensors[f"{theirs}{other}.{kind}"] = state.pop(f"{ours}{one}.{kind}")
    assert not state
    return {prefix + name: value for name, value in tensors.items()}


def small_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.3,
    )  # fmt: skip


def clip_of(width: int, tokenizer: Any, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


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
    beside = path.with_suffix("")
    for name, part in parts.items():
        if name.startswith("tokenizer"):
            part.save_pretrained(beside / name)
        else:
            part.save_config(beside / name) if hasattr(part, "save_config") else part.config.save_pretrained(
                beside / name
            )
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


def same(one: Any, other: Any) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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
    assert "put a folder `bare` beside it" in str(refused.value.hint)
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
