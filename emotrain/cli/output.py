"""The one place that prints: results on stdout, everything else on stderr.

Captions, file names and presets may come from strangers: whatever is printed loses its control
characters first, and nothing is read as markup.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from emotrain.errors import EmotrainError, Problem
from emotrain.files import clean as clean

SCHEMA_VERSION = 1


def result(text: str) -> None:
    """One line of a command's result, on stdout."""
    _write(sys.stdout, clean(text))


def block(text: str) -> None:
    """A result of several lines, such as a file's text, on stdout."""
    for line in text.rstrip("\n").split("\n"):
        result(line.replace("\t", "    "))


def json_object(value: Any) -> None:
    """A result for programs: one JSON value on stdout; numbers that JSON has no word for become null."""
    _write(sys.stdout, json.dumps(_finite(value), ensure_ascii=True, indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_line(value: Mapping[str, Any]) -> None:
    """One event for programs: JSON on one line on stdout, flushed."""
    _write(sys.stdout, json.dumps(value, ensure_ascii=True, allow_nan=False))
    sys.stdout.flush()


def note(text: str) -> None:
    """A line that is not a result, on stderr."""
    _write(sys.stderr, clean(text))


def warning(text: str) -> None:
    """What the user should know but need not fix, on stderr."""
    _write(sys.stderr, f"{_paint('warning:', '33')} {clean(text)}")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar that is told (done, total); None where stderr is no terminal."""
    if not sys.stderr.isatty() or os.environ.get("CI") or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield tell


def bell() -> None:
    """Ring the terminal's bell, where there is one: long work has ended."""
    if sys.stderr.isatty():
        sys.stderr.write("\a")
        sys.stderr.flush()


def error(problems: Sequence[Problem]) -> None:
    """Problems in the shape `error: ...`, an empty line, `hint: ...`, on stderr."""
    for index, problem in enumerate(problems):
        if index:
            _write(sys.stderr, "")
        _write(sys.stderr, f"{_paint('error:', '31;1')} {clean(problem.message)}")
        if problem.hint:
            _write(sys.stderr, f"\n{_paint('hint:', '36')} {clean(problem.hint)}")


def error_json(failure: EmotrainError) -> None:
    """The same for programs: one JSON line on stdout."""
    first, *more = failure.problems
    body: dict[str, Any] = {"code": int(failure.exit_code), **_problem(first)}
    if more:
        body["more"] = [_problem(problem) for problem in more]
    json_line({"schema_version": SCHEMA_VERSION, "error": body})


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = (), write: Callable[[str], None] = result) -> None:
    """Aligned columns, on stdout unless `write` goes elsewhere; below a header numbers stand to the right."""
    lines = [[clean(str(cell)) for cell in row] for row in rows]
    if header:
        lines.insert(0, list(header))
    if not lines:
        return
    widths = [max(_width(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = []
        for text, width in zip(line, widths, strict=True):
            space = " " * (width - _width(text))
            to_the_right = bool(header) and _is_number(text)
            cells.append(space + text if to_the_right else text + space)
        write("  ".join(cells).rstrip())


def _problem(problem: Problem) -> dict[str, Any]:
    return {"message": problem.message, "hint": problem.hint}


def _width(text: str) -> int:
    """Columns on a terminal: wide East Asian letters and emoji take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _is_number(text: str) -> bool:
    return text.replace(".", "").replace(",", "").replace("%", "").removeprefix("-").isdigit()


def _paint(text: str, code: str) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or not sys.stderr.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text + "\n")
    except BrokenPipeError:
        reader_gone()
    except OSError as failure:
        if failure.errno != errno.EIO:
            raise
        # The terminal was closed: nobody reads on, and the command ends with the code that is its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reader_gone() -> NoReturn:
    """The reader of a pipe has seen enough (`| head`): end quietly.

    Raises:
        SystemExit: with 0; nothing went wrong.
    """
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            os.dup2(devnull, stream.fileno())
    raise SystemExit(0)


def prepare() -> None:
    """Let no closed stream, and no letter that the console cannot show (Windows code pages), end the program."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # `>&-`, or a program without a console
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
