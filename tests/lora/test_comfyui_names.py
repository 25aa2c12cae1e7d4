"""Every name that `lora keys` gives is one that ComfyUI looks for.

ComfyUI lists the names that it takes for each layer of the loaded model, and ignores all others with a line in its
console. What it lists was read in its lora.py (2026-11) and is written down here as facts: the layers of each
original checkpoint, what diffusers calls them, and the prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from emotrain.runs.lora_keys import lora_keys

SUFFIXES = (".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_A.weight", ".lora_B.weight")
# transformer blocks of each attention: per level on the way down, and in the middle
UNETS = {"sd15": ((1, 1, 1, 0), 1), "sd21": ((1, 1, 1, 0), 1), "sdxl": ((0, 2, 10), 10)}
SD3_BLOCKS = {"sd3-medium": (24, 0), "sd35-medium": (24, 13), "sd35-large": (38, 0)}  # the second: with attn2
FLUX_BLOCKS = (19, 38)
CLIP_LAYERS = {  # text encoder -> layers; the numbers are those of the checkpoints, not of our tables
    "sd15": {1: 12}, "sd21": {1: 23}, "sdxl": {1: 12, 2: 32}, "sd3": {1: 12, 2: 32}, "flux": {1: 12},
}  # fmt: skip
RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
Pair = tuple[str, str]  # (original, diffusers)


def attention(here: str, there: str, depth: int) -> Iterator[Pair]:
    """The layers of one spatial transformer; they have the same names in both layouts."""
    for name in ("proj_in", "proj_out"):
        yield f"{here}.{name}", f"{there}.{name}"
    for block in range(depth):
        for inner in (
            "ff.net.0.proj",
            "ff.net.2",
            *(f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")),
        ):
            yield f"{here}.transformer_blocks.{block}.{inner}", f"{there}.transformer_blocks.{block}.{inner}"


def resnet(here: str, there: str) -> Iterator[Pair]:
    for ours, theirs in RESNET.items():
        yield f"{here}.{theirs}", f"{there}.{ours}"


def unet_layers(depths: tuple[int, ...], middle: int) -> Iterator[Pair]:
    """Counted as the original builds itself: one list down, one list up."""
    number = 1  # 0 is the convolution at the entry
    for level, depth in enumerate(depths):
        for index in range(2):
            yield from resnet(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{index}")
            if depth:
                there = f"down_blocks.{level}.attentions.{index}"
                yield from attention(f"input_blocks.{number}.1", there, depth)
            number += 1
        if level < len(depths) - 1:
            yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    yield from resnet("middle_block.0", "mid_block.resnets.0")
    yield from attention("middle_block.1", "mid_block.attentions.0", middle)
    yield from resnet("middle_block.2", "mid_block.resnets.1")
    number = 0
    for level, depth in enumerate(reversed(depths)):
        for index in range(3):
            yield from resnet(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{index}")
            if depth:
                yield from attention(f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{index}", depth)
            if index == 2 and level < len(depths) - 1:
                here = f"output_blocks.{number}.{2 if depth else 1}.conv"
                yield here, f"up_blocks.{level}.upsamplers.0.conv"
            number += 1


def sd3_layers(blocks: int, dual: int) -> Iterator[Pair]:
    for i in range(blocks):
        here, there, last = f"joint_blocks.{i}", f"transformer_blocks.{i}", i == blocks - 1
        qkv = [(f"{here}.x_block.attn.qkv", f"{there}.attn.to_{x}") for x in "qkv"]
        qkv += [(f"{here}.context_block.attn.qkv", f"{there}.attn.add_{x}_proj") for x in "qkv"]
        if i < dual:
            qkv += [(f"{here}.x_block.attn2.qkv", f"{there}.attn2.to_{x}") for x in "qkv"]
            yield f"{here}.x_block.attn2.proj", f"{there}.attn2.to_out.0"
        yield from qkv
        sides = (("x", "attn.to_out.0", "ff", "norm1"), ("context", "attn.to_add_out", "ff_context", "norm1_context"))
        for side, out, ff, norm in sides:
            yield f"{here}.{side}_block.adaLN_modulation.1", f"{there}.{norm}.linear"
            if side == "context" and last:
                continue  # nothing reads the text after the last block
            yield f"{here}.{side}_block.attn.proj", f"{there}.{out}"
            yield f"{here}.{side}_block.mlp.fc1", f"{there}.{ff}.net.0.proj"
            yield f"{here}.{side}_block.mlp.fc2", f"{there}.{ff}.net.2"


def flux_layers(double: int, single: int) -> Iterator[Pair]:
    for i in range(double):
        here, there = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, q, out, ff, norm in (
            ("img", "to_{}", "to_out.0", "ff", "norm1"),
            ("txt", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
        ):
            yield from ((f"{here}.{stream}_attn.qkv", f"{there}.attn.{q.format(x)}") for x in "qkv")
            yield f"{here}.{stream}_attn.proj", f"{there}.attn.{out}"
            yield f"{here}.{stream}_mlp.0", f"{there}.{ff}.net.0.proj"
            yield f"{here}.{stream}_mlp.2", f"{there}.{ff}.net.2"
            yield f"{here}.{stream}_mod.lin", f"{there}.{norm}.linear"
    for i in range(single):
        here, there = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield from ((f"{here}.linear1", f"{there}.{x}") for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
        yield f"{here}.linear2", f"{there}.proj_out"
        yield f"{here}.modulation.lin", f"{there}.norm.linear"


def known_to_comfyui(family: str, variant: str) -> set[str]:
    """What may stand before `.lora_up.weight`, `.lora_B.weight` and their like."""
    if family in UNETS:
        pairs = list(unet_layers(*UNETS[family]))
        # attention is looked for under a name of 2023: attn1.processor.to_q, attn1.processor.to_out
        old = {there.replace(".to_", ".processor.to_").removesuffix(".0") for _, there in pairs if ".to_out.0" in there}
        old |= {there.replace(".to_", ".processor.to_") for _, there in pairs if not there.endswith(".to_out.0")}
        names = {f"unet.{name}" for name in old}
        names |= {"lora_unet_" + there.replace(".", "_") for _, there in pairs}
    else:
        pairs = list(sd3_layers(*SD3_BLOCKS[variant]) if family == "sd3" else flux_layers(*FLUX_BLOCKS))
        names = {f"transformer.{there}" for _, there in pairs}
    names |= {"lora_unet_" + here.replace(".", "_") for here, _ in pairs}
    names |= {f"diffusion_model.{here}" for here, _ in pairs}
    for number, layers in CLIP_LAYERS[family].items():
        for layer in range(layers):
            for inner in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out"))):
                path = f"text_model.encoder.layers.{layer}.{inner}"
                names.add(f"text_encoder.{path}" if number == 1 else f"text_encoder_{number}.{path}")
                names.add(f"lora_te{number}_" + path.replace(".", "_"))
                if number == 1:
                    names.add("lora_te_" + path.replace(".", "_"))
    return names


def stems(keys: list[str]) -> set[str]:
    found = set()
    for key in keys:
        suffix = next(suffix for suffix in SUFFIXES if key.endswith(suffix))
        found.add(key.removesuffix(suffix))
    return found


VARIANTS = ["sd15", "sd21", "sdxl", "sd3-medium", "sd35-medium", "sd35-large", "flux1-dev", "flux1-schnell"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_name_of_a_default_file_is_known(variant: str) -> None:
    found = lora_keys(variant, target_set="all", text_encoder=True)
    known = known_to_comfyui(found["family"], variant)
    named = stems(found["keys"])
    assert named <= known
    text = {name for name in named if name.startswith(("lora_te", "text_encoder"))}
    assert len(text) == 6 * sum(CLIP_LAYERS[found["family"]].values())
    assert len(named) == found["modules"]


@pytest.mark.parametrize("variant", ["sd35-medium", "flux1-dev"])
def test_the_kohya_layout_of_transformers_is_known_too(variant: str) -> None:
    found = lora_keys(variant, target_set="all", text_encoder=True, format="kohya")
    assert stems(found["keys"]) <= known_to_comfyui(found["family"], variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_comfyui_layout_is_known_too(variant: str) -> None:
    """SD's first level on the way up has no attention: its upsampler is the second of its row, not the third."""
    found = lora_keys(variant, target_set="all", format="comfyui")
    named = stems(found["keys"])
    assert named <= known_to_comfyui(found["family"], variant)
    assert len(named) == found["modules"]


