"""List kernels of the update rules: torch's fused kernels where they can do it, foreach operations elsewhere.

The fused kernels are private functions of torch: each call is guarded, and has a fallback that a test compares it
with. They read memory linearly, so they are used for contiguous tensors only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from emotrain.optim.batches import Batch, Length, chunks

Tensors = list[Tensor] | tuple[Tensor, ...]
CHUNK_ELEMENTS = 1 << 16  # 256 KiB of float32: a chunk of weights, gradients, momentum and direction fits a cache
_FAR = 1e12  # a step so late that AdamW's bias corrections 1 - beta**step are exactly 1
_REFUSALS = (AttributeError, NotImplementedError, RuntimeError, TypeError)


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
