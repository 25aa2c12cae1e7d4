"""Buckets, crops and balance: what becomes of the pictures before they are learned (no torch)."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from emotrain.dataset.buckets import BucketRules, Placement, place
from emotrain.dataset.examples import Example
from emotrain.dataset.lint_types import BucketRow, Finding, FolderRow
from emotrain.dataset.textfile import printable
from emotrain.dataset.walk import REPEATS

USUAL = (1024, 768, 512)
HEAVY_CROP = 0.15  # share cut off from where it is worth a warning
SMALL = 0.5  # share of the resolution's area below which a picture is called too small
UNBALANCED = 5.0  # times as often as another folder


def usual_resolution(examples: Sequence[Example]) -> int | None:
    """The largest of 1024, 768 and 512 that half of the pictures reach; None: they are smaller."""
    areas = sorted(example.width * example.height for example in examples)
    if not areas:
        return None
    middle = areas[(len(areas) - 1) // 2]
    return next((side for side in USUAL if middle >= 0.75 * side * side), None)


def placements_of(examples: Sequence[Example], rules: BucketRules | None) -> list[tuple[Placement, ...]]:
    """The placements of every picture; empty ones without rules."""
    if rules is None:
        return [() for _ in examples]
    return [place(example.width, example.height, rules) for example in examples]


def size_findings(
    examples: Sequence[Example], placements: Sequence[tuple[Placement, ...]], rules: BucketRules
) -> list[Finding]:
    """Pictures that are too small for the resolution, enlarged, or heavily cropped."""
    found = []
    wanted = min(rules.resolutions)
    for example, placed in zip(examples, placements, strict=True):
        if not placed:
            continue
        largest = max(placed, key=lambda one: one.bucket_w * one.bucket_h)
        size = f"{example.width} x {example.height} pixels"
        if example.width * example.height < SMALL * wanted * wanted:
            end = (
                f"enlarged {largest.scale:.1f} times"
                if largest.enlarged
                else f"trained at {largest.bucket_w} x {largest.bucket_h}"
            )
            message = f"is {size}, too small for {wanted}: {end}"
            hint = "use a larger original: it teaches what small or enlarged pictures look like"
            found.append(Finding("below-resolution", "warning", example.id, message, hint))
        if largest.crop_share >= HEAVY_CROP:
            sides = "left and right" if largest.resize_w > largest.bucket_w else "top and bottom"
            into = f"{size} into {largest.bucket_w} x {largest.bucket_h}"
            message = f"loses {largest.crop_share:.0%} at {sides}: {into}"
            hint = "crop it yourself, or allow longer sides (dataset.buckets.max)"
            found.append(Finding("heavy-crop", "warning", example.id, message, hint))
    return found


def bucket_table(placements: Sequence[tuple[Placement, ...]]) -> tuple[BucketRow, ...]:
    """One row per bucket, fullest first."""
    shares: dict[tuple[int, int], list[float]] = defaultdict(list)
    for placed in placements:
        for one in placed:
            shares[one.size].append(one.crop_share)
    rows = [
        BucketRow(size[0], size[1], len(crops), sum(crops) / len(crops), max(crops)) for size, crops in shares.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.pictures, row.width, row.height)))


def folder_table(examples: Sequence[Example], folders: Sequence[Path]) -> tuple[FolderRow, ...]:
    """One row per data folder, and per subfolder with its own repeats."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if example.folder < len(folders):
            groups[_group(example)].append(example)
    return tuple(
        FolderRow(
            name,
            len(members),
            sum(member.repeats for member in members),
            all(member.prior for member in members),
        )
        for name, members in sorted(groups.items())
    )


def _group(example: Example) -> str:
    """The part of the id before the file's name: the folder and its subfolder."""
    return example.id.rpartition("/")[0] or example.id


def balance_findings(rows: Sequence[FolderRow]) -> list[Finding]:
    """Folders that an epoch shows many times as often as others (regularisation apart)."""
    own = [row for row in rows if not row.prior]
    if len(own) < 2:
        return []
    least, most = min(own, key=lambda row: row.shown), max(own, key=lambda row: row.shown)
    if most.shown < UNBALANCED * max(least.shown, 1):
        return []
    message = f"shows {most.name} {most.shown} times an epoch and {least.name} {least.shown} times: the first will rule"
    hint = "if all folders matter alike, write `dataset.balance: equal`"
    return [Finding("folders-unbalanced", "warning", None, message, hint, (most.name, least.name))]


def named_repeats(examples: Sequence[Example], folders: Sequence[Path], trigger: str | None) -> list[Finding]:
    """Folders called `10_mika`: what that name does, and what it does not."""
    found = {}
    for example in examples:
        parts = example.id.split("/")[:-1]
        for depth in range(len(parts) - 1, 0, -1):
            if match := REPEATS.fullmatch(parts[depth]):
                found["/".join(parts[: depth + 1])] = (match, "is seen")
                break
    for folder in folders:
        if match := REPEATS.fullmatch(printable(folder.resolve().name)):
            found[match[0]] = (match, "is not seen")
    return [
        Finding(
            "folder-repeats",
            "info",
            name,
            f"{verb} {int(match[1])} times an epoch for its name"
            + (": only the names of subfolders are read" if "not" in verb else ", which is no trigger"),
            f"write `repeats: {int(match[1])}` in the preset" if "not" in verb else
            "name the word that calls the LoRA in the preset (dataset.trigger)" if trigger is None else None,
        )
        for name, (match, verb) in found.items()
    ]  # fmt: skip


def twin_findings(examples: Sequence[Example]) -> list[Finding]:
    """Names that are the same on other systems: A.jpg and a.jpg, composed and decomposed accents."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        folded = unicodedata.normalize("NFC", str(example.path)).casefold()
        groups[folded].append(example)
    return [
        Finding(
            "name-twins",
            "warning",
            group[0].id,
            f"has the same name as {printable(group[1].path.name)} on Windows and macOS",
            "rename one, and its caption",
            tuple(example.id for example in group[1:]),
        )
        for group in groups.values()
        if len(group) > 1
    ]
