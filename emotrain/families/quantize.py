"""Frozen Linear layers in fewer bits: swapped one by one on a model that is loaded as it is.

Libraries that quantise while they load want to know the file's layout, and take a single checkpoint file for one that
is quantised already. Here a model comes from a folder or a single file alike, and its layers are exchanged afterwards:
`nf4` (Dettmers et al. 2023, arXiv:2305.14314) by bitsandbytes' layer, `int8` and `fp8` (e4m3) by one of our own:
numbers with a scale for each output, taken back to the model's dtype in the forward pass. The activations stay as they
are. (bitsandbytes' int8 layer rounds them too, each token by its largest number, after a cast to float16: where a few
channels are much larger than the others, as in language models, the others are lost.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SMALLEST = 257  # a layer with fewer inputs or outputs stays as it is: embedders (the timestep's 256) and the final one
LORA_HOLDERS = frozenset(("lora_A", "lora_B"))  # peft's modules that hold the Linear layers of its adapters
LARGEST = {"int8": 127.0, "fp8": 448.0}  # number of each kind
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class RoundedLinear(nn.Linear):
    """A frozen Linear whose weights are int8 or float8 (e4m3) numbers times a float32 scale for each output.

    `from_linear` rounds; `from_scaled` takes over weights that are stored like this already. Where the inputs were
    rotated before rounding (ConvRot), what comes in is rotated too.
    """

    scale: Tensor  # float32 [out, 1]
    group: int  # inputs that were rotated together; 0 where none were
    plain_dtype: torch.dtype  # of the weights that the numbers stand for

    @classmethod
    def from_linear(cls, layer: nn.Linear, kind: str) -> RoundedLinear:
        """Round the weights to the nearest number of `kind` (int8 or fp8), each output by its own largest weight."""
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST[kind]
        numbers = weight / scale
        rounded = (numbers.round() if kind == "int8" else numbers).to(DTYPES[kind])
        return cls.from_scaled(rounded, scale, layer.bias, layer.weight.dtype)

    @classmethod
    def from_scaled(
        cls, weight: Tensor, scale: Tensor, bias: Tensor | None, plain_dtype: torch.dtype, group: int = 0
    ) -> RoundedLinear:
        """Weights int8 or float8 [out, in], scale float32 broadcastable to [out, 1], bias [out] or None."""
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], bias=bias is not None)
        made.plain_dtype, made.group = plain_dtype, group
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.register_buffer("scale", scale.detach().float().reshape(-1, 1).expand(weight.shape[0], 1).contiguous())
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear's, in the dtype of `x`."""
        x = rotated(x, self.group) if self.group else x
        y: Tensor = _Product.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def plain(self) -> nn.Linear:
        """The layer that this one stands for."""
        with torch.device("meta"):
            made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = self.weight.detach().float() * self.scale
        weight = (rotated(weight, self.group) if self.group else weight).to(self.plain_dtype)
        made.weight, made.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return made

    def sampled(self, stride: int) -> Tensor:
        """Each `stride`-th of the weights that the numbers stand for, row by row, [n]."""
        if self.group:
            return self.plain().weight.reshape(-1)[::stride]
        numbers = self.weight.detach().reshape(-1)[::stride].float()
        rows = torch.arange(0, self.weight.numel(), stride, device=numbers.device) // self.in_features
        return (numbers * self.scale[rows, 0]).to(self.plain_dtype)

    def is_finite(self) -> bool:
        """Whether all weights are numbers that `plain_dtype` can hold; by the largest of each output."""
        if self.weight.dtype == torch.int8:
            largest = self.weight.detach().short().abs().amax(1)
        else:  # of float8 the bits grow with the number, and what is no number has the largest
            bits = self.weight.detach().view(torch.uint8).bitwise_and(0x7F)
            largest = bits.amax(1).view(self.weight.dtype)
        return bool(torch.isfinite((largest.float() * self.scale[:, 0]).to(self.plain_dtype)).all())


