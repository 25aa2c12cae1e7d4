"""Parameters of one group brought together for list kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Length = float | list[float]  # one for the whole batch, or one per tensor
HALF_DTYPES = (torch.float16, torch.bfloat16)
COPIED_ELEMENTS = 1 << 24  # 64 MiB of float32


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
