"""Names and numbers of the two layouts, dict in, dict out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import weights
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.families.unet import from_sgm, to_sgm
from emotrain.lora.dialects import parse
from emotrain.lora.formats import layout_of, to_diffusers, to_kohya, to_layout
from emotrain.lora.origin import dotted
from emotrain.runs.lora_keys import lora_keys

FAMILIES = ["sd15", "sd21", "sdxl", "sd3", "flux"]

# the documented names, fixed here so that no library's renaming can get into files unseen
EXPECTED = {
    ("sd15", "kohya"): [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.alpha",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj.lora_up.weight",
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut.lora_down.weight",
        "lora_unet_up_blocks_0_upsamplers_0_conv.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te_text_model_encoder_layers_11_mlp_fc2.alpha",
    ],
    ("sd21", "kohya"): ["lora_te_text_model_encoder_layers_22_mlp_fc1.lora_up.weight"],
    ("sdxl", "kohya"): [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2.alpha",
        "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_k.lora_up.weight",
        "lora_unet_input_blocks_3_0_op.lora_down.weight",
        "lora_unet_output_blocks_2_2_conv.lora_down.weight",
        "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight",
        "lora_unet_output_blocks_8_0_emb_layers_1.lora_down.weight",
        "lora_unet_middle_block_2_out_layers_3.lora_down.weight",
        "lora_unet_output_blocks_0_0_skip_connection.lora_down.weight",
        "lora_te1_text_model_encoder_layers_11_mlp_fc2.lora_down.weight",
        "lora_te2_text_model_encoder_layers_31_self_attn_v_proj.lora_up.weight",
    ],
    ("sd3", "kohya"): [
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
        "lora_unet_joint_blocks_23_context_block_attn_qkv.lora_down.weight",
        "lora_unet_joint_blocks_0_context_block_attn_proj.alpha",
        "lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_up.weight",
        "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1.lora_up.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_down.weight",
    ],
    ("sd3", "diffusers"): [
        "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight",
        "transformer.transformer_blocks.23.norm1_context.linear.lora_B.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2.lora_B.weight",
    ],
    ("flux", "kohya"): [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "lora_unet_double_blocks_18_txt_mod_lin.alpha",
        "lora_unet_double_blocks_0_txt_mlp_2.lora_up.weight",
        "lora_unet_single_blocks_37_linear1.lora_down.weight",
        "lora_unet_single_blocks_0_linear2.lora_down.weight",
        "lora_unet_single_blocks_0_modulation_lin.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    ],
    ("flux", "diffusers"): [
        "transformer.transformer_blocks.0.attn.to_add_out.lora_A.weight",
        "transformer.single_transformer_blocks.37.proj_mlp.lora_B.weight",
        "transformer.single_transformer_blocks.0.norm.linear.lora_B.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    ],
}  # fmt: skip
MODULES = {
    ("sd15", "kohya"): 278 + 72, ("sd21", "kohya"): 278 + 138, ("sdxl", "kohya"): 788 + 72 + 192,
    ("sd3", "kohya"): 237 + 72 + 192, ("sd3", "diffusers"): 333 + 72 + 192,
    ("flux", "kohya"): 304 + 72, ("flux", "diffusers"): 494 + 72,
}  # fmt: skip


@pytest.mark.parametrize(("family", "layout"), EXPECTED)
def test_files_of_the_public_models_have_the_documented_names(family: str, layout: str) -> None:
    found = lora_keys(family, target_set="all", text_encoder=True, format=layout)
    assert [key for key in EXPECTED[family, layout] if key not in found["keys"]] == []
    assert found["modules"] == MODULES[family, layout]
    assert len(found["keys"]) == found["modules"] * (3 if layout == "kohya" else 2)
    assert len(set(found["keys"])) == len(found["keys"])
    assert not any("_te" in key and "text_model_encoder_layers" not in key for key in found["keys"] if "lora_te" in key)


def test_each_family_has_its_default_layout() -> None:
    assert [layout_of(family) for family in FAMILIES] == ["kohya", "kohya", "kohya", "diffusers", "diffusers"]
    assert layout_of("flux", "kohya") == "kohya"
    assert layout_of("sd15", "diffusers") == "diffusers"


def test_every_unet_name_survives_the_way_to_sgm_and_back() -> None:
    found = lora_keys("sdxl", target_set="all", format="diffusers")
    paths = {key.removeprefix("unet.").rsplit(".lora_", 1)[0] for key in found["keys"]}
    paths |= {"conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"}
    there = {path: to_sgm(path) for path in paths}
    assert len(set(there.values())) == len(paths)
    assert all(from_sgm(str(name)) == path for path, name in there.items())
    assert all(dotted(str(name).replace(".", "_")) == name for name in there.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_dots_come_back_into_every_name(family: str) -> None:
    found = lora_keys(family, target_set="all", text_encoder=True, format="diffusers")
    for key in found["keys"]:
        path = key.split(".", 1)[1].rsplit(".lora_", 1)[0]
        assert dotted(path.replace(".", "_")) == path


@pytest.mark.parametrize("targets", ["attn", "attn-mlp", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_and_diffusers_convert_into_each_other_exactly(family: str, targets: str) -> None:
    state, alphas = weights(family, targets, alpha=1.0)
    metadata = {"emotrain.family": family}
    kohya = to_kohya(state, alphas, family)
    from_kohya = parse(kohya, metadata)
    assert from_kohya.dialect == "kohya"
    assert from_kohya.alphas == alphas
    assert_same(from_kohya.state, state)
    diffusers = to_diffusers(from_kohya.state, from_kohya.alphas)
    assert_same(diffusers, to_diffusers(state, alphas))
    from_diffusers = parse(diffusers, metadata)
    assert_same(from_diffusers.state, diffusers)
    again = parse(to_kohya(from_diffusers.state, from_diffusers.alphas, family), metadata)
    assert_same(to_diffusers(again.state, again.alphas), diffusers)


def test_separate_q_k_v_become_one_with_three_times_the_alpha() -> None:
    kohya = to_kohya(*weights("flux", rank=4, alpha=2.0), "flux")
    assert kohya["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape[0] == 12
    assert float(kohya["lora_unet_double_blocks_0_img_attn_qkv.alpha"]) == 6.0
    assert kohya["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape[0] == 16
    assert float(kohya["lora_unet_single_blocks_0_linear1.alpha"]) == 8.0
    assert float(kohya["lora_unet_single_blocks_0_linear2.alpha"]) == 2.0


@pytest.mark.parametrize("given", [["to_q"], ["to_k", "proj_mlp"], ["proj_mlp"]])
def test_a_fused_layer_with_missing_parts_comes_back_as_it_was(given: list[str]) -> None:
    state, alphas = weights("flux", [rf"single_transformer_blocks\.\d+\.(?:attn\.)?{name}" for name in given])
    kohya = to_kohya(state, alphas, "flux")
    assert {key.split(".")[0] for key in kohya} == {f"lora_unet_single_blocks_{i}_linear1" for i in (0, 1)}
    assert kohya["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * 32, 16)
    back = parse(kohya, {})
    assert_same(back.state, state)
    assert back.alphas == alphas


def test_parts_of_different_rank_and_strength_fuse_to_the_same_update() -> None:
    state, alphas = weights("sd3", "attn", rank_pattern={"to_q": 2, "add_k_proj": 8})
    alphas["transformer.transformer_blocks.0.attn.to_v"] = 7.0
    back = parse(to_kohya(state, alphas, "sd3"), {})
    assert_same_updates(back.state, back.alphas, state, alphas)


def test_a_dense_fused_lora_splits_by_rows_and_joins_again_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(6, 32, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(96, 6, generator=generator),
        f"{stem}.alpha": torch.tensor(3.0),
    }
    parsed = parse(tensors, {})
    assert parsed.family == "flux"
    key = "transformer.transformer_blocks.0.attn.to_k"
    assert torch.equal(parsed.state[f"{key}.lora_A.weight"], tensors[f"{stem}.lora_down.weight"])
    assert torch.equal(parsed.state[f"{key}.lora_B.weight"], tensors[f"{stem}.lora_up.weight"][32:64])
    assert parsed.alphas[key] == 3.0
    assert_same(to_kohya(parsed.state, parsed.alphas, "flux"), tensors)


def test_the_last_sd3_blocks_context_modulation_swaps_its_halves() -> None:
    """Its module has shift and scale alone, in the other order than the original; the blocks before have six parts."""
    state, alphas = weights("sd3", [r"norm1_context\.linear"])
    kohya = to_kohya(state, alphas, "sd3")
    up = state["transformer.transformer_blocks.2.norm1_context.linear.lora_B.weight"]
    assert up.shape[0] == 64
    swapped = torch.cat([up[32:], up[:32]])
    assert torch.equal(kohya["lora_unet_joint_blocks_2_context_block_adaLN_modulation_1.lora_up.weight"], swapped)
    other = "transformer.transformer_blocks.1.norm1_context.linear.lora_B.weight"
    assert torch.equal(kohya["lora_unet_joint_blocks_1_context_block_adaLN_modulation_1.lora_up.weight"], state[other])


def test_a_module_without_a_name_in_the_layout_is_an_error_not_left_out() -> None:
    state = {f"transformer.pos_embed.proj.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}
    with pytest.raises(ModelError, match=r"pos_embed\.proj"):
        to_kohya(state, {}, "sd3")


def test_kohyas_alpha_is_the_real_one_when_it_differs_from_the_rank() -> None:
    kohya = to_kohya(*weights("sd15", rank=4, alpha=1.0), "sd15")
    assert {float(value) for key, value in kohya.items() if key.endswith(".alpha")} == {1.0}
    assert all(value.ndim == 0 for key, value in kohya.items() if key.endswith(".alpha"))


def test_the_diffusers_layout_has_strength_one() -> None:
    state, alphas = weights("sd15", rank=4, alpha=1.0)
    folded = to_diffusers(state, alphas)
    assert folded.keys() == state.keys()
    for key, value in folded.items():
        assert torch.equal(value, state[key] * (0.25 if key.endswith("lora_B.weight") else 1.0))


def test_shapes_are_kohyas_for_linear_conv_and_one_by_one() -> None:
    kohya = to_layout(*weights("sd15", rank=4), "sd15", "kohya")
    shapes = {key: tuple(value.shape) for key, value in kohya.items()}
    assert shapes["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"] == (4, 32, 1, 1)
    assert shapes["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"] == (32, 4, 1, 1)
    assert shapes["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"] == (4, 32, 3, 3)
    assert shapes["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"] == (32, 4, 1, 1)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def assert_same_updates(
    state: dict[str, Tensor], alphas: dict[str, float], other: dict[str, Tensor], other_alphas: dict[str, float]
) -> None:
    assert alphas.keys() == other_alphas.keys()
    for name in alphas:
        down, up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        there = other[f"{name}.lora_B.weight"] @ other[f"{name}.lora_A.weight"]
        strength = other_alphas[name] / other[f"{name}.lora_A.weight"].shape[0]
        assert torch.allclose(up @ down * (alphas[name] / down.shape[0]), there * strength, rtol=1e-4, atol=1e-5)
