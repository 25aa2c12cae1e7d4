"""The emo optimizers, and the ones to compare them with."""

from emotrain.optim.base import EmoOptimizer
from emotrain.optim.emoairy import EmoAiry, EmoFact
from emotrain.optim.emocats import EmoCats, EmoLynx
from emotrain.optim.emonavi import EmoNavi
from emotrain.optim.emosens import EmoSens
from emotrain.optim.emotion import EmoTion
from emotrain.optim.emovoid import EmoVoid
from emotrain.optim.protocol import OptimizerLike
from emotrain.optim.registry import build_optimizer
from emotrain.optim.state import WrongStateError

__all__ = [
    "EmoAiry",
    "EmoCats",
    "EmoFact",
    "EmoLynx",
    "EmoNavi",
    "EmoOptimizer",
    "EmoSens",
    "EmoTion",
    "EmoVoid",
    "OptimizerLike",
    "WrongStateError",
    "build_optimizer",
]