@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
def test_of_a_unet_in_the_diffusers_layout_the_attention_is_not_known(variant: str) -> None:
    """docs/concepts/lora-files.md says so: ComfyUI would apply a part of such a file."""
    found = lora_keys(variant, target_set="all", text_encoder=True, format="diffusers")
    unknown = stems(found["keys"]) - known_to_comfyui(found["family"], variant)
    assert unknown == {name for name in stems(found["keys"]) if ".to_" in name}
    assert len(unknown) == {"sd15": 128, "sdxl": 560}[variant]


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_smaller_sets_of_targets_are_part_of_the_largest(family: str) -> None:
    every: dict[str, Any] = {name: lora_keys(family, target_set=name) for name in ("attn", "attn-mlp", "all")}
    assert set(every["attn"]["keys"]) < set(every["attn-mlp"]["keys"]) < set(every["all"]["keys"])


def newer_layers(family: str, double: int = 0, single: int = 0) -> set[str]:
    """What may stand before the suffixes, of the families whose key maps came later (lora.py and utils.py of 0.30)."""
    if family == "zimage":
        blocks = [f"layers.{i}" for i in range(30)]
        blocks += [f"{kind}_refiner.{i}" for kind in ("noise", "context") for i in range(2)]
        inner = [f"attention.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")]
        inner += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"]
        names = {f"{block}.{x}" for block in blocks for x in inner}
        names |= {"all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1", "all_x_embedder.2-1"}
        names |= {"cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"}
        return {f"{prefix}{name}" for prefix in ("diffusion_model.", "transformer.", "") for name in names}
    if family == "krea2":
        blocks = [f"transformer_blocks.{i}" for i in range(28)]
        blocks += [f"text_fusion.{kind}_blocks.{i}" for kind in ("layerwise", "refiner") for i in range(2)]
        inner = [f"attn.{x}" for x in ("to_q", "to_k", "to_v", "to_gate", "to_out.0")]
        names = {f"{block}.{x}" for block in blocks for x in (*inner, "ff.gate", "ff.up", "ff.down")}
        names |= {"img_in", "time_embed.linear_1", "time_embed.linear_2", "time_mod_proj", "txt_in.linear_1"}
        names |= {"txt_in.linear_2", "text_fusion.projector", "final_layer.linear"}
        return {f"{prefix}{name}" for prefix in ("diffusion_model.", "transformer.", "") for name in names}
    if family == "anima":  # the layers of the model itself, whatever they are called
        inner = [f"{kind}_attn.{x}_proj" for kind in ("self", "cross") for x in ("q", "k", "v", "output")]
        inner += [f"adaln_modulation_{part}.{n}" for part in ("self_attn", "cross_attn", "mlp") for n in (1, 2)]
        names = {f"blocks.{i}.{x}" for i in range(28) for x in (*inner, "mlp.layer1", "mlp.layer2")}
        names |= {"x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2", "final_layer.linear"}
        return {f"diffusion_model.{name}" for name in names | {f"final_layer.adaln_modulation.{n}" for n in (1, 2)}}
    if family == "qwen":
        inner = [f"attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")]
        inner += ["attn.to_add_out"]
        inner += [f"{side}_{x}" for side in ("img", "txt") for x in ("mlp.net.0.proj", "mlp.net.2", "mod.1")]
        names = {f"transformer_blocks.{i}.{x}" for i in range(60) for x in inner}
        names |= {"img_in", "txt_in", "norm_out.linear", "proj_out"}
        names |= {f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)}
        return {f"{prefix}{name}" for prefix in ("diffusion_model.", "transformer.", "") for name in names}
    if family == "qwen21":  # two layers of the feed-forward are one in ComfyUI: known by diffusers' names alone
        names = {f"attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")} | {"img_mlp.out"}
        names = {f"transformer_blocks.{i}.{x}" for i in range(32) for x in names}
        names |= {"img_in", "txt_in.in_layer", "txt_in.out_layer", "modulation.1", "norm_out.linear", "proj_out"}
        names |= {f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)}
        halves = {f"transformer_blocks.{i}.img_mlp.{x}" for i in range(32) for x in ("gate_layer", "proj")}
        known = {f"{prefix}{name}" for prefix in ("transformer.", "") for name in names | halves}
        return known | {f"diffusion_model.{name}" for name in names}
    names = {there for _, there in flux_layers(double, single)}  # FLUX.1's map, to which FLUX.2's layers were added
    for i in range(double):
        names |= {f"transformer_blocks.{i}.{ff}.linear_{x}" for ff in ("ff", "ff_context") for x in ("in", "out")}
    for i in range(single):
        names |= {f"single_transformer_blocks.{i}.attn.{x}" for x in ("to_qkv_mlp_proj", "to_out")}
    names |= {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"}
    return {f"transformer.{name}" for name in names}


NEWER = {
    "z-image": ("zimage",), "krea2-raw": ("krea2",), "anima": ("anima",), "qwen-image": ("qwen",),
    "klein-4b": ("flux2", 5, 20), "klein-9b": ("flux2", 8, 24), "flux2-dev": ("flux2", 8, 48),
    "chroma": ("flux", 19, 38), "qwen-image-2.1": ("qwen21",),
}  # fmt: skip


@pytest.mark.parametrize("targets", ["attn-mlp", "all"])
@pytest.mark.parametrize("variant", NEWER)
def test_every_name_of_a_newer_familys_default_file_is_known(variant: str, targets: str) -> None:
    """Of FLUX.2 with `all`, the modulation and the time embedding are not: docs/concepts/lora-files.md says so."""
    found = lora_keys(variant, target_set=targets)
    named = stems(found["keys"])
    unknown = named - newer_layers(*NEWER[variant])
    assert len(named) == found["modules"]
    if NEWER[variant][0] == "flux2" and targets == "all":
        assert len(unknown) == (7 if variant == "flux2-dev" else 5)
        assert all(".time_guidance_embed." in name or "_stream_modulation" in name for name in unknown)
    else:
        assert not unknown
