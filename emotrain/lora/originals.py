"""Names of the original checkpoints (SGM, BFL, MMDiT), which kohya and ComfyUI files use, against diffusers' names.

A group is one module of the original that is one or several modules in diffusers: q, k and v are fused there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_QKV = ("to_q", "to_k", "to_v")
_ADD_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class Group:
    """One original module: its dotted name, diffusers' modules in the order of its output rows, if halves swap."""

    name: str
    parts: tuple[str, ...]
    swaps: bool = False  # (shift, scale) here is (scale, shift) there


# (original, diffusers' parts); {i} is a number
_FLUX: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("double_blocks.{i}.img_attn.qkv", tuple(f"transformer_blocks.{{i}}.attn.{n}" for n in _QKV)),
    ("double_blocks.{i}.txt_attn.qkv", tuple(f"transformer_blocks.{{i}}.attn.{n}" for n in _ADD_QKV)),
    ("double_blocks.{i}.img_attn.proj", ("transformer_blocks.{i}.attn.to_out.0",)),
    ("double_blocks.{i}.txt_attn.proj", ("transformer_blocks.{i}.attn.to_add_out",)),
    ("double_blocks.{i}.img_mlp.0", ("transformer_blocks.{i}.ff.net.0.proj",)),
    ("double_blocks.{i}.img_mlp.2", ("transformer_blocks.{i}.ff.net.2",)),
    ("double_blocks.{i}.txt_mlp.0", ("transformer_blocks.{i}.ff_context.net.0.proj",)),
    ("double_blocks.{i}.txt_mlp.2", ("transformer_blocks.{i}.ff_context.net.2",)),
    ("double_blocks.{i}.img_mod.lin", ("transformer_blocks.{i}.norm1.linear",)),
    ("double_blocks.{i}.txt_mod.lin", ("transformer_blocks.{i}.norm1_context.linear",)),
    (
        "single_blocks.{i}.linear1",
        (*(f"single_transformer_blocks.{{i}}.attn.{n}" for n in _QKV), "single_transformer_blocks.{i}.proj_mlp"),
    ),
    ("single_blocks.{i}.linear2", ("single_transformer_blocks.{i}.proj_out",)),
    ("single_blocks.{i}.modulation.lin", ("single_transformer_blocks.{i}.norm.linear",)),
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
)
_SD3: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("joint_blocks.{i}.x_block.attn.qkv", tuple(f"transformer_blocks.{{i}}.attn.{n}" for n in _QKV)),
    ("joint_blocks.{i}.context_block.attn.qkv", tuple(f"transformer_blocks.{{i}}.attn.{n}" for n in _ADD_QKV)),
    ("joint_blocks.{i}.x_block.attn2.qkv", tuple(f"transformer_blocks.{{i}}.attn2.{n}" for n in _QKV)),
    ("joint_blocks.{i}.x_block.attn.proj", ("transformer_blocks.{i}.attn.to_out.0",)),
    ("joint_blocks.{i}.context_block.attn.proj", ("transformer_blocks.{i}.attn.to_add_out",)),
    ("joint_blocks.{i}.x_block.attn2.proj", ("transformer_blocks.{i}.attn2.to_out.0",)),
    ("joint_blocks.{i}.x_block.mlp.fc1", ("transformer_blocks.{i}.ff.net.0.proj",)),
    ("joint_blocks.{i}.x_block.mlp.fc2", ("transformer_blocks.{i}.ff.net.2",)),
    ("joint_blocks.{i}.context_block.mlp.fc1", ("transformer_blocks.{i}.ff_context.net.0.proj",)),
    ("joint_blocks.{i}.context_block.mlp.fc2", ("transformer_blocks.{i}.ff_context.net.2",)),
    ("joint_blocks.{i}.x_block.adaLN_modulation.1", ("transformer_blocks.{i}.norm1.linear",)),
    ("joint_blocks.{i}.context_block.adaLN_modulation.1", ("transformer_blocks.{i}.norm1_context.linear",)),
    ("context_embedder", ("context_embedder",)),
    ("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    ("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    ("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    ("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
)
_TABLES = {"flux": _FLUX, "sd3": _SD3}

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_SGM_HEADS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_FLUX_HEADS = ("double_blocks.", "single_blocks.", "img_in", "txt_in", "time_in.", "vector_in.", "guidance_in.")
_SD3_HEADS = ("joint_blocks.", "t_embedder.", "y_embedder.")


def group_of(path: str, family: str) -> Group | None:
    """The original module that a diffusers path of a transformer belongs to; None where there is no such layer."""
    for original, parts in _TABLES[family]:
        for part in parts:
            if found := _rule(part).fullmatch(path):
                number = found.group(1) if found.groups() else ""
                return _filled(original, parts, number)
    return None


def from_original(path: str, family: str) -> Group | None:
    """The group of a dotted original name; None where it is not one."""
    if family not in _TABLES:
        ours = from_sgm(path)
        return None if ours is None else Group(path, (ours,))
    for original, parts in _TABLES[family]:
        if found := _rule(original).fullmatch(path):
            return _filled(original, parts, found.group(1) if found.groups() else "")
    return None


def family_of_original(path: str) -> str | None:
    """Whose original name this is: `flux`, `sd3`, `unet`, or None for a diffusers name."""
    for family, heads in (("flux", _FLUX_HEADS), ("sd3", _SD3_HEADS), ("unet", _SGM_HEADS)):
        if path.startswith(heads):
            return family
    return None


def to_sgm(path: str) -> str | None:
    """The name in the SGM UNet of a diffusers path (two resnets a level, as in SD and SDXL); None where there is none.

    >>> to_sgm("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    'input_blocks.4.1.transformer_blocks.0.attn1.to_q'
    """
    if path in _TOP:
        return _TOP[path]
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", path)
    if found is None:
        return None
    side, level, kind, index, rest = found.groups()
    inner = _RESNET.get(rest) if kind == "resnets" else rest
    if inner is None:
        return None
    if side is None:
        place = {"attentions": "1", "resnets": str(2 * int(index))}.get(kind)
        return None if place is None else f"middle_block.{place}.{inner}"
    if kind in ("downsamplers", "upsamplers"):
        if rest != "conv":
            return None
        row = 3 * (int(level) + 1) if side == "down" else 3 * int(level) + 2
        return f"input_blocks.{row}.0.op" if side == "down" else f"output_blocks.{row}.2.conv"
    column = {"attentions": 1, "resnets": 0}.get(kind)
    if column is None:
        return None
    row = 3 * int(level) + int(index)
    return f"input_blocks.{row + 1}.{column}.{inner}" if side == "down" else f"output_blocks.{row}.{column}.{inner}"


def from_sgm(path: str) -> str | None:
    """The diffusers path of a name in the SGM or LDM UNet; None where it is not one.

    >>> from_sgm("output_blocks.2.2.conv")
    'up_blocks.0.upsamplers.0.conv'
    """
    for ours, theirs in _TOP.items():
        if path == theirs:
            return ours
    inner_of = {theirs: ours for ours, theirs in _RESNET.items()}
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", path):
        place, rest = found.groups()
        if place == "1":
            return f"mid_block.attentions.0.{rest}"
        return f"mid_block.resnets.{int(place) // 2}.{inner_of[rest]}" if rest in inner_of else None
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)", path)
    if found is None:
        return None
    side, row, column, rest = found.group(1), int(found.group(2)), found.group(3), found.group(4)
    level, index = divmod(row - 1, 3) if side == "input" else divmod(row, 3)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest == "op" and side == "input":
        return f"{block}.downsamplers.0.conv"
    if rest == "conv" and side == "output":
        return f"{block}.upsamplers.0.conv"
    if column == "0":
        return f"{block}.resnets.{index}.{inner_of[rest]}" if rest in inner_of else None
    return f"{block}.attentions.{index}.{rest}" if column == "1" else None