class _Product(torch.autograd.Function):
    """x (scale W)^T; the backward pass takes W back to x's dtype again, so that no copy of it is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, weight.to(x.dtype).mul_(scale))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (grad * scale.to(grad.dtype).t()) @ weight.to(grad.dtype), None, None


def rotated(x: Tensor, group: int) -> Tensor:
    """Weights [out, in] or inputs [..., in] times a Hadamard matrix on each `group` of the last: its own inverse."""
    turned: Tensor = x.reshape(*x.shape[:-1], -1, group) @ _hadamard(group, x.device, x.dtype)
    return turned.reshape(x.shape)


@cache
def _hadamard(group: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A Kronecker power of the regular Hadamard matrix of 4, as ComfyUI's ConvRot has it: [group, group]."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.kron(matrix, four)
    return matrix.to(device, dtype)


class WithoutWeight(nn.Module):
    """A layer whose weight's dtype does not show: transformers' T5 casts what goes into `wo` to it.

    Of float16 it is float32, which holds what comes out.
    """

    weight = None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.float() if x.dtype == torch.float16 else x)
        return y


def quantize_linears(model: nn.Module, kind: str, device: torch.device) -> int:
    """Exchange the large Linear layers of a frozen model and put each on `device`; how many were exchanged.

    The rest of the model stays where it is, a LoRA's own layers as they are, and layers that a file has stored in this
    kind already. Only one layer at a time is on the device in both forms.

    Args:
        model: frozen, with or without a LoRA.
        kind: int8, nf4 or fp8.
        device: where the layers go.
    """
    places = [place for place in base_linears(model) if is_large(place[2].weight.shape)]
    places = [place for place in places if place[2].weight.dtype != DTYPES.get(kind)]
    for parent, name, layer in places:
        plain = layer.plain() if isinstance(layer, RoundedLinear) else layer
        _exchange(parent, name, layer, _quantized(plain, kind, device), device)
    return len(places)


def make_plain(model: nn.Module) -> None:
    """Exchange the layers that a file has stored as numbers times a scale for those that they stand for."""
    for parent, name, layer in base_linears(model):
        if isinstance(layer, RoundedLinear):
            _exchange(parent, name, layer, layer.plain(), layer.weight.device)


def _exchange(parent: nn.Module, name: str, layer: nn.Linear, made: nn.Module, device: torch.device) -> None:
    for child, module in layer.named_children():  # a LoKr hangs on its layer by a hook
        made.add_module(child, module.to(device))
    made._forward_hooks.update(layer._forward_hooks)
    put(parent, name, made)


def put(parent: nn.Module, name: str, layer: nn.Module) -> None:
    """Give a module of the base a layer in fewer bits."""
    of_t5 = name == "wo" and type(parent).__name__.startswith("T5Dense")
    setattr(parent, name, WithoutWeight(layer) if of_t5 else layer)


def is_large(shape: Sequence[int]) -> bool:
    """Whether a Linear's weights [out, in] are worth it."""
    return min(shape) >= SMALLEST


def in_large_linears(model: nn.Module) -> int:
    """How many of a model's parameters `quantize_linears` stores in fewer bits."""
    return sum(layer.weight.numel() for *_, layer in base_linears(model) if is_large(layer.weight.shape))


def base_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """All Linear layers of the base, also rounded ones, not those of LoRAs on it: (parent, name in it, layer)."""
    parents = [module for path, module in model.named_modules() if path.rpartition(".")[2] not in LORA_HOLDERS]
    found = [(parent, name, child) for parent in parents for name, child in parent.named_children()]
    return [(parent, name, child) for parent, name, child in found if type(child) in (nn.Linear, RoundedLinear)]


def _quantized(layer: nn.Linear, kind: str, device: torch.device) -> nn.Module:
    if kind != "nf4":
        return RoundedLinear.from_linear(layer.to(device), kind)
    import bitsandbytes

    bias = layer.bias is not None
    with torch.device("meta"):
        made: nn.Linear = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=bias, compute_dtype=layer.weight.dtype, quant_type="nf4"
        )
    made.weight = bitsandbytes.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
    if bias:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made.to(device).requires_grad_(False)
