"""Parameters of one group brought together, and the list kernels of the update rules.

The kernels are torch's fused ones where they can do it, foreach operations elsewhere. The fused ones are private
functions of torch: each call is guarded, and has a fallback that a test compares it with. They read memory linearly, so
they are used for contiguous tensors only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

Length = float | list[float]  # one for the whole batch, or one per tensor
HALF_DTYPES = (torch.float16, torch.bfloat16)
COPIED_ELEMENTS = 1 << 24  # 64 MiB of float32
Tensors = list[Tensor] | tuple[Tensor, ...]
CHUNK_ELEMENTS = 1 << 16  # 256 KiB of float32: a chunk of weights, gradients, momentum and direction fits a cache
_FAR = 1e12  # a step so late that AdamW's bias corrections 1 - beta**step are exactly 1
_REFUSALS = (AttributeError, NotImplementedError, RuntimeError, TypeError)


@dataclass
class Batch:
    """Tensors that are updated together.

    `params` are what the update rule writes to: the parameters, or float32 copies of half-precision ones (then
    `targets` holds the parameters). `state` holds one list per slot. `eta` is the step length, `decay` the share of
    the weights that decay takes. `linear`: all tensors are contiguous, so torch's fused kernels may be used.
    `as_factor`: decay is published as p *= 1 - decay, whose factor is rounded to float32 (else p += -decay p).
    """

    params: list[Tensor]
    grads: list[Tensor]
    eta: Length
    decay: Length
    linear: bool
    as_factor: bool = True
    targets: list[Tensor] | None = None
    state: dict[str, list[Tensor]] = field(default_factory=dict)

    def write_back(self) -> None:
        """Round float32 copies back into the half-precision parameters."""
        if self.targets is not None:
            torch._foreach_copy_(self.targets, self.params)


def state_dtype(param: Tensor) -> torch.dtype:
    """Optimizer state is float32 for half-precision parameters, else the parameter's own dtype."""
    return torch.float32 if param.dtype in HALF_DTYPES else param.dtype


def fill(
    states: list[dict[str, Tensor]], batch: Batch, originals: list[Tensor], slots: tuple[str, ...], shadow: bool
) -> None:
    """Give a batch its state tensors, made at a parameter's first step.

    Args:
        states: the optimizer's state of each parameter, filled where a slot is missing.
        batch: gets `state`.
        originals: the parameters.
        slots: names of the tensors that start at zero.
        shadow: with a slow copy of the weights.
    """
    for state, param, linear in zip(states, originals, batch.params, strict=True):
        for slot in slots:
            if slot not in state:
                state[slot] = torch.zeros_like(linear, dtype=state_dtype(param))
        if shadow and "shadow" not in state:
            state["shadow"] = linear.detach().clone()
    wanted = (*slots, "shadow") if shadow else slots
    batch.state = {slot: [state[slot] for state in states] for slot in wanted}


def refuse_sparse(grads: Sequence[Sequence[Tensor]]) -> None:
    """Raise RuntimeError where a gradient is sparse."""
    if any(grad.is_sparse for group in grads for grad in group):
        raise RuntimeError("the emo optimizers cannot use sparse gradients: make the embedding with sparse=False")


def gather(
    params: list[Tensor], grads: list[Tensor], eta: Length, decay: Length
) -> Iterator[tuple[list[Tensor], Batch]]:
    """Batches of parameters that have gradients.

    Args:
        params: parameters of one group, each with a dense gradient.
        grads: their gradients.
        eta: step length, one or one per parameter.
        decay: share taken by weight decay, one or one per parameter.

    Yields:
        The parameters of the batch, and the batch without its state. A batch is all that is alike; half-precision
        parameters, which are copied, come in parts of `COPIED_ELEMENTS`.
    """
    for indices, linear in _kinds(params, grads):
        whole = len(indices) == len(params)
        mine = params if whole else [params[i] for i in indices]
        theirs = grads if whole else [grads[i] for i in indices]
        is_half = mine[0].dtype in HALF_DTYPES
        for chunk in chunks(mine, COPIED_ELEMENTS if is_half else None):
            originals = mine[chunk]
            batch = Batch(
                params=originals,
                grads=theirs[chunk],
                eta=[eta[i] for i in indices[chunk]] if isinstance(eta, list) else eta,
                decay=[decay[i] for i in indices[chunk]] if isinstance(decay, list) else decay,
                linear=linear,
            )
            if is_half:
                batch.targets = originals
                batch.params = [p.detach().to(torch.float32) for p in originals]
                batch.grads = [g.to(torch.float32) for g in batch.grads]
            yield originals, batch


def _kinds(params: list[Tensor], grads: list[Tensor]) -> list[tuple[Sequence[int], bool]]:
    """Indices of tensors on one device, of one dtype, and whether they are contiguous; usually there is one kind."""
    if not params:
        return []
    device, dtype = params[0].device, params[0].dtype
    if all(
        p.dtype is dtype and p.device == device and p.is_contiguous() and g.is_contiguous()
        for p, g in zip(params, grads, strict=True)
    ):
        return [(range(len(params)), True)]
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        linear = param.is_contiguous() and grad.is_contiguous()
        kinds.setdefault((param.device, param.dtype, linear), []).append(index)
    return [(indices, linear) for (_, _, linear), indices in kinds.items()]


def chunks(params: list[Tensor], limit: int | None) -> Iterator[slice]:
    """Neighbouring tensors of at most `limit` elements together (one tensor at least); None: all of them."""
    if limit is None:
        yield slice(0, len(params))
        return
    first, total = 0, 0
    for index, param in enumerate(params):
        size = param.numel()
        if index > first and total + size > limit:
            yield slice(first, index)
            first, total = index, 0
        total += size
    yield slice(first, len(params))


