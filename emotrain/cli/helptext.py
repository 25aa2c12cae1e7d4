"""A command's docstring as its help: no full stop after the first line, examples as they are."""

from __future__ import annotations

import inspect

import typer


def help_text(docstring: str | None) -> str:
    """Markdown for typer, with the lines below `Examples:` as a block of code."""
    lines = inspect.cleandoc(docstring or "").split("\n")
    lines[0] = lines[0].rstrip(".")
    shaped: list[str] = []
    in_examples = False
    for line in lines:
        if line.strip() in ("Example:", "Examples:"):
            in_examples = True
            shaped += [line, ""]
        elif in_examples and line.strip():
            in_examples = line.startswith(" ")
            shaped.append("    " + line.strip() if in_examples else line)
        elif not in_examples or shaped[-1] != "":
            shaped.append(line)
    return "\n".join(shaped)


def shape_group(app: typer.Typer) -> None:
    """The same for the commands of a group."""
    for command in app.registered_commands:
        if command.callback is not None and command.help is None:
            command.help = help_text(command.callback.__doc__)


def colour_help() -> None:
    """Give typer's help colours that a light terminal shows too: its yellow, dim yellow and cyan are lost on white."""
    from typer import rich_utils

    rich_utils.STYLE_OPTION = rich_utils.STYLE_COMMANDS_TABLE_FIRST_COLUMN = "bold color(31)"
    rich_utils.STYLE_SWITCH = "bold color(28)"
    rich_utils.STYLE_TYPES = "bold color(130)"
    rich_utils.STYLE_USAGE = rich_utils.STYLE_OPTION_ENVVAR = "color(130)"
    rich_utils.STYLE_REQUIRED_LONG = "color(160)"
    rich_utils.STYLE_HELPTEXT = ""
