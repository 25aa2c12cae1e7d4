"""LoRA files of other programs: the same update whatever they call their tensors; what cannot be applied is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import weights
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.families.unet import to_sgm
from emotrain.lora.dialects import parse
from emotrain.lora.formats import pairs, to_diffusers, to_kohya
from emotrain.lora.origin import require_family

Tensors = dict[str, Tensor]


def updates(state: Tensors, alphas: dict[str, float]) -> Tensors:
    """Canonical module path -> alpha / rank B A."""
    return {
        name: (pair.up.flatten(1) @ pair.down.flatten(1)) * pair.strength for name, pair in pairs(state, alphas).items()
    }


def assert_same_updates(tensors: Tensors, metadata: dict[str, str], expected: Tensors, dialect: str) -> None:
    parsed = parse(tensors, metadata)
    assert parsed.dialect == dialect
    found = updates(parsed.state, parsed.alphas)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in found) < 1e-6


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    return {rename(key): value for key, value in tensors.items()}


def comfy_flux(key: str) -> str:
    words = (
        "diffusion_model", "img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "double_blocks",
        "single_blocks", "lora_down", "lora_up",
    )  # fmt: skip
    key = key.replace("lora_unet_", "diffusion_model_")
    for word in words:
        key = key.replace(word, word.replace("_", "~"))
    return key.replace("_", ".").replace("~", "_")


@pytest.mark.parametrize("roles", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_comfyuis_native_flux_names(roles: tuple[str, str]) -> None:
    state, alphas = weights("flux")
    kohya = to_kohya(state, alphas, "flux")
    names = renamed(kohya, comfy_flux)
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight" in names
    names = renamed(names, lambda k: k.replace("lora_down", roles[0]).replace("lora_up", roles[1]))
    assert_same_updates(names, {}, updates(state, alphas), "comfyui")


def test_comfyuis_native_unet_names() -> None:
    state, alphas = weights("sdxl")
    names: Tensors = {}
    for key, value in state.items():
        path, role = key.removeprefix("unet.").split(".lora_")
        names[f"diffusion_model.{to_sgm(path)}.lora_{role}"] = value
    for path, alpha in alphas.items():
        names[f"diffusion_model.{to_sgm(path.removeprefix('unet.'))}.alpha"] = torch.tensor(alpha)
    assert_same_updates(names, {"ss_base_model_version": "sdxl_base_v1-0"}, updates(state, alphas), "comfyui")


def test_onetrainers_transformer_names() -> None:
    state, alphas = weights("flux")
    names: Tensors = {}
    for path, pair in pairs(state, alphas).items():
        stem = "lora_transformer_" + path.removeprefix("transformer.").replace(".", "_")
        names |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up}
        names[f"{stem}.alpha"] = torch.tensor(pair.alpha)
    assert_same_updates(names, {}, updates(state, alphas), "onetrainer")


def test_kohya_names_with_diffusers_spelling_for_sdxl() -> None:
    state, alphas = weights("sdxl")
    names: Tensors = {}
    for path, pair in pairs(state, alphas).items():
        stem = "lora_unet_" + path.removeprefix("unet.").replace(".", "_")
        names |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up}
        names[f"{stem}.alpha"] = torch.tensor(pair.alpha)
    assert_same_updates(
        names, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, updates(state, alphas), "kohya"
    )


@pytest.mark.parametrize("generation", ["lora.down", "processor", "peft"])
def test_older_diffusers_and_raw_peft_names(generation: str) -> None:
    state, alphas = weights("sd15", "attn")
    folded = to_diffusers(state, alphas)

    def rename(key: str) -> str:
        key = key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        if generation == "processor":
            head, projection, half = key.replace(".to_out.0.", ".to_out.").replace(".lora.", "|").rpartition(".to_")
            projection, half = half.split("|")
            return f"{head}.processor.to_{projection}_lora.{half}"
        if generation == "peft":
            key = key.replace("lora.down", "lora_A.default").replace("lora.up", "lora_B.default")
            return key.replace("unet.", "base_model.model.")
        return key

    dialect = "peft" if generation == "peft" else "diffusers"
    assert_same_updates(renamed(folded, rename), {}, updates(state, alphas), dialect)


def test_older_text_encoder_names() -> None:
    down, up = torch.randn(2, 768), torch.randn(768, 2)
    path = "text_encoder.text_model.encoder.layers.0"
    parsed = parse(
        {
            f"{path}.self_attn.to_q_lora.down.weight": down,
            f"{path}.self_attn.to_q_lora.up.weight": up,
            f"{path}.mlp.fc1.lora_linear_layer.down.weight": down,
            f"{path}.mlp.fc1.lora_linear_layer.up.weight": torch.randn(3072, 2),
            "text_encoder.encoder.layers.1.self_attn.k_proj.lora_A.weight": down,
            "text_encoder.encoder.layers.1.self_attn.k_proj.lora_B.weight": up,
        },
        {},
    )
    assert sorted(parsed.alphas) == [
        f"{path}.mlp.fc1", f"{path}.self_attn.q_proj", "text_encoder.text_model.encoder.layers.1.self_attn.k_proj",
    ]  # fmt: skip
    assert parsed.family == "sd15"


def test_a_missing_alpha_is_the_rank_and_is_said() -> None:
    state, alphas = weights("sd15", "attn", alpha=4.0)
    kohya = {key: value for key, value in to_kohya(state, alphas, "sd15").items() if not key.endswith(".alpha")}
    parsed = parse(kohya, {})
    assert set(parsed.alphas.values()) == {4.0}
    assert parsed.notes == (f"alpha is missing for {len(parsed.alphas)} of its modules: taken as their rank",)


def test_peft_settings_in_the_metadata_scale_each_module_by_its_own() -> None:
    state, alphas = weights("sd15", "attn", alpha=1.0)
    first, second = sorted(alphas)[:2]
    settings = {
        "unet.r": 4, "unet.lora_alpha": 1, "unet.alpha_pattern": {first.removeprefix("unet."): 3},
        "text_encoder.lora_alpha": 99,
    }  # fmt: skip
    parsed = parse(state, {"lora_adapter_metadata": json.dumps(settings)})
    assert (parsed.alphas[first], parsed.alphas[second]) == (3.0, 1.0)
    with pytest.raises(ModelError, match="DoRA"):
        parse(state, {"lora_adapter_metadata": json.dumps({**settings, "unet.use_dora": True})})
    with pytest.raises(ModelError, match="not JSON"):
        parse(state, {"lora_adapter_metadata": "{"})


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        ("hada_w1_a", "LoHa"),
        ("lora_mid.weight", "Tucker"),
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
        ("lambda_layer", "T-LoRA"),
        ("diff", "full differences"),
        ("w_norm", "full differences"),
        ("lora_B.bias", "biases"),
    ],
)
def test_other_networks_are_refused_by_their_name(suffix: str, name: str) -> None:
    kohya = to_kohya(*weights("sd15", "attn"), "sd15")
    stem = next(iter(kohya)).split(".")[0]
    with pytest.raises(ModelError, match=name):
        parse({**kohya, f"{stem}.{suffix}": torch.ones(2)}, {})


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "whole model"),
        ("emb_params", "textual-inversion"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", "T5"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
    ],
)
def test_files_that_are_no_lora_are_named(key: str, name: str) -> None:
    with pytest.raises(ModelError, match=name):
        parse({key: torch.ones(2, 2)}, {})


def test_no_known_key_at_all_is_an_error() -> None:
    with pytest.raises(ModelError, match="none of a known name"):
        parse({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, {})
    with pytest.raises(ModelError, match="no LoRA weights"):
        parse({}, {})


def test_keys_without_a_module_are_an_error_that_lists_them_unless_allowed() -> None:
    kohya = to_kohya(*weights("sd15", "attn"), "sd15")
    extra = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_sideways.weight"
    odd = {
        "lora_te_text_projection.lora_down.weight": torch.ones(2, 8),
        "lora_te_text_projection.lora_up.weight": torch.ones(8, 2),
    }
    with pytest.raises(ModelError, match="3 of its keys") as caught:
        parse({**kohya, **odd, extra: torch.ones(2)}, {})
    assert "lora_te_text_projection.lora_down.weight" in caught.value.message
    assert extra in caught.value.message
    parsed = parse({**kohya, **odd, extra: torch.ones(2)}, {}, allow_partial=True)
    assert sorted(parsed.ignored) == sorted([*odd, extra])
    assert len(parsed.alphas) == len(kohya) // 3


def test_only_foreign_keys_are_an_error_also_where_partial_is_allowed() -> None:
    tensors = {f"lora_te_something_{i}.lora_{h}.weight": torch.ones(2, 2) for i in (0, 1) for h in ("down", "up")}
    with pytest.raises(ModelError, match="none of its weights"):
        parse(tensors, {}, allow_partial=True)


def test_the_same_module_twice_is_an_error() -> None:
    state, alphas = weights("sd15", "attn")
    with pytest.raises(ModelError, match="two sets"):
        parse({**to_kohya(state, alphas, "sd15"), **state}, {})


@pytest.mark.parametrize(
    ("key", "width", "family"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, "sd15"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 1024, "sd21"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, "sdxl"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k", 640, "sdxl"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj", 1536, "sd3"),
        ("lora_unet_double_blocks_0_img_attn_proj", 3072, "flux"),
        ("transformer.transformer_blocks.0.attn.to_q", 3072, "flux"),
        ("transformer.transformer_blocks.0.attn.to_q", 1536, "sd3"),
        ("transformer.transformer_blocks.0.attn2.to_q", 64, "sd3"),
        ("transformer.single_transformer_blocks.0.attn.to_q", 64, "flux"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, "sd15"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 1024, "sd21"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, "sdxl"),
    ],
)  # fmt: skip
def test_the_family_shows_in_names_and_widths(key: str, width: int, family: str) -> None:
    roles = ("lora_A", "lora_B") if key.startswith("transformer.") else ("lora_down", "lora_up")
    tensors = {f"{key}.{roles[0]}.weight": torch.ones(2, width), f"{key}.{roles[1]}.weight": torch.ones(width, 2)}
    assert parse(tensors, {}, allow_partial=True).family == family


def test_metadata_decides_only_what_names_and_widths_leave_open() -> None:
    def tensors(width: int) -> dict[str, Any]:
        key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        return {f"{key}.lora_down.weight": torch.ones(2, width), f"{key}.lora_up.weight": torch.ones(8, 2)}

    assert parse(tensors(24), {"emotrain.family": "sd21"}, allow_partial=True).family == "sd21"
    assert parse(tensors(24), {"ss_base_model_version": "sdxl_base_v1-0"}, allow_partial=True).family == "sdxl"
    assert parse(tensors(768), {"emotrain.family": "sdxl"}, allow_partial=True).family == "sd15"
    assert parse(tensors(24), {"emotrain.family": "flux"}, allow_partial=True).family == "sd15"


def test_a_wrong_family_says_what_was_found_and_what_is_wanted() -> None:
    with pytest.raises(ModelError, match=r"a\.safetensors is a LoRA for sdxl, the model is sd15"):
        require_family("sdxl", "sd15", "a.safetensors")
