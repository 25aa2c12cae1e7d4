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
