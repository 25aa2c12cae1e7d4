"""Other optimizers behind the same interface, to compare with; their libraries are imported when asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emotrain.errors import ConfigError
from emotrain.optim.lion import Lion
from emotrain.optim.state import WrongStateError, reading_from_dict
from emotrain.pulse.signal import Reading, Sensor, observe, start, state_from_dict, state_to_dict

_INSTALL = "pip install emotrain[optimizers]"
Betas = tuple[float, float] | None


class StockOptimizer:
    """An optimizer that is not emo, told the loss for the display only.

    `reading` comes from the sensors of 3.9, its pulse is the learning rate in use; `should_stop` is always False.

    Args:
        name: in the registry.
        inner: the optimizer.
        sensor: see `emotrain.pulse.signal.update_averages`.
    """

    def __init__(self, name: str, inner: torch.optim.Optimizer, sensor: Sensor = "faithful") -> None:
        self.name = name
        self.inner = inner
        self.sensor = sensor
        self.reading: Reading | None = None
        self.should_stop = False
        self._emotion = start("3.9")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def begin(self, loss: float) -> None:
        self._emotion = start("3.9", loss)

    def observe(self, loss: float | Tensor) -> Reading:
        """Tell the mean loss of the step.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
        """
        self._emotion, reading, _ = observe(self._emotion, _plain(loss), sensor=self.sensor)
        self.reading = replace(reading, pulse=self._lr())
        return self.reading

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; the loss is not needed for it."""
        loss = self.inner.step(closure)
        if self.reading is not None:
            self.reading = replace(self.reading, pulse=self._lr())
        return loss

    def rescale(self, scale: float) -> None:
        for group in self.param_groups:
            group["lr"] *= scale

    restart = rescale

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and what its sensors have seen."""
        reading = {} if self.reading is None else vars(self.reading)
        emotion = {
            "optimizer": self.name,
            "state": state_to_dict(self._emotion),
            "reading": dict(reading),
        }
        return {**self.inner.state_dict(), "emotion": emotion}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of the same optimizer.

        Raises:
            WrongStateError: it is of another optimizer.
        """
        emotion = state_dict.get("emotion", {})
        if emotion.get("optimizer") != self.name:
            raise WrongStateError(
                f"this state is of the optimizer `{emotion.get('optimizer', 'unknown')}` and cannot go on in "
                f"`{self.name}`",
                "load it into the optimizer that saved it",
            )
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "emotion"})
        self._emotion = state_from_dict(emotion["state"])
        self.reading = reading_from_dict(emotion["reading"])

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Within it the parameters are the ones to look at and to save (schedule-free: the average)."""
        inner: Any = self.inner
        if not inner.param_groups[0].get("train_mode"):
            yield
            return
        params = [p for group in inner.param_groups for p in group["params"]]
        trained = [p.detach().clone() for p in params]  # `train` comes back to them by rounding alone
        inner.eval()
        try:
            yield
        finally:
            inner.train()
            with torch.no_grad():
                torch._foreach_copy_(params, trained)

    def _lr(self) -> float:
        group = self.inner.param_groups[0]
        if self.name == "prodigy":
            return float(group["lr"]) * float(group["d"])
        return float(group.get("scheduled_lr") or group["lr"])


def _plain(loss: float | Tensor) -> float:
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def adamw(params: Any, *, lr: float, eps: float, betas: Betas, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), torch's own."""
    return torch.optim.AdamW(params, lr=lr, eps=eps, betas=betas or (0.9, 0.999), weight_decay=weight_decay)


def adafactor(params: Any, *, lr: float, eps: float, betas: Betas, weight_decay: float) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), torch's own; eps and betas are its own too."""
    return torch.optim.Adafactor(params, lr=lr, weight_decay=weight_decay)


def lion(params: Any, *, lr: float, eps: float, betas: Betas, weight_decay: float) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023, arXiv:2302.06675); it has no eps."""
    return Lion(params, lr=lr, betas=betas or (0.9, 0.99), weight_decay=weight_decay)


def prodigy(params: Any, *, lr: float, eps: float, betas: Betas, weight_decay: float) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio 2023, arXiv:2306.06101), from prodigyopt, as its authors advise for diffusion.

    That is with bias correction and `safeguard_warmup`; without them its estimate runs away on LoRAs.
    """
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ConfigError("train.optimizer `prodigy` needs the package prodigyopt", _INSTALL) from error
    with redirect_stdout(io.StringIO()):  # its constructor prints
        inner: torch.optim.Optimizer = Prodigy(
            params,
            lr=lr,
            eps=eps,
            betas=betas or (0.9, 0.999),
            weight_decay=weight_decay,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    return inner


def schedulefree(params: Any, *, lr: float, eps: float, betas: Betas, weight_decay: float) -> torch.optim.Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682), from schedulefree; in its train mode."""
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise ConfigError("train.optimizer `schedulefree` needs the package schedulefree", _INSTALL) from error
    inner: Any = AdamWScheduleFree(params, lr=lr, eps=eps, betas=betas or (0.9, 0.999), weight_decay=weight_decay)
    inner.train()
    optimizer: torch.optim.Optimizer = inner
    return optimizer


STOCK: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "lion": lion,
    "prodigy": prodigy,
    "schedulefree": schedulefree,
    "adafactor": adafactor,
}
