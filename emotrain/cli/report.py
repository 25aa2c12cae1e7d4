"""`emotrain report`: one page for a run, or several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emotrain.cli import output
from emotrain.cli.options import RUNS, RunsDir, run_names
from emotrain.errors import ConfigError

if TYPE_CHECKING:
    from emotrain.runs.folder import RunFolder


def report(
    runs: Annotated[
        list[str], typer.Argument(help="Folders or names of runs, or a folder of runs", autocompletion=run_names)
    ],
    html: Annotated[Path | None, typer.Option("--html", help="Write the page to this file")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write one page about a run, or several runs side by side.

    Curves with the emotion's signals underneath, why it ended, samples of every step and of the LoRA itself, settings,
    the ranking of the pictures, how to use the file. One run's page is RUN/report.html, which `run` writes as it goes
    and at its end; that of several is report.html beside them, and a folder of runs stands for all of them. Running and
    crashed runs have pages too. Nothing is loaded from elsewhere: a page is one file.

    Examples:
      emotrain report mika_v2
      emotrain report mika_v1 mika_v2 --html side-by-side.html
      emotrain report runs
    """
    folders = _folders(runs, runs_dir)
    target = html or (folders[0].path if len(folders) == 1 else folders[0].path.parent) / "report.html"
    check_page(target)
    from emotrain.runs.report import page_of, page_of_several

    write_page(target, page_of(folders[0]) if len(folders) == 1 else page_of_several(folders, target.parent))
    output.result(str(target))


def _folders(runs: list[str], runs_dir: Path) -> list[RunFolder]:
    """The runs that are named, once each; a folder that is no run but holds runs stands for all of them."""
    from emotrain.runs.folder import list_runs, open_run

    found: dict[Path, RunFolder] = {}
    for name in runs:
        inside = [] if (Path(name) / "run.json").exists() else list_runs(Path(name))
        for folder in inside or [open_run(name, runs_dir)]:
            found.setdefault(folder.path.resolve(), folder)
    return list(found.values())


def check_page(path: Path) -> None:
    """Refuse, before minutes of work, a place that cannot be written or a file that is not a page of ours.

    Raises:
        ConfigError: see above.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--html: {path} is not a file that can be written", "give a file in an existing folder")
    if path.exists() and not path.read_bytes()[:64].lstrip().lower().startswith(b"<!doctype html"):
        raise ConfigError(f"--html: {path} exists and is not a page", "give another file name")


def write_page(path: Path, text: str) -> None:
    """Put a page in its place as a whole.

    Raises:
        ConfigError: the place cannot be written.
    """
    from emotrain.files import replace_file

    try:
        replace_file(path, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"--html: {path} cannot be written: {error.strerror}") from error
