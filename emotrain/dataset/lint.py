"""What is wrong with a data set, before anything is trained: every file looked at once (no torch).

`lint` takes a scan, decodes each picture once on all cores, and gathers the findings of the other
lint modules. It reads only; nothing is written anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from emotrain.dataset.buckets import BucketRules
from emotrain.dataset.examples import Example, Scan
from emotrain.dataset.images import mask_of
from emotrain.dataset.lint_captions import caption_findings, tag_table
from emotrain.dataset.lint_copies import copy_findings
from emotrain.dataset.lint_pictures import Job, Measured, note_findings, picture_findings
from emotrain.dataset.lint_pool import Progress, measure_all
from emotrain.dataset.lint_sizes import (
    balance_findings,
    bucket_table,
    folder_table,
    named_repeats,
    placements_of,
    size_findings,
    twin_findings,
    usual_resolution,
)
from emotrain.dataset.lint_tokens import TokenCounter, estimator
from emotrain.dataset.lint_types import Finding, PictureRow, Report, in_order
from emotrain.dataset.textfile import FileProblem, printable

__all__ = ["Finding", "LintSettings", "Report", "lint"]
PREVIEW_SIDE = 160  # pixels


@dataclass(frozen=True)
class LintSettings:
    """What the data set is meant for.

    `rules` None: buckets of the largest usual resolution (1024, 768, 512) that at least half of the
    pictures reach. `previews`: how many thumbnails are made for a page, 160 pixels at most.
    """

    trigger: str | None = None
    rules: BucketRules | None = None
    tokens: TokenCounter = field(default_factory=estimator)
    prefix: str = ""
    suffix: str = ""
    background: str = "white"
    previews: int = 0


def lint(
    scan: Scan,
    settings: LintSettings | None = None,
    *,
    held_out: Scan | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look at every file of a scan.

    Args:
        scan: the data folders.
        settings: trigger, buckets and encoder; None takes the defaults of `LintSettings`.
        held_out: pictures for validation, looked at for damage and for copies of training pictures.
        workers: processes; None takes one a core (this process alone for a few pictures).
        progress: told (done, total) of the pictures decoded.

    Returns:
        Findings in order, and the tables for a report. Errors are what would stop a run.
    """
    settings = settings or LintSettings()
    start = time.perf_counter()
    held = held_out or Scan((), ())
    jobs = [
        Job(example.path, settings.background, PREVIEW_SIDE if k < settings.previews else 0)
        for k, example in enumerate(scan.examples)
    ]
    jobs += [Job(example.path, settings.background) for example in held.examples]
    measured = measure_all(jobs, workers=workers, progress=progress)
    own, others = measured[: len(scan.examples)], measured[len(scan.examples) :]
    findings = [*_scan_findings(scan), *_scan_findings(held, is_held_out=True)]
    findings += _each(scan.examples, own) + _each(held.examples, others) + _mask_findings(scan.examples)
    report = _with_tables(scan, own, settings)
    findings += _whole(scan, settings, report)
    findings += copy_findings(scan.examples, [one.look for one in own], held.examples, [one.look for one in others])
    return replace(report, findings=in_order(findings), seconds=time.perf_counter() - start)


def _scan_findings(scan: Scan, *, is_held_out: bool = False) -> list[Finding]:
    """What the scan skipped and missed."""
    found = [
        Finding(item.code, item.severity, _name(item.path, scan, item.folder), item.reason, item.hint)
        for item in scan.skipped
    ]
    for path in scan.listed_missing:
        hint = "correct its file_name, or add the picture"
        message = "is named in metadata.jsonl and is not there"
        found.append(Finding("listed-missing", "warning", _name(path, scan, 0), message, hint))
    if not scan.examples and not is_held_out:
        hint = "pictures are .jpg, .png, .webp, .avif, .bmp, .gif or .tiff files"
        message = f"has no picture that can be used ({scan.totals()})"
        found.append(Finding("no-pictures", "error", None, message, hint))
    return found


def _name(path: Path, scan: Scan, folder: int) -> str:
    """Like an example's id: the folder's name and the path below it."""
    if folder < len(scan.folders) and path.is_relative_to(scan.folders[folder]):
        root = scan.folders[folder]
        return printable(f"{root.resolve().name}/{path.relative_to(root).as_posix()}")
    return printable(path)


def _each(examples: Sequence[Example], measured: Sequence[Measured]) -> list[Finding]:
    found = []
    for example, one in zip(examples, measured, strict=True):
        found += note_findings(example.id, example.notes + one.notes)
        found += picture_findings(example.id, one)
    return found


def _mask_findings(examples: Sequence[Example]) -> list[Finding]:
    """Masks that cannot be read, or that leave nothing of their picture to learn."""
    found = []
    for example in examples:
        if example.mask is None:
            continue
        try:
            mask = mask_of(example.path, example.mask)
        except FileProblem as problem:
            if example.mask != "alpha":  # a damaged picture has a finding of its own
                reason = f"has a mask that cannot be used: {printable(example.mask.name)} {problem.reason}"
                found.append(Finding("mask-damaged", "error", example.id, reason, problem.hint))
            continue
        if mask is not None and mask.getextrema()[1] == 0:
            what = "is transparent all over" if example.mask == "alpha" else "has a mask that is black all over"
            hint = "white is what counts: paint it white, or take the mask away"
            found.append(Finding("mask-black", "error", example.id, f"{what}: nothing of it would be learned", hint))
    return found


def _with_tables(scan: Scan, measured: Sequence[Measured], settings: LintSettings) -> Report:
    """A report without findings: buckets, tags, folders and pictures."""
    rules = _rules(scan, settings)
    placements = placements_of(scan.examples, rules)
    rows = []
    for example, placed, one in zip(scan.examples, placements, measured, strict=True):
        largest = max(placed, key=lambda each: each.bucket_w * each.bucket_h, default=None)
        rows.append(
            PictureRow(
                example.id,
                example.width,
                example.height,
                example.captions,
                largest.size if largest else None,
                largest.crop_share if largest else 0.0,
                one.sharpness,
                one.preview,
            )
        )
    return Report(
        (),
        pictures=tuple(rows),
        buckets=bucket_table(placements),
        tags=tag_table(scan.examples),
        folders=folder_table(scan.examples, scan.folders),
        totals=scan.totals(),
        resolution=rules.resolutions if rules else (),
        trigger=settings.trigger,
    )


def _rules(scan: Scan, settings: LintSettings) -> BucketRules | None:
    if settings.rules is not None:
        return settings.rules
    usual = usual_resolution(scan.examples)
    return BucketRules((usual,)) if usual else None


def _whole(scan: Scan, settings: LintSettings, report: Report) -> list[Finding]:
    """Findings about the pictures and captions together."""
    found = caption_findings(
        scan.examples,
        trigger=settings.trigger,
        tokens=settings.tokens,
        prefix=settings.prefix,
        suffix=settings.suffix,
    )
    rules = _rules(scan, settings)
    if rules is not None:
        found += size_findings(scan.examples, placements_of(scan.examples, rules), rules)
    found += named_repeats(scan.examples, scan.folders, settings.trigger)
    return found + balance_findings(report.folders) + twin_findings(scan.examples)
