"""Which observers show a run: the dashboard, plain lines, or events as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Literal, TextIO

from emotrain.train.events import Observer

Display = Literal["dashboard", "plain", "json"]


def choose_display(
    *,
    plain: bool = False,
    json: bool = False,
    stream: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
) -> Display:
    """What to show: `--json` goes before all; the dashboard needs a real terminal.

    Only the stream itself is asked whether it is a terminal; FORCE_COLOR and the like have no say.
    """
    if json:
        return "json"
    env = os.environ if environ is None else environ
    err = sys.stderr if stream is None else stream
    if plain or _is_set(env.get("CI")) or env.get("TERM", "") in {"dumb", "unknown"}:
        return "plain"
    return "dashboard" if is_tty(err) else "plain"


def display_observers(
    *,
    plain: bool = False,
    json: bool = False,
    every: int = 10,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Observer, ...]:
    """The observers for the person (or program) in front of the run.

    Args:
        plain: `--plain`.
        json: `--json`: events on stdout, and only warnings as plain lines on stderr.
        every: steps between two plain lines.
        stdout: for the events (default: the process's).
        stderr: for everything else (default: the process's).
        environ: environment variables (default: the process's).
    """
    from emotrain.observers.console import ConsoleLines, JsonEvents

    display = choose_display(plain=plain, json=json, stream=stderr, environ=environ)
    if display == "json":
        return JsonEvents(stdout), ConsoleLines(every, stream=stderr, warnings_only=True)
    if display == "dashboard":
        from emotrain.observers.dashboard import Dashboard, make_console

        console = make_console(sys.stderr if stderr is None else stderr, environ)
        if not console.legacy_windows:
            return (Dashboard(console),)
    return (ConsoleLines(every, stream=stderr),)


def is_tty(stream: TextIO) -> bool:
    """Whether the stream is a terminal; a closed or odd one is not."""
    try:
        return stream.isatty()
    except (ValueError, AttributeError):
        return False


def _is_set(value: str | None) -> bool:
    return value is not None and value.strip().lower() not in {"", "0", "false", "no"}
