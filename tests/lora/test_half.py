"""The half-precision forward gives what peft's gives, its gradients are the right ones, and nothing lags behind."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from emotrain.lora.adapter import Adapter
from emotrain.lora.half import HalfLora
from emotrain.lora.inject import initialise, install, set_weights
from emotrain.optim import EmoSens
from emotrain.optim.averaged import Averaged


class Net(nn.Module):
    """Two linear layers and a convolution; the second input never asks for a gradient, as a caption's does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.conv = nn.Linear(24, 32), nn.Linear(32, 16, bias=False), nn.Conv2d(4, 8, 3)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).float().sum(-1).mean() + self.conv(image).float().pow(2).mean()


def made(dtype: torch.dtype, *, half: bool, frozen: bool = False) -> tuple[Net, dict[str, Any], HalfLora | None]:
    """The same weights each time, on a base in `dtype`."""
    torch.manual_seed(0)
    net = Net().requires_grad_(False).to(dtype)
    ranks = {"first": 4, "second": 4, "conv": 2}
    generator = torch.Generator().manual_seed(1)
    if frozen:
        for layer in install(net, ranks, dict.fromkeys(ranks, 2.0), "stack", trained=False).values():
            filled(layer, "stack", generator)
    layers = install(net, ranks, dict.fromkeys(ranks, 8.0), "default")
    for layer in layers.values():
        initialise(layer, "default", generator)
        filled(layer, "default", generator)
    return net, layers, HalfLora(net, layers, "default", dtype) if half else None


def filled(layer: Any, name: str, generator: torch.Generator) -> None:
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    values = [0.2 * torch.randn(weight.shape, generator=generator) for weight in (down, up)]
    set_weights(layer, name, *values)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, image = torch.randn(3, 5, 24, generator=generator), torch.randn(2, 4, 6, 6, generator=generator)
    return x.to(dtype), image.to(dtype)


