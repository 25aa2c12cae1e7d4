"""A preset from another trainer's config, with what became of each of its words (no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.config.builtin import shipped_presets
from emotrain.config.dump import dump_values
from emotrain.config.names import name_from_file
from emotrain.config.trainers.files import parse_file
from emotrain.config.trainers.imported import Import, Model, Row
from emotrain.config.trainers.known import TRAINERS, is_simple_tuner, trainer_of
from emotrain.errors import ConfigError, ModelError
from emotrain.families.registry import FAMILIES
from emotrain.families.table import is_hub_id, sniff
from emotrain.runs.propose import DEFAULT, family_preset, relative_path

_PATHS = ("base", "vae", "text_encoder", "tokenizer", "continue", "folder", "path", "mask")


@dataclass(frozen=True)
class Imported:
    """A preset's name and text, what it was made of, and what of it is not on this machine."""

    name: str
    text: str
    trainer: str
    rows: tuple[Row, ...]
    num_off: int
    missing: tuple[str, ...]


def import_config(config: Path, model: str | None, beside: Path) -> Imported:
    """Read another trainer's config and write a preset.

    Args:
        config: TOML, JSON or YAML.
        model: as `model.base`, in place of the config's.
        beside: the folder that the preset will lie in; its paths are relative to that.

    Raises:
        ConfigError: it cannot be read, is of no trainer that is known, or trains what cannot be trained here.
    """
    shown = str(config)
    values = parse_file(config, shown)
    trainer = trainer_of(values)
    if trainer is None:
        if isinstance(values, dict) and {"model", "dataset", "extends"} & set(values):
            raise ConfigError(f"{shown} is a preset already", f"emotrain check {shown}")
        if is_simple_tuner(values):
            hint = "begin with `emotrain init FOLDER MODEL`"
            raise ConfigError(f"{shown} is a config of SimpleTuner, which is not read", hint)
        raise ConfigError(
            f"{shown} is of no trainer that is known here",
            f"known are {', '.join(one.NAME.rpartition(' of ')[2] for one in TRAINERS)}",
        )
    out = Import(config.absolute().parent, models_of(trainer.KEY))
    try:
        trainer.read(values, out)
    except ConfigError as error:
        raise ConfigError(f"{shown}: {error.message}", error.hint) from None
    if model is not None:
        out.values.setdefault("model", {})["base"] = model
    extends = _base(out)
    if not out.folders:
        out.leave("folders of pictures", "none", "dataset.folders: ./pictures, for yours")
        out.folders[str(beside / "pictures")] = {}
    name = str(out.values.get("name") or name_from_file(config))
    preset = out.finish()
    missing = tuple(dict.fromkeys(_missing(preset)))
    told = f"# From {config.name} ({trainer.NAME}), by `emotrain import`.\n"
    head = {} if extends is None else {"extends": extends}
    text = told + dump_values(head | _with_relative_paths(preset, beside))
    return Imported(name, text, trainer.NAME, tuple(out.rows), out.num_off, missing)


def models_of(trainer: str) -> dict[str, Model]:
    """A trainer's words for the kinds of model that can be trained here."""
    return {
        word.removeprefix(f"{trainer} "): Model(preset, spec.flow, spec.denoiser == "unet")
        for spec in FAMILIES.values()
        for word, preset in spec.elsewhere.items()
        if word.startswith(f"{trainer} ")
    }


def _base(out: Import) -> str | None:
    """The shipped preset to stand on: the model's own files say more than the config."""
    base = out.values.get("model", {}).get("base")
    named = (out.kind.preset if out.kind else "") or None
    if base is None:
        out.leave("a model", "none", f"{named or DEFAULT}'s: `emotrain import CONFIG MODEL` names another")
        return named or DEFAULT
    if not is_hub_id(base):
        try:
            return family_preset(sniff(base), tags=False)
        except ModelError:  # not here, or not to be used: `check` says why
            return _by_file_name(named, Path(base).name)
    of = (family for family in FAMILIES.values() for one in family.variants.values() if one.repository == base)
    return _by_file_name(named, base) or next((family.name for family in of if family.name in shipped_presets()), None)


def _by_file_name(preset: str | None, name: str) -> str | None:
    """`zimage` and z_image_turbo.safetensors: `zimage-turbo`; `klein-4b` and flux-2-klein-9b: `klein-9b`."""
    words = re.split(r"[^a-z0-9]+", name.casefold())
    if preset in ("klein-4b", "klein-9b") and "dev" in words and "klein" not in words:
        return "flux2-dev"  # others have one word for all of FLUX.2
    for other in shipped_presets():
        family, _, variant = other.rpartition("-")
        if variant in words and family and preset in (family, *(f"{family}-{word}" for word in ("4b", "9b"))):
            return other
    return preset


def _missing(values: Any) -> Iterator[str]:
    """Paths of the preset where nothing is."""
    if isinstance(values, list):
        for one in values:
            yield from _missing(one)
    for key, value in values.items() if isinstance(values, dict) else ():
        if key in _PATHS and isinstance(value, str):
            hub = key in ("base", "vae") and is_hub_id(value)
            if not hub and not value.startswith("builtin:") and value != "alpha" and not Path(value).exists():
                yield value
        else:
            yield from _missing(value)


def _with_relative_paths(values: Any, beside: Path) -> Any:
    if isinstance(values, list):
        return [_with_relative_paths(one, beside) for one in values]
    if not isinstance(values, dict):
        return values
    return {
        key: relative_path(value, beside)
        if key in _PATHS and isinstance(value, str) and Path(value).is_absolute()
        else _with_relative_paths(value, beside)
        for key, value in values.items()
    }