# ------------------------------------------------------------ kernels


def correction_at(betas: tuple[float, float], step: int) -> float:
    """What takes the start at zero out of m / sqrt(v) at a step (1, 2, ...): sqrt(1 - b2^step) / (1 - b1^step).

    Kingma and Ba 2015 (arXiv:1412.6980), section 2, the efficient order.
    """
    return math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)


def momentum_descent(batch: Batch, *, betas: tuple[float, float], eps: float, correction: float = 1.0) -> None:
    """AdamW whose bias correction is left to the caller (EmoNavi; EmoSens 3.7.6 and 3.9), in place.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p -= decay p;  p -= eta correction m / (sqrt(v) + eps)

    Args:
        batch: with state "exp_avg" (m) and "exp_avg_sq" (v) and single numbers for eta and decay.
        betas: b1, b2.
        eps: added to the root.
        correction: 1.0 as published, or `correction_at` the step.
    """
    assert isinstance(batch.eta, float)
    m, v = batch.state["exp_avg"], batch.state["exp_avg_sq"]
    device = batch.params[0].device
    eta = batch.eta * correction
    if batch.linear and eta > 0.0 and has_fused_adamw(device.type):
        torch._fused_adamw_(
            batch.params,
            batch.grads,
            m,
            v,
            [],
            [_far_step(device)] * len(m),
            amsgrad=False,
            lr=eta,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=_rounded_decay(batch) / eta,
            eps=eps,
            maximize=False,
        )
        return
    torch._foreach_lerp_(m, batch.grads, 1.0 - betas[0])
    torch._foreach_mul_(v, betas[1])
    torch._foreach_addcmul_(v, batch.grads, batch.grads, 1.0 - betas[1])
    root = torch._foreach_sqrt(v)
    torch._foreach_add_(root, eps)
    _decay(batch.params, batch.decay, batch.as_factor)
    torch._foreach_addcdiv_(batch.params, m, root, -eta)


def descend(batch: Batch, direction: Callable[[slice], Tensors]) -> None:
    """Move along directions, in place: p -= decay p;  p -= eta direction.

    On the CPU this is done in chunks that stay in the cache from the direction's first pass to the last; on other
    devices for all tensors at once, since launches cost more than memory traffic there.

    Args:
        batch: what is moved.
        direction: computes the directions of the tensors in a slice of the batch; they may be overwritten.
    """
    params, eta, decay = batch.params, batch.eta, batch.decay
    device = params[0].device.type
    parts = chunks(params, CHUNK_ELEMENTS if device == "cpu" else None)
    if isinstance(eta, list) or not (batch.linear and eta > 0.0 and has_fused_sgd(device)):
        for part in parts:
            _decay(params[part], decay[part] if isinstance(decay, list) else decay, batch.as_factor)
            _move(params[part], direction(part), eta[part] if isinstance(eta, list) else eta)
        return
    weight_decay = _rounded_decay(batch) / eta
    for part in parts:
        torch._fused_sgd_(
            params[part],
            direction(part),
            [],
            weight_decay=weight_decay,
            momentum=0.0,
            lr=eta,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


def _move(params: list[Tensor], directions: Tensors, eta: Length) -> None:
    if isinstance(eta, list):
        torch._foreach_mul_(directions, [-length for length in eta])
        torch._foreach_add_(params, directions)
    else:
        torch._foreach_add_(params, directions, alpha=-eta)


def _decay(params: list[Tensor], decay: Length, as_factor: bool) -> None:
    """Weight decay in the order of the published code."""
    if isinstance(decay, list):
        if any(decay) and as_factor:
            torch._foreach_mul_(params, [1.0 - share for share in decay])
        elif any(decay):
            torch._foreach_add_(params, torch._foreach_mul(params, [-share for share in decay]))
    elif decay and as_factor:
        torch._foreach_mul_(params, 1.0 - decay)
    elif decay:
        torch._foreach_add_(params, params, alpha=-decay)


def _rounded_decay(batch: Batch) -> float:
    """The decay with which a fused kernel gets what the factor 1 - decay gives after its rounding to float32."""
    assert isinstance(batch.decay, float)
    if not batch.as_factor or batch.params[0].dtype != torch.float32:
        return batch.decay
    factor: float = struct.unpack("f", struct.pack("f", 1.0 - batch.decay))[0]
    return 1.0 - factor


@cache
def has_fused_adamw(device_type: str) -> bool:
    """Whether this torch has the fused AdamW kernel, in the form that is called here."""
    p, g, m, v, far = (torch.zeros(1, device=device_type) for _ in range(5))
    try:
        torch._fused_adamw_(
            [p],
            [g],
            [m],
            [v],
            [],
            [far + _FAR],
            amsgrad=False,
            lr=0.1,
            beta1=0.9,
            beta2=0.9,
            weight_decay=0.0,
            eps=1.0,
            maximize=False,
        )
    except _REFUSALS:
        return False
    return True


@cache
def has_fused_sgd(device_type: str) -> bool:
    """Whether this torch has the fused SGD kernel, in the form that is called here."""
    p, g = (torch.zeros(1, device=device_type) for _ in range(2))
    try:
        torch._fused_sgd_(
            [p],
            [g],
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=0.1,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
    except _REFUSALS:
        return False
    return True


@cache
def _far_step(device: torch.device) -> Tensor:
    return torch.full((), _FAR, dtype=torch.float32, device=device)


def l1_norm(params: list[Tensor]) -> Tensor:
    """Sum of the L1 norms, a float32 number on the first tensor's device."""
    device = params[0].device
    norms = torch._foreach_norm(params, 1, dtype=torch.float32)
    return torch.stack([norm.to(device) for norm in norms]).sum()
