"""The page of `lint --html`: what was found, with the pictures beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from emotrain.dataset.lint_types import Finding, PictureRow, Report
from emotrain.dataset.ranking import PictureScore
from emotrain.report.html import Html, Part, image, join, page, table, tag

LISTED = 200  # files per finding
SHOWN = 2000  # pictures
RANKED = 60
NAMES = {"error": "error", "warning": "warning", "info": "note"}
VERDICTS = {
    "suspicious": ("error", "its caption may be wrong, or the picture broken"),
    "hard": ("warning", "its loss stays far above the others'"),
    "memorised": ("warning", "its loss fell far below the others': seen too often, or a copy"),
    "usual": ("good", ""),
    "unseen": ("quiet", "seen too rarely to say"),
}


def lint_page(report: Report, ranking: Sequence[PictureScore] = (), *, title: str = "data set") -> str:
    """The whole page as one string, ready for a file.

    Args:
        report: with previews where pictures are to be seen.
        ranking: of a run on this data set; empty: the section is left out.
        title: what was looked at.
    """
    pictures = {row.id: row for row in report.pictures}
    sections = [
        ("findings", "Findings", _findings(report)),
        ("ranking", "What a run could not learn", _ranking(ranking, pictures)),
        ("pictures", "Pictures", _pictures(report)),
        ("buckets", "Buckets", _buckets(report)),
        ("tags", "Tags", _tags(report)),
        ("folders", "Folders", _folders(report)),
    ]
    there = [(name, heading, body) for name, heading, body in sections if body is not None]
    links = join(tag("a", heading, href=f"#{name}") for name, heading, _ in there)
    parts: list[Part] = [
        tag("header", tag("h1", f"emotrain lint: {title}"), tag("p", report.totals, class_="quiet"), _facts(report)),
        tag("nav", links),
    ]
    parts += [tag("section", tag("h2", heading), body, id=name) for name, heading, body in there]
    return page(f"lint: {title}", tag("main", *parts))


def _facts(report: Report) -> Html:
    counts = report.counts()
    facts: list[tuple[Part, str, str | None]] = [
        (len(report.pictures), _counted("picture", len(report.pictures)), None),
        (counts["error"], _counted("error", counts["error"]), "error" if counts["error"] else "good"),
        (counts["warning"], _counted("warning", counts["warning"]), "warning" if counts["warning"] else "good"),
        (counts["info"], _counted("note", counts["info"]), None),
    ]
    if report.trigger:
        facts.append((report.trigger, "trigger", None))
    if report.resolution:
        facts.append((", ".join(str(side) for side in report.resolution), "resolution", None))
    return tag(
        "div",
        join(tag("div", tag("b", value, class_=colour), label, class_="fact") for value, label, colour in facts),
        class_="facts",
    )


def _counted(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _findings(report: Report) -> Html:
    if not report.findings:
        return tag("p", "Nothing to mend.", class_="good")
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in report.findings:
        groups[finding.severity, finding.code].append(finding)
    return join(_group(severity, code, findings) for (severity, code), findings in groups.items())


def _group(severity: str, code: str, findings: Sequence[Finding]) -> Html:
    count = len(findings)
    summary = tag(
        "summary",
        tag("span", NAMES[severity], class_=severity),
        " ",
        code,
        " ",
        tag("span", f"({count})" if count > 1 else "", class_="count"),
    )
    items = [tag("li", tag("bdi", one.file or "the data set"), " ", one.message) for one in findings[:LISTED]]
    if count > LISTED:
        items.append(tag("li", f"and {count - LISTED} more"))
    hints = list(dict.fromkeys(one.hint for one in findings if one.hint))[:5]
    is_open = "" if severity == "error" or count <= 5 else None
    return tag(
        "details", summary, tag("ul", join(items)), join(tag("p", hint, class_="hint") for hint in hints), open=is_open
    )


def _by_file(findings: Iterable[Finding]) -> Mapping[str, list[Finding]]:
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.file is not None:
            found[finding.file].append(finding)
        for other in finding.others if finding.file is not None else ():
            found[other].append(finding)
    return found


def _pictures(report: Report) -> Html | None:
    if not report.pictures:
        return None
    about = _by_file(report.findings)
    ordered = sorted(report.pictures, key=lambda row: (-_weight(about.get(row.id, ())), row.id))
    figures = join(_figure(row, about.get(row.id, ())) for row in ordered[:SHOWN])
    rest = len(ordered) - SHOWN
    more = tag("p", f"{rest} more pictures are not shown.", class_="quiet") if rest > 0 else ""
    return join((tag("div", figures, class_="grid"), more))


def _weight(findings: Iterable[Finding]) -> int:
    return sum({"error": 10_000, "warning": 100, "info": 1}[finding.severity] for finding in findings)


def _figure(row: PictureRow, findings: Iterable[Finding]) -> Html:
    size = f"{row.width} × {row.height}"
    if row.bucket is not None:
        size += f" → {row.bucket[0]} × {row.bucket[1]}"
        if row.crop >= 0.005:
            size += f", {row.crop:.0%} cut off"
    captions = [tag("p", text, class_="caption", dir="auto") for text in row.captions if text]
    notes = [
        tag("li", tag("span", one.code, class_=one.severity), " ", _about(one, row.id), title=one.hint)
        for one in findings
    ]
    return tag(
        "figure",
        _thumbnail(row),
        tag(
            "figcaption",
            tag("p", tag("bdi", row.id), class_="name"),
            tag("p", size, class_="quiet"),
            join(captions) if captions else tag("p", "no caption", class_="quiet"),
            tag("ul", join(notes)) if notes else "",
        ),
    )


def _about(finding: Finding, name: str) -> str:
    """The message, from the side of the file it is shown at."""
    return finding.message if finding.file == name else f"see {finding.file}: it {finding.message}"


def _thumbnail(row: PictureRow) -> Html:
    return image(row.preview, "") if row.preview else tag("div", "no preview", class_="blank")


def _ranking(scores: Sequence[PictureScore], pictures: Mapping[str, PictureRow]) -> Html | None:
    if not scores:
        return None
    note = (
        "Losses are compared at the same place on the noise scale and held against the other pictures, in robust "
        "standard deviations: above 0 is worse than the others. Caption: how its own caption suits a picture in "
        "comparison with those of other pictures: -3 is far better, 0 no better, so it may be wrong."
    )
    rows = [_ranking_row(score, pictures.get(score.id)) for score in scores[:RANKED]]
    body = table(("", "picture", "verdict", "caption", "early", "late", "seen"), rows, numbers=(3, 4, 5, 6))
    rest = len(scores) - RANKED
    more = tag("p", f"{rest} more pictures, all further down.", class_="quiet") if rest > 0 else ""
    return join((tag("p", note, class_="quiet"), body, more))


def _ranking_row(score: PictureScore, row: PictureRow | None) -> list[Part]:
    colour, meaning = VERDICTS[score.verdict]
    contrast = "–" if score.z_contrast is None else f"{score.z_contrast:+.1f}"
    caption = tag("div", row.captions[0], class_="hint said", dir="auto") if row and row.captions else ""
    return [
        _thumbnail(row) if row is not None and row.preview else "",
        tag("div", tag("bdi", score.id), caption, class_="named"),
        tag(
            "div",
            tag("span", score.verdict, class_=colour),
            tag("div", meaning, class_="hint") if meaning else "",
            class_="verdict",
        ),
        contrast,
        f"{score.z_early:+.1f}",
        f"{score.z_late:+.1f}",
        score.visits,
    ]


def _buckets(report: Report) -> Html | None:
    if not report.buckets:
        return None
    rows = [
        (f"{row.width} × {row.height}", row.pictures, f"{row.mean_crop:.1%}", f"{row.largest_crop:.1%}")
        for row in report.buckets
    ]
    return table(("bucket", "pictures", "cut off", "at most"), rows, numbers=(1, 2, 3))


def _tags(report: Report) -> Html | None:
    if not report.tags:
        return None
    rows = [
        (
            tag("span", row.tag[:200], dir="auto"),
            row.count,
            tag("span", tag("meter", value=f"{row.share:.3f}", min=0, max=1), f" {row.share:.0%}", class_="share"),
        )
        for row in report.tags
    ]
    return table(("tag", "pictures", "share"), rows, numbers=(1,))


def _folders(report: Report) -> Html | None:
    if len(report.folders) < 2:
        return None
    rows = [
        (tag("bdi", row.name), row.pictures, row.shown, "regularisation" if row.prior else "") for row in report.folders
    ]
    return table(("folder", "pictures", "shown an epoch", ""), rows, numbers=(1, 2))
