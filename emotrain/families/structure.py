"""A model's pass on the meta device, where it has shapes and no numbers, through code that looks at masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def by_masks(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation on meta tensors gives where a mask on the CPU decides it; NotImplemented for other operations.

    Qwen-Image 2.1 places its tokens by such a mask.
    """
    first = args[0] if args else None
    if not isinstance(first, Tensor) or not any(isinstance(one, Tensor) and one.is_meta for one in args):
        return NotImplemented
    counts = args[1] if len(args) > 1 else None
    if (
        func in (torch.repeat_interleave, Tensor.repeat_interleave)
        and isinstance(counts, Tensor)
        and not counts.is_meta
    ):
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        return first.index_select(dim, torch.empty(int(counts.sum()), dtype=torch.long, device="meta"))
    if func is torch.where and not first.is_meta:
        return torch.where(first.to("meta"), *args[1:])
    if func is Tensor.__setitem__:
        return None
    return NotImplemented
