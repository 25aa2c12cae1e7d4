"""The LoRA's forward and backward of our own, for a base in half precision.

y = W x + s B A x with s = alpha / rank (Hu et al. 2021, arXiv:2106.09685). peft casts x to float32 and back around
every product, and autocast casts the weights again at every call: on a GPU most of a step's launches are such casts.
Here the float32 weights lie in one buffer with a copy in the base's dtype beside it, refreshed by one launch before
each forward pass of the model; the product of the base and the two small ones are one autograd function; and the
gradients are summed in a buffer of the base's dtype, which `HalfLora.collect` adds to the float32 gradients, again in
one launch. Layers that are given the same tensor, such as those of queries, keys and values, are computed together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

QUERIES_KEYS_VALUES = re.compile(r"(.*\.|)(to_|add_|)[qkv](_proj|)")


class HalfWeights:
    """Trained weights in one float32 buffer, with a copy and a buffer of gradients in the base's dtype.

    The parameters become views of the buffer; their values, names and gradients' meaning stay as they are.

    Args:
        model: what the weights are in; its forward pass brings the copy up to date first.
        holders: modules whose `weight` is trained.
        dtype: of the base's arithmetic, bfloat16 or float16.
    """

    def __init__(self, model: nn.Module, holders: Sequence[Any], dtype: torch.dtype) -> None:
        self.dtype = dtype
        flat = [holder.weight.detach().reshape(-1) for holder in holders]
        self.master = torch.cat(flat) if flat else torch.zeros(0)  # convolutions alone have none here
        self.gradient = torch.zeros_like(self.master[:0])
        self.low, self.grads = self.master.to(dtype), torch.zeros_like(self.master, dtype=dtype)
        self.parameters: list[nn.Parameter] = []
        shapes = [holder.weight.shape for holder in holders]
        self._low = _views(self.low, shapes)
        self.pieces = list(zip(self._low, _views(self.grads, shapes), strict=True))  # (copy, gradients) of each holder
        for holder, view in zip(holders, _views(self.master, shapes), strict=True):
            holder.weight = nn.Parameter(view, holder.weight.requires_grad)
            self.parameters.append(holder.weight)
        model.register_forward_pre_hook(lambda *_: self.refresh())

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the half-precision copy up to date."""
        if not self.parameters:
            return
        shown = self.parameters[0].untyped_storage()._cdata
        if shown == self.master.untyped_storage()._cdata:
            self.low.copy_(self.master)
        else:  # the average of the weights is shown: other memory
            torch._foreach_copy_(self._low, list[Tensor](self.parameters))

    def forget(self) -> None:
        """Let go of what a pass that did not come to its end has left: nothing here."""

    @torch.no_grad()
    def collect(self) -> None:
        """Add what the backward pass summed to the parameters' float32 gradients."""
        if not self.parameters:
            return
        if self.parameters[0].grad is None:
            self.gradient = torch.zeros_like(self.master)
            views = _views(self.gradient, [parameter.shape for parameter in self.parameters])
            for parameter, view in zip(self.parameters, views, strict=True):
                parameter.grad = view
        self.gradient.add_(self.grads)
        self.grads.zero_()


class HalfLora(HalfWeights):
    """The trained weights of a LoRA, and the half-precision forward of its layers.

    Args:
        model: what the layers are in.
        layers: path -> peft layer; they get the forward of this module.
        name: the trained adapter's name within peft.
        dtype: of the base's arithmetic, bfloat16 or float16.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LoraLayer], name: str, dtype: torch.dtype) -> None:
        held = list(layers.values())
        downs = [layer.lora_A[name] for layer in held]  # side by side, so that those of one input are one matrix
        super().__init__(model, [*downs, *(layer.lora_B[name] for layer in held)], dtype)
        halves = [
            _Half(layer, name, *pieces, *others)
            for layer, pieces, others in zip(held, self.pieces[: len(held)], self.pieces[len(held) :], strict=True)
        ]
        for half in halves:
            of_kind = _forward if isinstance(half.layer.get_base_layer(), nn.Linear) else _conv_forward
            half.layer.forward = MethodType(of_kind(self, half), half.layer)
            _freeze_in(dtype, half.layer, name)
        runs = groupby(zip(layers, halves, strict=True), key=lambda one: _role(*one))
        of_role = [[half for _, half in run] for role, run in runs if role is not None]
        self.groups = [_Together(self, members) for members in of_role if len(members) > 1]

    def forget(self) -> None:
        """Let go of what a pass that did not come to its end has left."""
        for group in self.groups:
            group.given, group.waiting = None, {}


def _role(path: str, half: _Half) -> tuple[Any, ...] | None:
    """What layers of one input have in common by their names: queries, keys and values of one attention."""
    found = QUERIES_KEYS_VALUES.fullmatch(path)
    return (*found.groups(), half.down.shape[1]) if found is not None and half.down.ndim == 2 else None


class _Half:
    """One layer: its LoRA's matrices in half precision, and what their gradients are added to."""

    def __init__(self, layer: Any, name: str, down: Tensor, down_grad: Tensor, up: Tensor, up_grad: Tensor) -> None:
        self.layer, self.name = layer, name
        self.down, self.down_grad, self.up, self.up_grad = down, down_grad, up, up_grad
        self.group: _Together | None = None

    @property
    def master(self) -> Tensor:
        """A in float32."""
        weight: Tensor = self.layer.lora_A[self.name].weight
        return weight

    @property
    def scale(self) -> float:
        """The strength of B A: alpha / rank."""
        return float(self.layer.scaling[self.name])

    def is_plain(self) -> bool:
        """Whether it is a common Linear layer with this LoRA alone."""
        base = self.layer.base_layer
        simple = type(base) is nn.Linear and not base._forward_pre_hooks and not base._forward_hooks
        return simple and not self.layer.disable_adapters and list(self.layer.active_adapters) == [self.name]


