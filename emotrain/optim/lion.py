"""Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """u = sign(b1 m + (1-b1) g);  p -= lr wd p;  p -= lr u;  m = b2 m + (1-b2) g.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: b1, b2.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                direction = torch.lerp(m, p.grad, 1.0 - beta1).sign_()
                p.mul_(1.0 - lr * group["weight_decay"]).sub_(direction, alpha=lr)
                m.lerp_(p.grad, 1.0 - beta2)
        return loss
