"""`emotrain presets`: the shipped presets, and what a preset may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emotrain.cli import output
from emotrain.cli.options import Json, preset_names
from emotrain.cli.written import new_preset
from emotrain.config.builtin import shipped_presets
from emotrain.config.guess import likely
from emotrain.errors import ConfigError

app = typer.Typer(help="List, show and copy presets")

Name = Annotated[str, typer.Argument(help="A shipped preset's name", autocompletion=preset_names)]


@app.command("list")
def list_presets(as_json: Json = False) -> None:
    """List the shipped presets."""
    rows = [(name, summary(path), str(path)) for name, path in shipped_presets().items()]
    if as_json:
        keys = ("name", "summary", "path")
        output.json_object([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        output.table([row[:2] for row in rows])


@app.command()
def show(
    preset: Annotated[str, typer.Argument(help="A shipped name or a file", autocompletion=preset_names)],
    resolved: Annotated[bool, typer.Option("--resolved", help="Every key written out, `extends` merged")] = False,
) -> None:
    """Show a preset, as it is written or with every key.

    Examples:
        emotrain presets show sdxl
        emotrain presets show my.yaml --resolved
    """
    if resolved:
        from emotrain.config.dump import dump_preset
        from emotrain.config.load import load

        output.block(dump_preset(load(preset).preset))
        return
    from emotrain.config.builtin import find_preset
    from emotrain.config.text import read_text

    output.block(read_text(find_preset(preset), preset))


@app.command()
def copy(
    name: Name,
    target: Annotated[Path | None, typer.Argument(help="The new file  [default: NAME.yaml here]")] = None,
) -> None:
    """Copy a shipped preset to a file of your own.

    An existing file is never written over.
    """
    presets = shipped_presets()
    if name not in presets:
        hint = likely(name, presets) or "`emotrain presets list` shows them"
        raise ConfigError(f"`{name}` is not a shipped preset", hint)
    path = target if target is not None else Path(f"{name}.yaml")
    if path.is_dir():
        path = path / f"{name}.yaml"
    new_preset(path, presets[name].read_text(encoding="utf-8"), "presets copy")
    output.result(str(path))


@app.command()
def schema() -> None:
    """Print the JSON schema of presets, for editors."""
    from emotrain.config.reference import preset_schema

    output.json_object(preset_schema())


def summary(path: Path) -> str:
    """The first comment line of a shipped preset."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip().rstrip(".")
