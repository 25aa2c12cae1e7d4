"""Files that a command writes for the user: never over another one."""

from __future__ import annotations

from pathlib import Path

from emotrain.errors import CheckpointError, ConfigError

TITLE = b'"title": "emotrain preset"'  # at the end of a schema of ours


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
        # never through a link, nor over what came in the meantime
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from error
    return path


def new_preset(path: Path, text: str, command: str) -> Path:
    """Write a new preset, with the schema that editors complete and check its keys by beside it.

    The schema is one file for all presets of a folder. A file of its name that is not ours stays as it is.

    Raises:
        CheckpointError: the preset exists.
        ConfigError: it cannot be written.
    """
    from emotrain.config.reference import SCHEMA_FILE, SCHEMA_LINE, schema_text
    from emotrain.files import replace_file

    new_file(path, SCHEMA_LINE + text, command)
    schema = path.parent / SCHEMA_FILE
    if not schema.exists() or (schema.is_file() and TITLE in schema.read_bytes()[-200:]):
        replace_file(schema, schema_text().encode("utf-8"))
    return path
