"""What ships with the package: models, data sets and presets, found by name."""

from __future__ import annotations

from pathlib import Path

import emotrain
from emotrain.config.guess import likely
from emotrain.errors import ConfigError

PREFIX = "builtin:"
MODELS = ("tiny-sd", "tiny-flux")
DATASETS = ("example", "example-heldout")
_PACKAGE = Path(emotrain.__file__).parent


def is_builtin(text: str) -> bool:
    """Whether a path is a `builtin:` name."""
    return text.startswith(PREFIX)


def check_name(name: str, known: tuple[str, ...], kind: str) -> None:
    """Refuse a `builtin:` name that is not among the known ones.

    Args:
        name: with its `builtin:`.
        known: the names without it.
        kind: `model` or `data set`, for the message.

    Raises:
        ConfigError: exit 2.
    """
    if name.removeprefix(PREFIX) not in known:
        names = [PREFIX + one for one in known]
        listed = " and ".join(f"`{one}`" for one in names)
        raise ConfigError(f"`{name}` is not a built-in {kind}", likely(name, names) or f"there are {listed}")


def presets_dir() -> Path:
    """The folder of the shipped presets: in the package, or beside it in a source checkout."""
    packaged = _PACKAGE / "presets"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "presets"


def shipped_presets() -> dict[str, Path]:
    """Name -> file of every shipped preset, in the order of a list."""
    return {path.stem: path for path in sorted(presets_dir().glob("*.yaml"))}


def find_preset(path_or_name: str) -> Path:
    """A preset's file: a shipped name, or a path.

    Raises:
        ConfigError: it looks like a name, and neither a file nor a shipped preset has it.
    """
    shipped = shipped_presets()
    if path_or_name in shipped:
        return shipped[path_or_name]
    path = Path(path_or_name).expanduser()
    plain = path.name == path_or_name and path.suffix not in (".yaml", ".yml")
    if plain and not path.exists():
        beside = path.with_suffix(".yaml")
        hint = likely(path_or_name, [*shipped, *([beside.name] if beside.exists() else [])])
        raise ConfigError(
            f"`{path_or_name}` is not a shipped preset, and no file has this name",
            hint or "`emotrain presets list` shows the shipped ones",
        )
    return path
