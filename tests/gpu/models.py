"""Models for the check: random weights at the public sizes, or tiny ones, live or written as folders and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import real_size
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from emotrain.families.flux.spec import NAMES
from emotrain.families.registry import FAMILIES, configs, family_of_variant
from emotrain.families.table import ASSETS

CLIP: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VAE: dict[str, Any] = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1}
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {
            "block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "attention_head_dim": 2,
            "layers_per_block": 1, "cross_attention_dim": 32,
        },
        "vae": VAE, "text_encoder": {**CLIP, "projection_dim": 32},
    },
    "sdxl": {
        "unet": {
            "block_out_channels": [32, 64, 64], "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [2, 4, 4], "cross_attention_dim": 96, "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64 + 6 * 8, "norm_num_groups": 16,
        },
        "vae": VAE, "text_encoder": {**CLIP, "projection_dim": 32},
        "text_encoder_2": {**CLIP, "hidden_size": 64, "projection_dim": 64},
    },
    "flux1-dev": {
        "transformer": {
            "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4, "attention_head_dim": 64,
            "axes_dims_rope": [16, 24, 24], "joint_attention_dim": 64, "pooled_projection_dim": 32,
        },
        "vae": VAE, "text_encoder": {**CLIP, "projection_dim": 32},
        "text_encoder_2": {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    },
    "anima": {
        "transformer": {
            "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 32,
            "adaln_lora_dim": 16,
        },
    },
    "klein-4b": {
        "transformer": {
            "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16,
            "axes_dims_rope": [4, 4, 4, 4], "joint_attention_dim": 96, "timestep_guidance_channels": 32,
        },
    },
    "z-image": {
        "transformer": {
            "n_layers": 2, "n_refiner_layers": 1, "dim": 64, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 32,
            "axes_dims": [8, 4, 4],
        },
    },
    "krea2-raw": {
        "transformer": {
            "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_head_dim": 16,
            "intermediate_size": 96, "timestep_embed_dim": 32, "text_hidden_dim": 32, "num_text_layers": 3,
            "text_num_attention_heads": 4, "text_num_key_value_heads": 4, "text_intermediate_size": 48,
            "axes_dims_rope": [4, 6, 6],
        },
    },
}  # fmt: skip
KINDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
FEW_BLOCKS = {"transformer": {"num_layers": 2, "num_single_layers": 2}, "text_encoder_2": {"num_layers": 2}}


def change(variant: str, tiny: bool, few_blocks: bool = False, few_encoder_layers: bool = False) -> real_size.Change:
    """Configs as they are, at real width with few blocks or few layers of T5, or tiny."""
    words = TINY[variant] if tiny else FEW_BLOCKS if few_blocks else {}
    if few_encoder_layers:
        words = {**words, "text_encoder_2": FEW_BLOCKS["text_encoder_2"]}
    return lambda part, config: {**config, **words.get(part, {})}


def write_folder(
    folder: Path, variant: str, dtype: torch.dtype, device: torch.device, how: real_size.Change, *, holes: bool = False
) -> Any:
    """A diffusers folder with random weights and the built-in models' tokenizers; gives the live denoiser.

    With `holes` all weights are zero, and the files have holes in place of them: what takes memory takes as much, and
    24 GiB are written in a moment. The denoiser is then on the meta device.
    """
    device = torch.device("meta") if holes else device
    family = str(family_of_variant(variant))
    spec, public = FAMILIES[family], configs(family)
    loaded = real_size.build(variant, dtype, device, how)
    _save(loaded.denoiser, folder / spec.denoiser, holes=holes)
    _save(loaded.vae, folder / "vae", holes=holes)
    loaded.scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": spec.pipeline, "_diffusers_version": "0.42.0", "vae": ["diffusers", spec.vae_class],
        spec.denoiser: ["diffusers", spec.denoiser_class], "scheduler": ["diffusers", type(loaded.scheduler).__name__],
    }  # fmt: skip
    for encoder in spec.text_encoders:
        kind, config = public["text_encoders"][encoder.name]
        _save(_encoder(kind, how(encoder.name, config), dtype, device), folder / encoder.name, holes=holes)
        tokenizer = encoder.tokenizer_name
        _tokenizer(folder / tokenizer, encoder.kind, encoder.max_tokens)
        index |= {encoder.name: ["transformers", kind], tokenizer: ["transformers", encoder.tokenizer_class]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return loaded.denoiser


def _save(model: Any, folder: Path, *, holes: bool) -> None:
    if not holes:
        model.save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    is_diffusers = hasattr(model, "save_config")
    model.save_config(folder) if is_diffusers else model.config.save_pretrained(folder)
    header, size, seen = {"__metadata__": {"format": "pt"}}, 0, set[int]()
    for name, tensor in model.state_dict().items():
        storage = tensor.untyped_storage()._cdata
        if storage not in seen:  # a T5 has two names for its table
            seen.add(storage)
            span = [size, size + tensor.nbytes]
            header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}  # type: ignore[dict-item]
            size += tensor.nbytes
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with (
        (folder / ("diffusion_pytorch_model" if is_diffusers else "model"))
        .with_suffix(".safetensors")
        .open("wb") as file
    ):
        file.write(len(words).to_bytes(8, "little") + words)
        file.truncate(8 + len(words) + size)


def _encoder(kind: str, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    config_class = transformers.T5Config if kind.startswith("T5") else transformers.CLIPTextConfig
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return getattr(transformers, kind)(config_class(**config))
    finally:
        torch.set_default_dtype(before)


def _tokenizer(folder: Path, kind: str, max_tokens: int) -> None:
    source = ASSETS / ("tiny-flux/tokenizer_2" if kind == "t5" else "tiny-sd/tokenizer")
    shutil.copytree(source, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": max_tokens}))


def write_flux_file(path: Path, denoiser: Any) -> None:
    """A FLUX.1 denoiser in one file under the original names; what it lacks lies in the folder of the same name."""
    left = {name: value.cpu() for name, value in denoiser.state_dict().items()}
    made: dict[str, Tensor] = {}
    for name in list(left):
        if name not in left:
            continue
        module, kind = name.rsplit(".", 1)
        group = NAMES.to_original(module)
        if group is None:
            made[_norm(module)] = left.pop(name)
            continue
        value = torch.cat([left.pop(f"{part}.{kind}") for part in group.parts])
        made[f"{group.name}.{kind}"] = torch.cat(value.chunk(2)[::-1]) if group.swaps else value
    save_file({name: value.contiguous() for name, value in made.items()}, path)


def _norm(module: str) -> str:
    """The original name of a norm of queries or keys."""
    kind, number, _, norm = module.split(".")
    role = "query_norm" if norm.endswith("_q") else "key_norm"
    if kind == "single_transformer_blocks":
        return f"single_blocks.{number}.norm.{role}.scale"
    return f"double_blocks.{number}.{'txt' if 'added' in norm else 'img'}_attn.norm.{role}.scale"
