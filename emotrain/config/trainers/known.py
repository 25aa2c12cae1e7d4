"""Which trainer a config is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from emotrain.config.trainers import ai_toolkit, diffusion_pipe, kohya, onetrainer
from emotrain.config.trainers.files import parse_text
from emotrain.errors import ConfigError

TRAINERS: tuple[ModuleType, ...] = (ai_toolkit, diffusion_pipe, onetrainer, kohya)


SIMPLE_TUNER = frozenset(("model_family", "--model_family"))


def is_simple_tuner(values: Any) -> bool:
    """Whether it is a config of SimpleTuner, which is not read."""
    return isinstance(values, Mapping) and bool(SIMPLE_TUNER & set(values))


def trainer_of(values: Any) -> ModuleType | None:
    """The module that reads a config of that form; None for everything else, a preset of ours among it."""
    if not isinstance(values, Mapping):
        return None
    return next((trainer for trainer in TRAINERS if trainer.recognise(values)), None)


def refuse_foreign(text: str, path: Path, shown: str) -> None:
    """Name `emotrain import` where another trainer's config was given for a preset.

    Raises:
        ConfigError: `text` is such a config, or TOML.
    """
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json") and not ("config:" in text and "process:" in text):
        return
    try:
        trainer = trainer_of(parse_text(text, suffix, shown))
    except ConfigError:
        trainer = None  # what is wrong with it is told by whoever reads it as a preset
    if trainer is not None:
        raise ConfigError(f"{shown} is {trainer.NAME}: `emotrain import {shown}` makes a preset of it")
    if suffix == ".toml":
        raise ConfigError(
            f"{shown} is TOML, and presets are YAML", "`emotrain import` reads the TOML of other trainers"
        )
