"""The page of `lint --html`: what was found, with the pictures beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emotrain.dataset.lint_types import Finding, PictureRow, Report
from emotrain.dataset.ranking import PictureScore
from emotrain.report.pages import render
from emotrain.report.ranking import RANKED, ranking_rows

LISTED = 200  # files per finding
SHOWN = 2000  # pictures
WORDS = {"error": "error", "warning": "warning", "info": "note"}


def lint_page(report: Report, ranking: Sequence[PictureScore] = (), *, title: str = "data set") -> str:
    """The whole page as one string, ready for a file.

    Args:
        report: with previews where pictures are to be seen.
        ranking: of a run on this data set; empty: the section is left out.
        title: what was looked at.
    """
    pictures = {row.id: row for row in report.pictures}
    counts = report.counts()
    sections = [
        ("findings", "Findings", True),
        ("ranking", "What a run could not learn", ranking),
        ("pictures", "Pictures", pictures),
        ("buckets", "Buckets", report.buckets),
        ("tags", "Tags", report.tags),
        ("folders", "Folders", len(report.folders) > 1),
    ]
    return render(
        "lint.html",
        title=f"lint: {title}",
        target=title,
        report=report,
        sections=[(name, heading) for name, heading, content in sections if content],
        counts=[
            (counts["error"], "error", "error" if counts["error"] else "good"),
            (counts["warning"], "warning", "warning" if counts["warning"] else "good"),
            (counts["info"], "note", ""),
        ],
        folders_shown=sum(row.shown for row in report.folders),
        groups=_groups(report),
        listed=LISTED,
        ranking=ranking_rows(ranking, pictures),
        ranked=RANKED,
        figures=_figures(report),
        pictures_rest=len(report.pictures) - SHOWN,
    )


def _groups(report: Report) -> list[dict[str, Any]]:
    """The findings of each code, in their order."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in report.findings:
        groups[finding.severity, finding.code].append(finding)
    return [
        {
            "severity": severity,
            "word": WORDS[severity],
            "code": code,
            "findings": findings,
            "hints": list(dict.fromkeys(one.hint for one in findings if one.hint))[:5],
            "is_open": severity == "error" or len(findings) <= 5,
        }
        for (severity, code), findings in groups.items()
    ]


def _figures(report: Report) -> list[tuple[PictureRow, list[tuple[Finding, str]]]]:
    """The pictures, those with the worst findings first, each with what was found and the words for it."""
    about: Mapping[str, list[Finding]] = _by_file(report.findings)
    ordered = sorted(report.pictures, key=lambda row: (-_weight(about.get(row.id, ())), row.id))
    return [(row, [(one, _about(one, row.id)) for one in about.get(row.id, ())]) for row in ordered[:SHOWN]]


def _by_file(findings: Iterable[Finding]) -> Mapping[str, list[Finding]]:
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.file is not None:
            for name in (finding.file, *finding.others):
                found[name].append(finding)
    return found


def _weight(findings: Iterable[Finding]) -> int:
    return sum({"error": 10_000, "warning": 100, "info": 1}[finding.severity] for finding in findings)


def _about(finding: Finding, name: str) -> str:
    """The message, from the side of the file it is shown at."""
    return finding.message if finding.file == name else f"see {finding.file}: it {finding.message}"
