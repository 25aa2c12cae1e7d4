"""The adapter on a live model: start, switch, weights in and out, stacking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny_models import clip, output, randomised, tiny, trained

from emotrain.errors import ConfigError, ModelError
from emotrain.lora.adapter import adapter_like, add_adapter, stack_frozen

# SDXL's UNet has no kind of module that those of SD 1.5 and of the transformers do not have
FAMILIES = ["sd15", pytest.param("sdxl", marks=pytest.mark.slow), "sd3", "flux"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_lora_changes_nothing_and_touches_no_global_generator(
    family: str, rng_untouched: Callable[[], bool]
) -> None:
    model = tiny(family)
    base = output(family, model)
    add_adapter(model, rank=4, alpha=4, targets="all", family=family, seed=1)
    assert torch.equal(output(family, model), base)
    assert rng_untouched()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    states = [
        add_adapter(tiny("sd15"), rank=4, alpha=4, targets="all", family="sd15", seed=seed).state()
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_down_starts_uniform_within_one_over_root_fan_in() -> None:
    adapter = add_adapter(tiny("sd15"), rank=8, alpha=8, targets="all", family="sd15", seed=1)
    for key, value in adapter.state().items():
        if key.endswith("lora_B.weight"):
            assert not value.any()
            continue
        bound = value[0].numel() ** -0.5
        assert value.abs().max() <= bound
        assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.25)


def test_weights_are_float32_on_a_bfloat16_base_and_only_they_are_trained() -> None:
    model = tiny("sd15").to(torch.bfloat16)
    adapter = add_adapter(model, rank=4, alpha=4, targets="attn", family="sd15", seed=1)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    text = torch.randn(1, 5, 24, dtype=torch.bfloat16)
    model(torch.randn(1, 4, 8, 8, dtype=torch.bfloat16), 10, text).sample.float().square().mean().backward()
    ups = [p for key, p in adapter.named_parameters() if "lora_B" in key]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in ups)


@pytest.mark.parametrize("family", FAMILIES)
def test_off_gives_the_base_and_afterwards_everything_is_as_before(family: str) -> None:
    t = trained(family)
    with t.adapter.off():
        assert torch.equal(output(family, t.model), t.base)
    assert torch.equal(output(family, t.model), t.live)
    assert all(p.requires_grad for p in t.adapter.parameters())


def test_off_ends_also_when_the_block_raises() -> None:
    t = trained("sd15")
    with pytest.raises(KeyError), t.adapter.off():
        raise KeyError
    assert torch.equal(output("sd15", t.model), t.live)


def test_state_goes_out_and_in_without_a_change() -> None:
    t = trained("flux")
    state = t.adapter.state()
    other = add_adapter(tiny("flux"), rank=4, alpha=2, targets="all", family="flux", seed=9)
    other.load_state(state)
    assert all(torch.equal(state[key], value) for key, value in other.state().items())
    assert state.keys() == dict(t.adapter.named_parameters()).keys()
    state[next(iter(state))].zero_()
    assert next(iter(t.adapter.state().values())).any(), "state() must hand out copies"


def test_a_state_with_other_names_or_shapes_is_refused() -> None:
    t = trained("sd15")
    state = t.adapter.state()
    first = next(iter(state))
    with pytest.raises(ModelError, match="1 names differ"):
        t.adapter.load_state({key: value for key, value in state.items() if key != first})
    with pytest.raises(ModelError, match="shape"):
        t.adapter.load_state({**state, first: state[first][:2]})


def test_modules_of_another_rank_keep_the_strength() -> None:
    model = tiny("sd15")
    adapter = add_adapter(
        model, rank=8, alpha=4, targets="all", conv_rank=2, rank_pattern={r"attn2": 16}, family="sd15", seed=1
    )
    ranks, alphas = adapter.ranks(), adapter.alphas()
    assert {alphas[path] / ranks[path] for path in ranks} == {0.5}
    assert all(ranks[path] == 2 for path in ranks if path.endswith(("conv1", "conv2", "samplers.0.conv")))
    assert all(ranks[path] == 16 for path in ranks if ".attn2." in path)
    assert all(ranks[path] == 8 for path in ranks if ".attn1." in path or path.endswith("proj_in"))
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            assert module.scaling["default"] == 0.5
            assert module.lora_A["default"].weight.shape[0] == ranks[path]


def test_a_rank_pattern_without_a_match_is_an_error() -> None:
    with pytest.raises(ConfigError, match="rank_pattern"):
        add_adapter(tiny("sd15"), rank=4, alpha=4, targets="attn", rank_pattern={"conv1": 2}, family="sd15", seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_continuing_from_a_state_gives_the_same_model_and_it_trains(family: str) -> None:
    t = trained(family, conv_rank=2) if family in ("sd15", "sdxl") else trained(family)
    model = tiny(family)
    adapter = adapter_like(model, t.adapter.file_state(), t.adapter.file_alphas(), family=family)
    assert torch.equal(output(family, model), t.live)
    assert adapter.ranks() == t.adapter.ranks()
    assert (adapter.rank, adapter.alpha) == (4, 2.0)
    assert all(p.requires_grad for p in adapter.parameters())


def test_a_lora_for_another_model_is_refused_before_anything_is_changed() -> None:
    t = trained("sdxl")
    model = tiny("sd15")
    with pytest.raises(ModelError, match="not in this unet"):
        adapter_like(model, t.adapter.file_state(), t.adapter.file_alphas(), family="sd15")
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_loras_add_up_and_their_order_does_not_matter(family: str) -> None:
    first = trained(family, targets="attn")
    second = trained(family, targets="all", rank=2, alpha=5.0)
    loras = [(t.adapter.file_state(), t.adapter.file_alphas(), w) for t, w in ((first, 0.8), (second, -0.5))]
    part = first.adapter.part
    outputs = []
    for order in (loras, loras[::-1]):
        model = tiny(family)
        stack_frozen(model, order, part=part)
        outputs.append(output(family, model))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    model = tiny(family)
    _add_by_hand(model, loras)
    assert torch.allclose(outputs[0], output(family, model), atol=1e-5)
    assert (outputs[0] - first.base).abs().max() > 1e-3


def test_a_new_lora_on_a_stack_leaves_it_frozen_and_off_leaves_it_on() -> None:
    earlier = trained("sd15", targets="attn")
    model = tiny("sd15")
    stack_frozen(model, [(earlier.adapter.file_state(), earlier.adapter.file_alphas(), 1.0)], part="unet")
    stacked = output("sd15", model)
    assert torch.allclose(stacked, earlier.live, atol=1e-6)
    adapter = add_adapter(model, rank=2, alpha=2, targets="all", family="sd15", seed=1)
    assert torch.equal(output("sd15", model), stacked)
    randomised(adapter)
    assert not torch.allclose(output("sd15", model), stacked, atol=1e-3)
    with adapter.off():
        assert torch.equal(output("sd15", model), stacked)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}
    assert adapter.state().keys() == dict(adapter.named_parameters()).keys()
    assert all("base_layer" not in key for key in adapter.state())


def test_fifty_files_and_the_same_file_twice_stack() -> None:
    t = trained("sd15", targets="attn", rank=1)
    item = (t.adapter.file_state(), t.adapter.file_alphas())
    model = tiny("sd15")
    stack_frozen(model, [(*item, 0.02)] * 50, part="unet")
    assert torch.allclose(output("sd15", model), t.live, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1e9])
def test_any_finite_weight_stacks(weight: float) -> None:
    t = trained("sd15", targets="attn")
    model = tiny("sd15")
    stack_frozen(model, [(t.adapter.file_state(), t.adapter.file_alphas(), weight)], part="unet")
    assert torch.equal(output("sd15", model), t.base) == (weight == 0.0)


def test_a_stack_that_cannot_be_applied_is_refused() -> None:
    t = trained("sd15", targets="attn")
    state, alphas = t.adapter.file_state(), t.adapter.file_alphas()
    with pytest.raises(ModelError, match="nan"):
        stack_frozen(tiny("sd15"), [(state, alphas, float("nan"))], part="unet")
    with pytest.raises(ModelError, match="no weights for this transformer"):
        stack_frozen(tiny("flux"), [(state, alphas, 1.0)], part="transformer")
    with pytest.raises(ModelError, match="not in this unet"):
        stack_frozen(tiny("sdxl"), [(state, alphas, 1.0)], part="unet")


@pytest.mark.parametrize("projected", [False, True])
def test_text_encoders_are_chosen_by_path_and_named_as_in_files(projected: bool) -> None:
    encoder = clip(projected=projected)
    adapter = add_adapter(
        encoder,
        rank=4,
        alpha=4,
        targets="attn-mlp",
        family="sdxl",
        seed=1,
        part="text_encoder_2" if projected else "text_encoder",
    )
    assert adapter.num_modules == 12
    part = adapter.part
    assert f"{part}.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in adapter.file_state()
    assert all(key.startswith(f"{part}.text_model.encoder.layers.") for key in adapter.file_state())
    randomised(adapter)
    fresh = clip(projected=projected)
    again = adapter_like(fresh, adapter.file_state(), adapter.file_alphas(), family="sdxl", part=part)
    ids = torch.tensor([[48, 3, 4, 49]])
    assert torch.equal(encoder(ids)[0], fresh(ids)[0])
    again.load_state(adapter.file_state())
    assert not torch.equal(encoder(ids)[0], clip(projected=projected)(ids)[0])


def _add_by_hand(model: torch.nn.Module, loras: list[tuple[dict, dict, float]]) -> None:
    """W + w alpha / rank B A, on the weights themselves."""
    with torch.no_grad():
        for state, alphas, weight in loras:
            for name, alpha in alphas.items():
                down, up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
                layer = model.get_submodule(name.split(".", 1)[1])
                delta = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
                layer.weight += weight * alpha / down.shape[0] * delta
