"""A LoKr on a live model: float32 factors beside the layers, in half precision without casts of the input or autocast.

y = W x + (w1 (x) w2) x. The large matrix is never made: x [.., c * d] is a table [c, d], and the product
w1 x w2^T [a, b] is the output [.., a * b]. Convolutions go the same way, with w2 as the kernel.

A hook on the layer adds it, so that layers of every kind carry one: quantised ones, ones with a peft LoRA around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emotrain.errors import ConfigError
from emotrain.lora.half import HalfWeights
from emotrain.lora.kron import Kron, sizes

Delta = Callable[[Tensor], Tensor]


class Factor(nn.Module):
    """One of the two matrices."""

    def __init__(self, value: Tensor, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(value, requires_grad=trained)


class Lokr(nn.Module):
    """The LoKr of one layer: a child of it, whose hook adds the update to the layer's output.

    Args:
        layer: a Linear or Conv2d of the base; it may be inside an adapter's layer.
        kron: the factors, copied to float32 on the layer's device.
        trained: whether they get gradients.

    Raises:
        ConfigError: a convolution in groups.
    """

    def __init__(self, layer: nn.Module, kron: Kron, *, trained: bool) -> None:
        super().__init__()
        self.convolution: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1:
                raise ConfigError("a convolution in groups cannot carry a LoKr", "leave it out of network.targets")
            self.convolution = {key: getattr(layer, key) for key in ("stride", "padding", "dilation")}
        device = next(layer.parameters()).device
        self.w1, self.w2 = (
            Factor(value.detach().to(device, torch.float32, copy=True).contiguous(), trained)
            for value in (kron.w1, kron.w2)
        )
        self.active = True
        self.product: Delta | None = None  # in half precision, what computes the update

    @property
    def kron(self) -> Kron:
        """The factors as they are now."""
        return Kron(self.w1.weight, self.w2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The update for an input of the layer."""
        if self.product is not None:
            return self.product(x)
        w1, w2 = self.w1.weight.to(x.dtype), self.w2.weight.to(x.dtype)
        return _convolved(x, w1, w2, self.convolution) if self.convolution else _multiplied(x, w1, w2)


def attach(layers: Mapping[str, nn.Module], krons: Mapping[str, Kron], name: str, *, trained: bool) -> dict[str, Lokr]:
    """Give layers their LoKrs: path -> the new child `lokr_<name>` of the layer at that path.

    Raises:
        ConfigError: a layer that cannot carry one.
        ValueError: one of that name is there already.
    """
    made, child = {}, f"lokr_{name}"
    for path, kron in krons.items():
        if hasattr(layers[path], child):
            raise ValueError(f"`{path}` has a LoKr `{name}` already")
        made[path] = lokr = Lokr(layers[path], kron, trained=trained)
        layers[path].add_module(child, lokr)
        layers[path].register_forward_hook(_added(lokr))
    return made


def _added(lokr: Lokr) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + lokr(inputs[0]) if lokr.active else output

    return hook


def empty(shape: tuple[int, ...], factor: int, generator: torch.Generator) -> Kron:
    """A LoKr that changes nothing yet: w1 uniform in +-1/sqrt(its inputs), w2 zero.

    Args:
        shape: (out, in) of the layer, and a convolution's kernel.
        factor: rows and columns of w1 at most, where they divide the layer's.
        generator: of w1.
    """
    (a, b), (c, d) = sizes(shape[0], factor), sizes(shape[1], factor)
    bound = 1.0 / math.sqrt(c)
    return Kron(torch.rand((a, c), generator=generator) * (2.0 * bound) - bound, torch.zeros((b, d, *shape[2:])))


class HalfLokr(HalfWeights):
    """The trained factors of a LoKr, and the half-precision arithmetic of its layers.

    Args:
        model: what the layers are in.
        lokrs: path -> LoKr; the linear ones get the product of this module, convolutions leave theirs to autograd.
        dtype: of the base's arithmetic, bfloat16 or float16.
    """

    def __init__(self, model: nn.Module, lokrs: Mapping[str, Lokr], dtype: torch.dtype) -> None:
        linear = [lokr for lokr in lokrs.values() if not lokr.convolution]
        super().__init__(model, [holder for lokr in linear for holder in (lokr.w1, lokr.w2)], dtype)
        for index, lokr in enumerate(linear):
            lokr.product = self._product(lokr, *self.pieces[2 * index], *self.pieces[2 * index + 1])

    def _product(self, lokr: Lokr, *factors: Tensor) -> Delta:
        def product(x: Tensor) -> Tensor:
            y: Tensor = _Product.apply(x.to(self.dtype), lokr.w1.weight, *factors)  # type: ignore[no-untyped-call]
            return y

        return product


def _multiplied(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """(w1 (x) w2) x for x [..., c * d]."""
    table = x.reshape(-1, w1.shape[1], w2.shape[1])
    return functional.linear(torch.matmul(w1, table), w2).reshape(*x.shape[:-1], -1)


def _convolved(x: Tensor, w1: Tensor, w2: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """The convolution of x [B, c * d, H, W] with the kernel w1 (x) w2."""
    tables = torch.einsum("ac,bcs->bas", w1, x.reshape(x.shape[0], w1.shape[1], -1))
    each = tables.reshape(-1, w2.shape[1], *x.shape[2:])
    y = functional.conv2d(each, w2, **settings)
    return y.reshape(x.shape[0], -1, *y.shape[2:])


class _Product(torch.autograd.Function):
    """(w1 (x) w2) x in two products; the gradients of w1 and w2 are added to their buffers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, master: Tensor, w1: Tensor, w1_grad: Tensor, w2: Tensor, w2_grad: Tensor
    ) -> Tensor:
        table = x.reshape(-1, w1.shape[1], w2.shape[1])
        ctx.save_for_backward(table, w1, w2)
        ctx.grads, ctx.shape = (w1_grad, w2_grad), x.shape
        mixed = _each(w1, table)
        return (mixed.view(-1, w2.shape[1]) @ w2.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, w1, w2 = ctx.saved_tensors
        w1_grad, w2_grad = ctx.grads
        grad = grad.reshape(-1, w2.shape[0])
        w2_grad.addmm_(grad.t(), _each(w1, table).view(-1, w2.shape[1]))
        back = (grad @ w2).view(table.shape[0], w1.shape[0], -1)
        w1_grad.add_(torch.bmm(back, table.transpose(1, 2)).sum(0))
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        return (_each(w1.t(), back).view(ctx.shape), *(None,) * 5)


def _each(matrix: Tensor, tables: Tensor) -> Tensor:
    """The matrix times each of the tables [n, rows, columns]."""
    return torch.bmm(matrix.expand(tables.shape[0], *matrix.shape), tables)
