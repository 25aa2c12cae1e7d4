"""`emotrain lint`: what is wrong with the pictures and captions."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emotrain.cli import output
from emotrain.cli.options import OneJson, preset_names
from emotrain.cli.report import check_page, write_page
from emotrain.errors import ConfigError, DatasetError, ExitCode

if TYPE_CHECKING:
    from emotrain.dataset.lint_types import Finding, Report
    from emotrain.dataset.ranking import PictureScore

PREVIEWS = 2000  # thumbnails in a page
SHOWN = 8  # files per code in the table; JSON and the page have all
TAGS = 12
_PRESET_SUFFIXES = (".yaml", ".yml", ".toml", ".json")  # the last two for a config of another trainer, and its hint


def lint(
    target: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures, a preset file, or a shipped preset's name", autocompletion=preset_names
        ),
    ],
    as_json: OneJson = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with thumbnails to this file")] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="A run: its ranking of the pictures goes into the page")
    ] = None,
) -> None:
    """Find what is wrong with pictures and captions.

    Every file is looked at and every picture decoded once; nothing is changed. A preset says more than a folder: its
    trigger, sizes and model are taken into account. Exit 0: nothing worse than warnings; 3: errors.

    Examples:
      emotrain lint ./data/mika
      emotrain lint my.yaml --html report.html
    """
    from emotrain.runs.lint import Options

    if html is not None:
        check_page(html)
    scores = _ranking(run)
    with output.progress("looking at pictures") as tell:
        report = _lint(target, Options(PREVIEWS if html is not None else 0, None, tell))
    if html is not None:
        from emotrain.report.lint_page import lint_page

        write_page(html, lint_page(report, scores, title=target))
    if as_json:
        ranking = [score.to_dict() for score in scores]
        output.json_object({**report.to_dict(), **({"ranking": ranking} if run is not None else {})})
    else:
        _show(report)
        if html is not None:
            output.note(f"page: {html}")
    if report.has_errors:
        raise typer.Exit(ExitCode.DATASET)


def _lint(target: str, options: object) -> Report:
    from emotrain.config.builtin import shipped_presets
    from emotrain.config.load import load
    from emotrain.runs.lint import Options, lint_folder, lint_preset

    assert isinstance(options, Options)
    path = Path(target).expanduser()
    if target.startswith("builtin:") or path.is_dir():
        return lint_folder(target, options)
    if path.is_file() and path.suffix.lower() not in _PRESET_SUFFIXES:
        raise ConfigError(f"{target} is neither a folder nor a preset", "name the folder that holds the pictures")
    is_name = target in shipped_presets() or not (path.suffix or path.name != target)
    if path.exists() or is_name or path.suffix.lower() in _PRESET_SUFFIXES:
        loaded = load(target)
        for line in loaded.notes:
            output.note(f"note: {line}")
        return lint_preset(loaded.preset, options)
    raise DatasetError(f"{target} does not exist", "name a folder of pictures, or a preset")


def _ranking(run: str | None) -> tuple[PictureScore, ...]:
    if run is None:
        return ()
    from emotrain.runs.folder import open_run
    from emotrain.runs.pictures import rank_pictures

    return rank_pictures(open_run(run))


def _show(report: Report) -> None:
    """The findings, grouped by code; then folders, buckets and tags."""
    output.result(report.totals)
    if report.assumed:
        output.result(f"sizes: {report.assumed}; a preset says its own")
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in report.findings:
        groups[finding.severity, finding.code].append(finding)
    for (severity, code), findings in groups.items():
        output.result("")
        for finding in findings[:SHOWN]:
            output.result(f"{severity:<8} {code:<19} {finding.file or 'the data set'} {finding.message}")
        if len(findings) > SHOWN:
            output.result(f"{'':<8} {'':<19} and {len(findings) - SHOWN} more; --json and --html have all")
        for hint in list(dict.fromkeys(finding.hint for finding in findings if finding.hint))[:SHOWN]:
            output.result(f"{'':<8} {'hint:':>19} {hint}")
    _tables(report)
    counts = report.counts()
    output.result("")
    words = (("error", counts["error"]), ("warning", counts["warning"]), ("note", counts["info"]))
    output.result(", ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in words))


def _tables(report: Report) -> None:
    if len(report.folders) > 1:
        output.result("")
        shown = sum(row.shown for row in report.folders)
        rows = [
            (
                row.name,
                row.pictures,
                row.shown,
                f"{row.shown / (shown or 1):.0%}",
                "regularisation" if row.prior else "",
            )
            for row in report.folders
        ]
        output.table(rows, ("folder", "pictures", "shown an epoch", "share", ""))
    if report.buckets:
        output.result("")
        rows_of_buckets = [
            (f"{row.width} x {row.height}", row.pictures, f"{row.mean_crop:.0%}", f"{row.largest_crop:.0%}")
            for row in report.buckets
        ]
        output.table(rows_of_buckets, ("bucket", "pictures", "cut off", "at most"))
    if report.tags:
        output.result("")
        rows_of_tags = [(row.tag[:60], row.count, f"{row.share:.0%}") for row in report.tags[:TAGS]]
        output.table(rows_of_tags, ("tag", "pictures", "share"))
