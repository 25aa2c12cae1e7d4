"""Write docs/reference from the code: cli.md from the help, preset.md and presets.schema.json from the schema.

python docs/build_reference.py            # write
python docs/build_reference.py --check    # exit 1 if a page is not current
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from emotrain.cli.app import COMMANDS, build_app
from emotrain.config.reference import preset_page, schema_text

HERE = Path(__file__).parent / "reference"
EXIT_CODES = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done; a run that stopped automatically is a success |
| 1 | a mistake of ours: the traceback is in a file that the message names |
| 2 | usage or preset |
| 3 | data set missing or unusable |
| 4 | model or LoRA file missing or unusable |
| 5 | checkpoint or resume refused, or the run folder exists |
| 6 | resources: out of memory, disk full, no device, run locked |
| 7 | the training diverged |
| 130, 143 | stopped by Ctrl-C or SIGTERM: saved, and the command to resume is printed |

Results go to stdout, everything else to stderr. With `--json` an error is also one line on stdout:
`{"schema_version": 1, "error": {"code": 2, "message": ..., "hint": ..., "more": [...]}}`.
"""


def cli_page() -> str:
    """docs/reference/cli.md."""
    root = typer.main.get_command(build_app())
    context = root.make_context("emotrain", [], resilient_parsing=True)
    lines = [
        "# Commands",
        "",
        "Generated from the code by `python docs/build_reference.py`.",
        "",
    ]
    panels: dict[str, list[str]] = {}
    for command in COMMANDS:
        if command.name in root.list_commands(context):
            entry = f"| [`{command.name}`](#emotrain-{command.name}) | {command.help} |"
            panels.setdefault(command.panel, []).append(entry)
    for panel, entries in panels.items():
        lines += [f"**{panel}**", "", "| command | |", "|---|---|", *entries, ""]
    for name in root.list_commands(context):
        lines += list(_command_lines(f"emotrain {name}", root.get_command(context, name)))
    return "\n".join([*lines, EXIT_CODES]).rstrip() + "\n"


def _command_lines(path: str, command: Any) -> Iterator[str]:
    context = command.make_context(path, [], resilient_parsing=True)
    yield from (f"## {path}", "", command.help or "", "")
    if hasattr(command, "list_commands"):
        for name in command.list_commands(context):
            inner = _command_lines(f"{path} {name}", command.get_command(context, name))
            yield from ("#" + line if line.startswith("## ") else line for line in inner)
        return
    words = [_usage(parameter) for parameter in command.params]
    yield from ("```", " ".join([path, *words]), "```", "")
    rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
    if rows:
        yield from ("| | | default |", "|---|---|---|", *rows, "")


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return parameter.name.upper() if parameter.required else f"[{parameter.name.upper()}]"
    value = "" if parameter.is_flag else f" {parameter.name.upper()}"
    return f"[{parameter.opts[0]}{value}]" + ("..." if parameter.multiple else "")


def _row(parameter: Any) -> str:
    shown = parameter.name.upper()
    if parameter.param_type_name == "option":
        shown = ", ".join([*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    hidden = default is None or default is False or default == [] or callable(default)
    text = "required" if parameter.required else "" if hidden else f"`{default}`"
    help_line = (parameter.help or "").replace("|", "\\|")
    if getattr(parameter, "envvar", None):
        help_line += f" [env: {parameter.envvar}]"
    return f"| `{shown}` | {help_line} | {text} |"


def pages() -> dict[Path, str]:
    """Every generated file with its text."""
    return {
        HERE / "cli.md": cli_page(),
        HERE / "preset.md": preset_page(),
        HERE / "presets.schema.json": schema_text(),
    }


def stale() -> list[str]:
    """Names of the files that differ from what the code says."""
    return [
        path.name for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    """Write the pages, or check them."""
    if "--check" in sys.argv:
        for name in stale():
            print(f"docs/reference/{name} is not current: run python docs/build_reference.py")
        return 1 if stale() else 0
    HERE.mkdir(parents=True, exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
