"""Optimizers by name, as presets give them."""

from __future__ import annotations

from typing import Any, cast

from emotrain.config.guess import likely
from emotrain.errors import ConfigError
from emotrain.optim.base import EmoOptimizer
from emotrain.optim.emoairy import EmoAiry, EmoFact
from emotrain.optim.emocats import EmoCats, EmoLynx
from emotrain.optim.emonavi import EmoNavi
from emotrain.optim.emosens import EmoSens
from emotrain.optim.emotion import EmoTion
from emotrain.optim.emovoid import EmoVoid
from emotrain.optim.protocol import OptimizerLike
from emotrain.optim.stock import STOCK, StockOptimizer

EMO: dict[str, type[EmoOptimizer]] = {
    cls.name: cls for cls in (EmoSens, EmoAiry, EmoCats, EmoNavi, EmoFact, EmoLynx, EmoTion, EmoVoid)
}
_STOCK_OPTIONS = ("eps", "betas", "weight_decay")


def optimizer_names() -> tuple[str, ...]:
    """All names, emo first."""
    return (*EMO, *STOCK)


def build_optimizer(name: str, params: Any, *, lr: float | None = None, **options: Any) -> OptimizerLike:
    """An optimizer by its name.

    Args:
        name: one of `optimizer_names()`.
        params: parameters or groups of them.
        lr: learning rate; for emo optimizers it scales the pulse and may be left out.
        options: kwargs of the preset's `train.optimizer`. A stock optimizer takes `eps`, `betas`
            and `weight_decay`, and `sensor` for its display; the emo options mean nothing to it.

    Raises:
        ConfigError: the name is unknown, a word is out of range, the learning rate or a package is
        missing.
    """
    if name in EMO:
        try:
            return EMO[name](params, lr, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"train.optimizer `{name}`: {error}") from error
    if name not in STOCK:
        hint = likely(name, optimizer_names()) or f"known: {', '.join(optimizer_names())}"
        raise ConfigError(f"train.optimizer is `{name}`, which is not an optimizer", hint)
    if lr is None:
        raise ConfigError(
            f"train.lr is missing: `{name}` needs a learning rate",
            "set train.lr (1e-4 is common; prodigy takes 1.0), or use emosens, which needs none",
        )
    kwargs = {"eps": 1e-8, "betas": None, "weight_decay": 0.01}
    kwargs.update({key: options[key] for key in _STOCK_OPTIONS if key in options})
    inner = STOCK[name](params, lr=lr, **kwargs)
    return cast(OptimizerLike, StockOptimizer(name, inner, options.get("sensor", "faithful")))
