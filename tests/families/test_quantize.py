"""Quantised layers: near the ones they stand for, forward and backward, with a LoRA on them and without noise."""

from __future__ import annotations

import importlib.util

import make_assets as maker
import pytest
import torch
from torch import nn

from emotrain.families import quantize
from emotrain.families.memory import GIB, weights_gib
from emotrain.families.quantize import RoundedLinear, in_large_linears, make_plain, quantize_linears
from emotrain.lora.half import HalfLora
from emotrain.lora.inject import initialise, install

CPU = torch.device("cpu")
ERRORS = {"fp8": 0.04, "int8": 0.02, "nf4": 0.13}  # of the output, relative; of random weights
BITS = importlib.util.find_spec("bitsandbytes") is not None
KINDS = [
    "fp8",
    "int8",
    pytest.param("nf4", marks=pytest.mark.skipif(not BITS, reason="bitsandbytes is not installed")),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(16, 512), nn.Linear(512, 768), nn.Linear(768, 512, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(self.embed(x))))


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block().requires_grad_(False).to(torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_are_near_those_of_the_layer_itself(kind: str) -> None:
    plain, small = block(), block()
    assert quantize_linears(small, kind, CPU) == 2
    assert type(small.embed) is nn.Linear  # too small to gain anything
    x = torch.randn(32, 16).to(torch.bfloat16)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = small(ours), plain(theirs)
    y.float().pow(2).mean().backward()
    expected.float().pow(2).mean().backward()
    assert (y - expected).float().norm() < 2 * ERRORS[kind] * expected.float().norm()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert (ours.grad - theirs.grad).float().norm() < 5 * ERRORS[kind] * theirs.grad.float().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_trains_on_quantised_layers(kind: str) -> None:
    model = block()
    quantize_linears(model, kind, CPU)
    layers = install(model, {"up": 4, "down": 4}, {"up": 4.0, "down": 4.0}, "default")
    for layer in layers.values():
        initialise(layer, "default", torch.Generator().manual_seed(1))
    half = HalfLora(model, layers, "default", torch.bfloat16)
    weights = [getattr(layer, part)["default"].weight for layer in layers.values() for part in ("lora_A", "lora_B")]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    x = torch.randn(16, 16).to(torch.bfloat16)
    goal = block(seed=7)(x).float()
    losses = []
    for _ in range(12):
        loss = (model(x).float() - goal).pow(2).mean()
        loss.backward()
        half.collect()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_lora_that_is_there_already_keeps_its_own_layers() -> None:
    model = block()
    layers = install(model, {"up": 300}, {"up": 300.0}, "default")
    for layer in layers.values():
        initialise(layer, "default", torch.Generator().manual_seed(1))
    assert quantize_linears(model, "fp8", CPU) == 2
    up = layers["up"]
    assert type(up.get_base_layer()) is RoundedLinear
    assert type(up.lora_A["default"]) is type(up.lora_B["default"]) is nn.Linear
    assert type(model.down) is RoundedLinear


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_take_a_quarter_of_float32_and_no_copy_is_kept_for_the_backward_pass(kind: str) -> None:
    layer = nn.Linear(512, 1024).requires_grad_(False)
    small = RoundedLinear.from_linear(layer, kind)
    assert small.weight.element_size() == 1
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        small(torch.randn(4, 512, requires_grad=True))
    assert max(t.numel() * t.element_size() for t in kept) <= 512 * 1024


def test_weights_that_are_stored_scaled_are_taken_over_as_they_are() -> None:
    weight = torch.randn(300, 280).to(torch.float8_e4m3fn)
    layer = RoundedLinear.from_scaled(weight, torch.tensor(0.25), None, torch.float32)
    x = torch.randn(5, 280)
    torch.testing.assert_close(layer(x), x @ (weight.float() * 0.25).t(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("group", [4, 64])
def test_a_layer_whose_inputs_were_rotated_before_rounding_is_the_plain_one_with_its_gradients(group: int) -> None:
    """By the definition of ConvRot, written out: y = (x R) (scale W)^T, R = H on each group."""
    numbers = torch.randint(-127, 128, (300, 320), dtype=torch.int8)
    scale = torch.rand(300, 1) + 0.1
    layer = RoundedLinear.from_scaled(numbers, scale, None, torch.float32, group)
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    turn = torch.block_diag(*[four if group == 4 else torch.kron(four, torch.kron(four, four))] * (320 // group))
    wanted = (numbers.float() * scale) @ turn.t()
    torch.testing.assert_close(layer.plain().weight, wanted, atol=1e-3, rtol=1e-4)
    assert torch.equal(layer.sampled(7), layer.plain().weight.flatten()[::7])
    x = torch.randn(2, 5, 320, requires_grad=True)
    (given,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad((x @ wanted.t()).square().sum(), x)
    for ours, theirs in ((layer(x), x @ wanted.t()), (given, expected)):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def stored(dtype: torch.dtype = torch.float8_e4m3fn) -> RoundedLinear:
    numbers = torch.randn(300, 280) * 40
    return RoundedLinear.from_scaled(numbers.to(dtype), torch.rand(300, 1) + 0.1, torch.randn(300), torch.bfloat16)


def test_the_timesteps_of_z_image_are_not_rounded_to_its_layers_float8() -> None:
    from diffusers.models.transformers.transformer_z_image import TimestepEmbedder

    embedder = TimestepEmbedder(256, mid_size=1024).requires_grad_(False)
    expected = embedder(torch.tensor([0.3]))
    quantize_linears(embedder, "fp8", CPU)
    assert torch.equal(embedder(torch.tensor([0.3])), expected)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_stored_layer_is_exchanged_for_what_is_asked_for_unless_it_is_that_already(kind: str) -> None:
    """As if the weights that it stands for had been given; those of the same kind are not rounded twice."""
    layer = stored()
    wanted = RoundedLinear.from_linear(layer.plain(), "int8")
    model = nn.Sequential(layer, nn.Linear(300, 290))
    assert quantize_linears(model, kind, CPU) == (2 if kind == "int8" else 1)
    assert torch.equal(model[0].weight.float(), (wanted if kind == "int8" else layer).weight.float())
    assert torch.equal(model[0].scale, (wanted if kind == "int8" else layer).scale)
    assert type(model[1]) is RoundedLinear


def test_where_there_is_no_float8_stored_layers_become_plain() -> None:
    layer = stored()
    model = nn.Sequential(layer, nn.GELU())
    make_plain(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, (layer.weight.float() * layer.scale).to(torch.bfloat16))
    assert torch.equal(model[0].bias, layer.bias)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_a_number_that_is_none_is_seen_in_a_stored_layer(dtype: torch.dtype) -> None:
    layer = stored(dtype)
    layer.plain_dtype = torch.float16
    assert layer.is_finite()
    layer.scale[7] = 1e4  # 40 * 1e4 is more than float16 holds
    assert not layer.is_finite()
    if dtype != torch.int8:
        layer.scale[7] = 1.0
        layer.weight.data[3, 5] = float("nan")
        assert not layer.is_finite()


class Emphasis(nn.Module):
    """A few channels a hundred times as large as the others, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(512))
        self.gain.data[[7, 100]] = torch.tensor([100.0, -50.0])
        self.up = nn.Linear(512, 768, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x * self.gain)


def test_large_channels_do_not_cost_the_others_in_int8() -> None:
    torch.manual_seed(0)
    plain = Emphasis().requires_grad_(False).to(torch.bfloat16)
    x = torch.randn(32, 512).to(torch.bfloat16)
    rounded = x * plain.gain
    by_token = rounded.abs().amax(-1, keepdim=True) / 127  # what a product in int8 makes of the activations
    crushed = plain.up(((rounded / by_token).round() * by_token).to(torch.bfloat16))
    small = Emphasis().requires_grad_(False).to(torch.bfloat16)
    small.load_state_dict(plain.state_dict())
    quantize_linears(small, "int8", CPU)
    expected = plain(x).float()
    without = (plain.up.weight.float()[:, [7, 100]] @ rounded.float()[:, [7, 100]].t()).t()  # what the large ones say
    scale = (expected - without).norm()
    assert (small(x).float() - expected).norm() < 0.3 * (crushed.float() - expected).norm()
    assert (small(x).float() - expected).norm() < 0.3 * scale


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_unet_takes_what_is_counted_for_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good part of it is convolutions, which stay as they are: of SD 1.5 two thirds."""
    monkeypatch.setattr(quantize, "SMALLEST", 32)
    model = maker.build_unet().requires_grad_(False)
    count, linear = sum(p.numel() for p in model.parameters()), in_large_linears(model)
    assert 0.1 * count < linear < 0.9 * count
    quantize_linears(model, kind, CPU)
    scales = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("scale"))
    held = sum(p.nbytes for p in model.parameters()) + scales
    assert weights_gib(count, 4, kind, linear=linear) * GIB == pytest.approx(held, rel=0.02)
    assert weights_gib(count, 4, kind) * GIB < 0.8 * held