def gradients(layers: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{path}.{kind}": getattr(layer, kind)["default"].weight.grad.clone()
        for path, layer in layers.items()
        for kind in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("frozen", [False, True], ids=["alone", "on a stack"])
def test_in_float32_output_and_gradients_are_those_of_peft(frozen: bool) -> None:
    """The function itself is exact; half precision only rounds."""
    net, layers, _ = made(torch.float32, half=False, frozen=frozen)
    expected = net(*inputs(torch.float32))
    expected.backward()
    own, own_layers, half = made(torch.float32, half=True, frozen=frozen)
    assert half is not None
    loss = own(*inputs(torch.float32))
    loss.backward()
    half.collect()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for key, gradient in gradients(own_layers).items():
        torch.testing.assert_close(gradient, gradients(layers)[key], atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_in_bfloat16_gradients_differ_from_float32_by_rounding_alone(checkpointed: bool) -> None:
    net, layers, _ = made(torch.float32, half=False)
    net(*inputs(torch.float32)).backward()
    own, own_layers, half = made(torch.bfloat16, half=True)
    assert half is not None
    run = (lambda *args: checkpoint(own, *args, use_reentrant=False)) if checkpointed else own
    run(*inputs(torch.bfloat16)).backward()
    half.collect()
    for key, gradient in gradients(own_layers).items():
        exact = gradients(layers)[key]
        assert gradient.dtype == torch.float32
        assert (gradient - exact).norm() < 0.02 * exact.norm(), key


def test_two_micro_steps_add_up_and_a_cleared_gradient_begins_anew() -> None:
    own, layers, half = made(torch.float32, half=True)
    assert half is not None
    own(*inputs(torch.float32)).backward()
    half.collect()
    once = gradients(layers)
    own(*inputs(torch.float32)).backward()
    half.collect()
    for key, gradient in gradients(layers).items():
        torch.testing.assert_close(gradient, 2 * once[key])
    for parameter in own.parameters():
        parameter.grad = None
    own(*inputs(torch.float32)).backward()
    assert layers["first"].lora_A["default"].weight.grad is None
    half.collect()
    for key, gradient in gradients(layers).items():
        torch.testing.assert_close(gradient, once[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("change", ["foreach", "copy", "step", "average"])
def test_the_copy_follows_every_change_of_the_weights(change: str) -> None:
    own, layers, half = made(torch.bfloat16, half=True)
    assert half is not None
    before = own(*inputs(torch.bfloat16)).item()
    kinds = ("lora_A", "lora_B")
    weights = [getattr(layer, kind)["default"].weight for layer in layers.values() for kind in kinds]
    if change in ("step", "average"):
        optimizer = Averaged(EmoSens(weights))
        for _ in range(3):
            own(*inputs(torch.bfloat16)).backward()
            half.collect()
            optimizer.observe(1.0)
            optimizer.step()
    with torch.no_grad():
        if change == "foreach":
            torch._foreach_mul_(weights, 0.0)
        elif change == "copy":
            for weight in weights:
                weight.copy_(torch.zeros_like(weight))
    with optimizer.eval_mode() if change == "average" else nullcontext():
        assert own(*inputs(torch.bfloat16)).item() != before
        shown = torch.cat([weight.detach().flatten() for weight in half.parameters])
        assert torch.equal(half.low, shown.to(torch.bfloat16))
    own(*inputs(torch.bfloat16))
    assert torch.equal(half.low, half.master.to(torch.bfloat16))


def test_switched_off_it_is_the_base() -> None:
    own, layers, _ = made(torch.bfloat16, half=True)
    torch.manual_seed(0)
    base = Net().requires_grad_(False).to(torch.bfloat16)
    for layer in layers.values():
        layer.set_adapter([], inference_mode=True)
    assert torch.equal(own(*inputs(torch.bfloat16)), base(*inputs(torch.bfloat16)))


def test_a_base_layer_whose_weight_is_away_between_its_turns_is_called_and_not_read() -> None:
    """Offloading brings the weight in a hook of the layer's own call."""
    own, layers, half = made(torch.bfloat16, half=True)
    assert half is not None
    expected = own(*inputs(torch.bfloat16))
    base = layers["first"].base_layer
    home = base.weight.data
    base.weight.data = torch.zeros_like(home)

    def come(module: Any, args: Any) -> None:
        base.weight.data = home

    base.register_forward_pre_hook(come)
    loss = own(*inputs(torch.bfloat16))
    torch.testing.assert_close(loss, expected, atol=2e-2, rtol=2e-2)
    loss.backward()
    half.collect()
    assert all(value.abs().max() > 0 for value in gradients(layers).values())


class Attending(nn.Module):
    """Queries, keys and values of one tensor, then keys and values of another that asks for no gradient."""

    def __init__(self) -> None:
        super().__init__()
        names = ("enter", "to_q", "to_k", "to_v", "out", "add_k_proj", "add_v_proj")
        for name in names:
            setattr(self, name, nn.Linear(24, 24, bias=name == "to_k"))
        self.names, self.fails, self.other = names, False, False

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        q = self.to_q(x)
        if self.fails:
            raise torch.OutOfMemoryError
        y = self.out(q * self.to_k(2 * x if self.other else x) + self.to_v(x).sin())
        return (y * self.add_k_proj(text) + self.add_v_proj(text)).float().pow(2).mean()


def attending() -> tuple[Attending, dict[str, Any], HalfLora, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = Attending().requires_grad_(False)
    ranks = dict.fromkeys(net.names, 4) | {"to_k": 6}
    layers = install(net, ranks, {name: 2.0 * rank for name, rank in ranks.items()}, "default")
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        filled(layer, "default", generator)
    return net, layers, HalfLora(net, layers, "default", torch.float32), (torch.randn(3, 5, 24), torch.randn(3, 5, 24))


def one_pass(net: Any, layers: Any, half: HalfLora, given: Any, checkpointed: bool = False) -> tuple[Any, Any]:
    """Loss and gradients of a step."""
    for layer in layers.values():
        for kind in ("lora_A", "lora_B"):
            getattr(layer, kind)["default"].weight.grad = None
    loss = checkpoint(net, *given, use_reentrant=False) if checkpointed else net(*given)
    loss.backward()
    half.collect()
    return loss.detach(), gradients(layers)


class Counted(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += str(func).startswith(("aten.mm", "aten.addmm"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_of_one_input_are_computed_together(checkpointed: bool) -> None:
    net, layers, half, given = attending()
    assert [[len(group.members), sum(group.ranks)] for group in half.groups] == [[3, 14], [2, 8]]
    with Counted() as first:
        together = one_pass(net, layers, half, given, checkpointed)
    assert not any(group.waiting for group in half.groups)
    for group in half.groups:
        for one in group.members:
            one.group = None
    with Counted() as second:
        apart = one_pass(net, layers, half, given, checkpointed)
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    # A's products and their gradients, and two of those of the input of queries, keys and values; A's again
    assert second.products - first.products == 3 + 3 + 2 + (3 if checkpointed else 0)


def test_an_input_of_another_dtype_is_cast_once_for_all_layers() -> None:
    net, layers, _, given = attending()
    half = HalfLora(net.to(torch.bfloat16), layers, "default", torch.bfloat16)
    net.enter.register_forward_hook(lambda module, inputs, output: output.float())
    net.out.register_forward_hook(lambda module, inputs, output: output.to(torch.bfloat16))
    with Counted() as first:
        one_pass(net, layers, half, [one.to(torch.bfloat16) for one in given])
    for group in half.groups:
        for one in group.members:
            one.group = None
    with Counted() as second:
        one_pass(net, layers, half, [one.to(torch.bfloat16) for one in given])
    assert second.products - first.products == 3 + 3 + 2


def test_keys_of_another_tensor_than_the_queries_are_computed_of_it() -> None:
    net, layers, half, given = attending()
    net.other = True
    together = one_pass(net, layers, half, given)
    for group in half.groups:
        for one in group.members:
            one.group = None
    torch.testing.assert_close(together, one_pass(net, layers, half, given), atol=1e-6, rtol=1e-5)


def test_a_layer_whose_base_does_more_is_computed_by_itself_and_so_are_those_beside_it() -> None:
    net, layers, half, given = attending()
    layers["to_v"].base_layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    together = one_pass(net, layers, half, given)
    for group in half.groups:
        for one in group.members:
            one.group = None
    torch.testing.assert_close(together, one_pass(net, layers, half, given), atol=1e-6, rtol=1e-5)


def test_what_a_pass_without_an_end_has_left_goes_with_its_gradients() -> None:
    net, layers, half, given = attending()
    one_pass(net, layers, half, given)
    net.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        net(*given)
    assert half.groups[0].waiting
    adapter = Adapter(layers, name="default", part="unet", family="sd15", rank=4, alpha=8.0)
    adapter._halves.append(half)
    adapter.drop_gradients()
    assert not half.groups[0].waiting
    assert half.groups[0].given is None
