"""Files that a command writes for the user: never over another one."""

from __future__ import annotations

from pathlib import Path

from emotrain.errors import CheckpointError, ConfigError


def folder_of(out: Path | None) -> Path:
    """The folder that `--output` lies in.

    Raises:
        ConfigError: there is no such folder.
    """
    beside = out.parent if out is not None else Path()
    if not beside.is_dir():
        raise ConfigError(f"--output: {beside} is not a folder", "make it first, or give another file")
    return beside


def new_file(path: Path, text: str, command: str) -> Path:
    """Write a new file.

    Raises:
        CheckpointError: it exists.
        ConfigError: it cannot be written.
    """
    if path.exists():
        number = next(n for n in range(2, 10_000) if not path.with_stem(f"{path.stem}-{n}").exists())
        raise CheckpointError(
            f"{path} exists, and `{command}` writes over nothing",
            f"give another name: -o {path.with_stem(f'{path.stem}-{number}')}",
        )
    try:
        with path.open("x", encoding="utf-8") as file:  # never through a link, nor over what came in the meantime
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from error
    return path
