"""Which modules are adapted: counts on the public sizes, whole paths, ranks."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
import torch
from torch import nn

from emotrain.errors import ConfigError
from emotrain.families.registry import FAMILIES, configs, family_of_variant
from emotrain.lora.adapter import add_adapter
from emotrain.lora.targets import layers, select

COUNTS = {
    "sd15": ("sd15", 128, 192, 278),
    "sd21": ("sd21", 128, 192, 278),
    "sdxl": ("sdxl", 560, 722, 788),
    "sd3-medium": ("sd3", 191, 285, 333),
    "sd35-medium": ("sd3", 243, 337, 385),
    "sd35-large": ("sd3", 303, 453, 529),
    "flux1-dev": ("flux", 266, 418, 494),
    "flux1-schnell": ("flux", 266, 418, 494),
}
MILLIONS_AT_RANK_16 = {
    "sd15": (3.19, 6.78, 16.81),
    "sd21": (3.32, 6.91, 16.94),
    "sdxl": (23.22, 42.56, 49.19),
    "flux1-dev": (26.15, 65.37, 85.92),
}


@cache
def real_size(variant: str) -> nn.Module:
    family = str(family_of_variant(variant))
    with torch.device("meta"):
        return getattr(diffusers, FAMILIES[family].denoiser_class).from_config(configs(family)["denoiser"][variant])


@pytest.mark.parametrize("variant", COUNTS)
def test_target_sets_hold_exactly_the_documented_modules(variant: str) -> None:
    family, *expected = COUNTS[variant]
    model = real_size(variant)
    found = [len(select(model, name, family)) for name in ("attn", "attn-mlp", "all")]
    assert found == expected


@pytest.mark.parametrize("variant", MILLIONS_AT_RANK_16)
def test_rank_16_has_the_documented_number_of_parameters(variant: str) -> None:
    model = real_size(variant)
    held = layers(model)
    for name, expected in zip(("attn", "attn-mlp", "all"), MILLIONS_AT_RANK_16[variant], strict=True):
        total = 0
        for path in select(model, name, COUNTS[variant][0]):
            layer = held[path]
            if isinstance(layer, nn.Conv2d):
                total += 16 * (layer.in_channels * layer.kernel_size[0] ** 2 + layer.out_channels)
            else:
                total += 16 * (layer.in_features + layer.out_features)
        assert round(total / 1e6, 2) == expected


def test_an_adapter_on_the_meta_device_reads_no_weights_and_has_the_right_count() -> None:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel.from_config(configs("sd15")["denoiser"]["sd15"])
    adapter = add_adapter(model, rank=16, alpha=16, targets="attn-mlp", family="sd15", seed=0)
    assert adapter.num_modules == 192
    assert round(adapter.num_parameters / 1e6, 2) == 6.78
    assert {p.device.type for p in adapter.parameters()} == {"meta"}


def test_a_pattern_matches_whole_segments_only() -> None:
    model = real_size("flux1-dev")
    blocks = select(model, [r"single_transformer_blocks\.\d+\.proj_out"], "flux")
    assert len(blocks) == 38
    assert "proj_out" not in blocks
    assert select(model, ["to_q"], "flux") == select(model, [r"attn\.to_q"], "flux")
    with pytest.raises(ConfigError):
        select(model, ["o_q"], "flux")


def test_a_pattern_without_a_match_is_an_error_that_names_it() -> None:
    model = real_size("sd15")
    with pytest.raises(ConfigError, match="single_transformer_blocks") as caught:
        select(model, ["attn1", r"attn1\.to_q", r"single_transformer_blocks\..*"], "sd15")
    assert caught.value.exit_code == 2


def test_targets_of_another_family_match_nothing_and_are_an_error() -> None:
    with pytest.raises(ConfigError):
        select(real_size("sd15"), "attn", "flux")


def test_a_pattern_that_is_no_regular_expression_is_an_error() -> None:
    with pytest.raises(ConfigError, match="regular expression"):
        select(real_size("sd15"), ["attn["], "sd15")


def test_an_unknown_set_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        select(real_size("sd15"), "attention", "sd15")
    assert "attn-mlp" in str(caught.value.hint)


def test_a_rank_above_what_the_layers_hold_is_refused() -> None:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel.from_config(configs("sd15")["denoiser"]["sd15"])
    with pytest.raises(ConfigError, match="1000000000"):
        add_adapter(model, rank=10**9, alpha=1, targets="attn", family="sd15", seed=0)
