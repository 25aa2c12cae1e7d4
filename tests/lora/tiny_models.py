"""Tiny denoisers of the four families, with the modules of the real ones; adapters with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from emotrain.lora.adapter import Adapter, add_adapter
from emotrain.lora.targets import layers, part_of, ranks_of, select, shape_of

SD = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
}
SDXL = {
    "sample_size": 8,
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 64),
    "attention_head_dim": (2, 4, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "transformer_layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 16,
}
SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 16, "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
_KINDS = {
    "sd15": (UNet2DConditionModel, SD),
    "sd21": (UNet2DConditionModel, {**SD, "use_linear_projection": True}),
    "sdxl": (UNet2DConditionModel, SDXL),
    "sd3": (SD3Transformer2DModel, SD3),
    "flux": (FluxTransformer2DModel, FLUX),
}


def tiny(family: str, seed: int = 0) -> nn.Module:
    """The same weights for the same seed."""
    kind, config = _KINDS[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**config).eval().requires_grad_(False)


def output(family: str, model: nn.Module) -> Tensor:
    """The model's answer to fixed input, [1, ...]."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        text, pooled = torch.randn(1, 5, 24), torch.randn(1, 16)
        if family in ("sd15", "sd21"):
            return model(torch.randn(1, 4, 8, 8), 10, text).sample
        if family == "sdxl":
            extra = {"text_embeds": pooled, "time_ids": torch.ones(1, 6)}
            return model(torch.randn(1, 4, 8, 8), 10, text, added_cond_kwargs=extra).sample
        if family == "sd3":
            return model(torch.randn(1, 4, 8, 8), text, pooled, torch.tensor([500.0])).sample
        ids, text_ids = torch.zeros(16, 3), torch.zeros(5, 3)
        return model(
            torch.randn(1, 16, 8), text, pooled, torch.tensor([0.5]), ids, text_ids, torch.tensor([3.5])
        ).sample


def randomised(adapter: Adapter, seed: int = 3, size: float = 0.05) -> Adapter:
    """Give both halves random weights, so that the LoRA does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return adapter


def weights(
    family: str, targets: Any = "all", *, rank: int = 4, alpha: float = 2.0, rank_pattern: dict[str, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Random canonical state and alphas for a tiny model, without putting a LoRA on it."""
    model = tiny(family)
    held = layers(model)
    chosen = select(model, targets, family)
    ranks = ranks_of(model, chosen, rank=rank, rank_pattern=rank_pattern)
    generator = torch.Generator().manual_seed(3)
    state, alphas = {}, {}
    for path, r in ranks.items():
        out, inner = shape_of(held[path])
        kernel = getattr(held[path], "kernel_size", ())
        name = f"{part_of(family)}.{path}"
        state[f"{name}.lora_A.weight"] = torch.randn((r, inner, *kernel), generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn((out, r, *(1 for _ in kernel)), generator=generator)
        alphas[name] = alpha * r / rank
    return state, alphas


def trained(family: str, *, targets: object = "all", rank: int = 4, alpha: float = 2.0, **options: object) -> Trained:
    """A tiny model with a LoRA that does something."""
    model = tiny(family)
    base = output(family, model)
    adapter = add_adapter(model, rank=rank, alpha=alpha, targets=targets, family=family, seed=1, **options)  # type: ignore[arg-type]
    randomised(adapter)
    live = output(family, model)
    assert (live - base).abs().max() > 1e-3, "the LoRA must do something, or the test says nothing"
    return Trained(family, model, adapter, base, live)


@dataclass
class Trained:
    """A model with its LoRA, and what it answers without and with it."""

    family: str
    model: nn.Module
    adapter: Adapter
    base: Tensor
    live: Tensor


def clip(*, projected: bool, seed: int = 0) -> nn.Module:
    """A tiny CLIP text encoder; the two classes spell their paths differently."""
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=16, eos_token_id=49, bos_token_id=48, pad_token_id=49,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        return kind(config).eval().requires_grad_(False)