class _Together:
    """Layers that are given the same tensor, one after the other: all are computed when the first of them is called.

    One that is given another tensor all the same is computed for that one.
    """

    def __init__(self, lora: HalfLora, members: list[_Half]) -> None:
        self.members, self.ranks = members, [len(half.down) for half in members]
        start, width = members[0].down.storage_offset(), members[0].down.shape[1]
        end = start + sum(self.ranks) * width
        self.down, self.down_grad = lora.low[start:end].view(-1, width), lora.grads[start:end].view(-1, width)
        self.given: Tensor | None = None
        self.waiting: dict[_Half, Tensor] = {}
        for half in members:
            half.group = self

    def is_plain(self) -> bool:
        """Whether all may be computed together now."""
        return all(half.is_plain() for half in self.members) and len({half.scale for half in self.members}) == 1

    def output(self, half: _Half, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What the layer makes of `x` in `dtype`; None where all cannot be computed together now."""
        if not (x is self.given and half in self.waiting):
            if not self.is_plain():
                return None
            made = _Joint.apply(x.to(dtype), self, *(one.master for one in self.members))  # type: ignore[no-untyped-call]
            self.given, self.waiting = x, dict(zip(self.members, made, strict=True))
        y = self.waiting.pop(half)
        if not self.waiting:
            self.given = None
        return y


def _views(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """One buffer as tensors of these shapes, one after the other."""
    pieces = torch.split(flat, [shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _freeze_in(dtype: torch.dtype, layer: LoraLayer, trained: str) -> None:
    """Adapters that are not trained are kept in the base's dtype: no cast at every call."""
    for holders in (layer.lora_A, layer.lora_B):
        for key, holder in holders.items():
            if key != trained:
                holder.weight = nn.Parameter(holder.weight.detach().to(dtype), requires_grad=False)


def _forward(lora: HalfLora, half: _Half) -> Any:
    """The forward of one linear layer."""
    name = half.name

    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        together = half.group if torch.is_grad_enabled() and not torch.compiler.is_compiling() else None
        if together is not None and (joint := together.output(half, x, lora.dtype)) is not None:
            return joint
        active = [] if layer.disable_adapters else layer.active_adapters
        base = layer.base_layer
        x = x.to(lora.dtype)
        if name not in active:
            return _with_frozen(layer, x, base(x), [key for key in active if key in layer.lora_A])
        frozen = [key for key in active if key != name and key in layer.lora_A]
        weights = (half.master, half.down, half.down_grad, half.up, half.up_grad, layer.scaling[name])
        if type(base) is nn.Linear and not base._forward_pre_hooks and not base._forward_hooks:
            y: Tensor = _Linear.apply(x, base.weight, base.bias, *weights)  # type: ignore[no-untyped-call]
        else:  # a quantised base, one that is away from the device between its turns, or one with a frozen LoKr
            y = base(x) + _Delta.apply(x, *weights)  # type: ignore[no-untyped-call]
        return _with_frozen(layer, x, y, frozen)

    return forward


def _with_frozen(layer: Any, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    for key in names:
        small = functional.linear(x, layer.lora_A[key].weight)
        y = y + functional.linear(small, layer.lora_B[key].weight) * layer.scaling[key]
    return y


def _conv_forward(lora: HalfLora, half: _Half) -> Any:
    """The forward of one convolution."""
    name, matrices = half.name, (half.down, half.down_grad, half.up, half.up_grad)

    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = layer.base_layer(x, *args, **kwargs)
        for key in [] if layer.disable_adapters else layer.active_adapters:
            if key not in layer.lora_A:
                continue
            a, b, scale = layer.lora_A[key], layer.lora_B[key], layer.scaling[key]
            how = (a.stride, a.padding, a.dilation, a.groups)
            if key == name:
                y = y + _ConvDelta.apply(x.to(lora.dtype), a.weight, *matrices, scale, how)  # type: ignore[no-untyped-call]
            else:
                y = y + functional.conv2d(functional.conv2d(x, a.weight, None, *how), b.weight) * scale
        return y

    return forward


class _Linear(torch.autograd.Function):
    """W x + bias + s B A x, the base's product and the LoRA's in three launches; five more in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, master: Tensor, down: Tensor, down_grad: Tensor,
        up: Tensor, up_grad: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        small = rows @ down.t()
        y = functional.linear(rows, weight, bias).addmm_(small, up.t(), alpha=scale)
        ctx.save_for_backward(rows, small, weight, down, up)
        ctx.grads, ctx.scale, ctx.shape = (down_grad, up_grad), scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, small, weight, down, up = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        back = _gradients(ctx, grad, rows, small, up)
        if not ctx.needs_input_grad[0]:
            return (None,) * 9
        return ((grad @ weight).addmm_(back, down, alpha=ctx.scale).view(ctx.shape), *(None,) * 8)


class _Joint(torch.autograd.Function):
    """`_Linear` of several layers with one input: one product with all of their A, one sum of the input's gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, together: _Together, *masters: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        small = rows @ together.down.t()  # [N, all ranks]
        ys = []
        for half, part in zip(together.members, torch.split(small, together.ranks, 1), strict=True):
            base = half.layer.base_layer
            y = functional.linear(rows, base.weight, base.bias).addmm_(part, half.up.t(), alpha=half.scale)
            ys.append(y.view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, small, together.down, *(half.up for half in together.members))
        ctx.weights = [half.layer.base_layer.weight for half in together.members]
        ctx.together, ctx.scale, ctx.shape = together, together.members[0].scale, x.shape
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, small, down, *ups = ctx.saved_tensors
        together, scale = ctx.together, ctx.scale
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        backs = torch.empty_like(small)
        parts = zip(
            together.members, flat, ups, *(torch.split(t, together.ranks, 1) for t in (small, backs)), strict=True
        )
        for half, grad, up, part, back in parts:
            torch.mm(grad, up, out=back)
            half.up_grad.addmm_(grad.t(), part, alpha=scale)
        together.down_grad.addmm_(backs.t(), rows, alpha=scale)
        nothing = (None,) * (1 + len(flat))
        if not ctx.needs_input_grad[0]:
            return (None, *nothing)
        of_x = flat[0] @ ctx.weights[0]
        for grad, weight in zip(flat[1:], ctx.weights[1:], strict=True):
            of_x.addmm_(grad, weight)
        return (of_x.addmm_(backs, down, alpha=scale).view(ctx.shape), *nothing)


class _Delta(torch.autograd.Function):
    """s B A x alone, beside a base that has its own arithmetic."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, master: Tensor, down: Tensor, down_grad: Tensor, up: Tensor, up_grad: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        small = rows @ down.t()
        ctx.save_for_backward(rows, small, down, up)
        ctx.grads, ctx.scale, ctx.shape = (down_grad, up_grad), scale, x.shape
        return torch.mul(small @ up.t(), scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, small, down, up = ctx.saved_tensors
        back = _gradients(ctx, grad.reshape(-1, grad.shape[-1]), rows, small, up)
        if not ctx.needs_input_grad[0]:
            return (None,) * 7
        return (torch.mul(back @ down, ctx.scale).view(ctx.shape), *(None,) * 6)


class _ConvDelta(torch.autograd.Function):
    """s B * (A * x) of a convolution A [rank, in, kh, kw] and a pointwise one B [out, rank, 1, 1]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, master: Tensor, down: Tensor, down_grad: Tensor, up: Tensor, up_grad: Tensor, scale: float,
        how: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        small = functional.conv2d(x, down, None, *how)
        ctx.save_for_backward(x, small, down, up)
        ctx.grads, ctx.scale, ctx.how = (down_grad, up_grad), scale, how
        return functional.conv2d(small, up) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, small, down, up = ctx.saved_tensors
        down_grad, up_grad = ctx.grads
        stride, padding, dilation, groups = ctx.how
        of_conv = torch.ops.aten.convolution_backward
        point = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        back, of_up, _ = of_conv(grad * ctx.scale, small, up, None, *point, [True, True, False])
        like_down = (stride, padding, dilation, False, [0, 0], groups)
        of_x, of_down, _ = of_conv(back, x, down, None, *like_down, [ctx.needs_input_grad[0], True, False])
        up_grad.add_(of_up)
        down_grad.add_(of_down)
        return (of_x, *(None,) * 7)


def _gradients(ctx: Any, grad: Tensor, rows: Tensor, small: Tensor, up: Tensor) -> Tensor:
    """Add the gradients of A and B to their buffers; gives grad B, which the gradient of x needs too."""
    down_grad, up_grad = ctx.grads
    back = grad @ up
    up_grad.addmm_(grad.t(), small, alpha=ctx.scale)
    down_grad.addmm_(back.t(), rows, alpha=ctx.scale)
    return back