def _filled(original: str, parts: tuple[str, ...], number: str) -> Group:
    swaps = original == "final_layer.adaLN_modulation.1" or original.endswith("context_block.adaLN_modulation.1")
    return Group(original.replace("{i}", number), tuple(p.replace("{i}", number) for p in parts), swaps)


@cache
def _rule(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)"))


_WORDS = (
    # diffusers
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks", "to_q", "to_k",
    "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj", "proj_in", "proj_out", "proj_mlp",
    "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "time_embedding", "add_embedding", "linear_1",
    "linear_2", "ff_context", "norm1_context", "norm_out", "context_embedder", "x_embedder", "time_text_embed",
    "timestep_embedder", "text_embedder", "guidance_embedder",
    # originals
    "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection",
    "time_embed", "label_emb", "double_blocks", "single_blocks", "joint_blocks", "x_block", "context_block",
    "img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "img_in", "txt_in", "time_in", "vector_in",
    "guidance_in", "in_layer", "out_layer", "final_layer", "adaLN_modulation", "t_embedder", "y_embedder",
    # text encoders
    "text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
)  # fmt: skip
_WORD = re.compile("(?:(" + "|".join(sorted(_WORDS, key=len, reverse=True)) + ")|([^_]+))(?:_|$)")


def dotted(name: str) -> str:
    """A name whose dots became underscores, with its dots again.

    >>> dotted("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0")
    'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    words, place = [], 0
    while place < len(name):
        found = _WORD.match(name, place)
        if found is None:
            return name
        words.append(found.group(1) or found.group(2))
        place = found.end()
    return ".".join(words)
