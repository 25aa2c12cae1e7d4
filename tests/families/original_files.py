"""Tensors of diffusers models under the names of the original checkpoints, to write single files in tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.families.common import digest_module
from emotrain.families.quantize import RoundedLinear

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


def small_vae(**words: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.3, **words,
    )  # fmt: skip


def clip_of(width: int, tokenizer: Any, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def save_configs(beside: Path, parts: dict[str, Any]) -> None:
    """Configs and tokenizers as a diffusers folder has them, and no weights."""
    for name, part in parts.items():
        if name.startswith("tokenizer"):
            part.save_pretrained(beside / name)
        elif hasattr(part, "save_config"):
            part.save_config(beside / name)
        else:
            part.config.save_pretrained(beside / name)


def same(one: Any, other: Any) -> None:
    """All tensors are equal to the last bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def in_scaled_fp8(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's matrices as ComfyUI's `*_fp8_scaled` have them, and the bf16 weights that these stand for.

    Every other matrix has a scale for each row, under the other of the two names that are in use.
    """
    stored, plain = dict(tensors), dict(tensors)
    matrices = [key for key, value in tensors.items() if value.ndim == 2 and key.endswith(".weight")]
    for number, key in enumerate(matrices):
        by_row = number % 2 == 1
        value = tensors[key].float()
        scale = (value.abs().amax(1, keepdim=True) if by_row else value.abs().max()) / 448 + 1e-6
        stored[key] = (value / scale).to(torch.float8_e4m3fn)
        stored[key.removesuffix("weight") + ("weight_scale" if by_row else "scale_weight")] = scale
        plain[key] = (stored[key].float() * scale).to(torch.bfloat16)
    stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return stored, plain


def same_weights(stored: Any, plain: Any) -> int:
    """What the layers kept as stored stand for is equal to the last bit, and all else; how many layers were kept."""
    ours, theirs = dict(stored.named_modules()), dict(plain.named_modules())
    kept = {path: layer for path, layer in ours.items() if isinstance(layer, RoundedLinear)}
    for path, layer in kept.items():
        assert layer.weight.dtype == torch.float8_e4m3fn
        other = theirs[path.removesuffix(".layer")]  # T5's `wo` is inside another module
        assert torch.equal(layer.plain().weight, other.weight), path
    state, wanted = stored.state_dict(), plain.state_dict()
    numbers = {f"{path}.{name}" for path in kept for name in ("weight", "scale")}
    assert state.keys() - numbers == wanted.keys() - {f"{path.removesuffix('.layer')}.weight" for path in kept}
    assert all(torch.equal(state[key], wanted[key]) for key in state.keys() - numbers)
    assert digest_module(stored) == digest_module(plain)
    return len(kept)
