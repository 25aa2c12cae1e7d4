"""Every entry of a folder, named and sorted, without following anything out of it (no torch)."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HIDDEN = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"))
REPEATS = re.compile(r"(\d{1,3})_.+", re.DOTALL)  # up to 999: 2024_holiday is a year, not a count
RUN_INFO = "run.json"  # a folder that holds it is a run
UNREAD = {
    "broken-link": "is a link to nothing",
    "linked-folder": "is a link to a folder: links to folders are not followed",
    "not-a-file": "is not a regular file (a pipe, socket or device)",
    "run-folder": "is a run of emotrain: nothing in it is data",
}


@dataclass(frozen=True)
class Entry:
    """One file below a folder, or why it is none.

    `parts` are the names from the folder down; `repeats` comes from the nearest `N_name` subfolder
    (1 where none is); `problem` is a key of `UNREAD`, or the system's own words for `unreadable`.
    """

    path: Path
    parts: tuple[str, ...]
    repeats: int = 1
    problem: str | None = None
    detail: str = ""
    is_link: bool = False


@dataclass
class Walk:
    """What a walk has seen: entries, and how many hidden ones it left out."""

    entries: list[Entry]
    hidden: int = 0


def walk(root: Path, *, leave_out: Iterable[Path] = ()) -> Walk:
    """All files below `root` in the order of their names, subfolders included.

    Hidden and system entries (a leading dot, `Thumbs.db`, `__MACOSX`, ...) are counted and not
    opened. Folders in `leave_out` are not entered. Links to folders are not followed, so no loop
    can be.
    """
    seen = Walk([])
    left_out = {_identity(path) for path in leave_out} - {None}
    pending: list[tuple[Path, tuple[str, ...], int]] = [(root, (), 1)]
    while pending:
        folder, parts, repeats = pending.pop()
        try:
            with os.scandir(folder) as listing:
                found = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            seen.entries.append(Entry(folder, parts, problem="unreadable", detail=str(error.strerror)))
            continue
        below = []
        for item in found:
            path = folder / item.name
            inner = (*parts, item.name)
            if item.name.startswith(".") or item.name.lower() in HIDDEN:
                seen.hidden += 1
            elif item.is_dir(follow_symlinks=False):
                if (path / RUN_INFO).is_file():
                    seen.entries.append(Entry(path, inner, problem="run-folder"))
                elif _identity(path) not in left_out:
                    below.append((path, inner, _repeats(item.name, repeats)))
            else:
                seen.entries.append(_file(item, path, inner, repeats))
        pending.extend(reversed(below))
    return seen


def _file(item: os.DirEntry[str], path: Path, parts: tuple[str, ...], repeats: int) -> Entry:
    is_link = item.is_symlink()
    try:
        mode = item.stat().st_mode
    except OSError as error:
        if is_link:
            return Entry(path, parts, repeats, "broken-link", is_link=True)
        return Entry(path, parts, repeats, "unreadable", str(error.strerror))
    problem = None
    if stat.S_ISDIR(mode):
        problem = "linked-folder"
    elif not stat.S_ISREG(mode):
        problem = "not-a-file"
    return Entry(path, parts, repeats, problem, is_link=is_link)


def _repeats(name: str, above: int) -> int:
    match = REPEATS.fullmatch(name)
    return int(match[1]) if match else above


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def inside(path: Path, root: Path) -> bool:
    """Whether `path`, links followed, lies below `root`."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        return False


def stem_key(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Parts with the last one's extension taken off: ("a", "b.jpg") -> ("a", "b")."""
    name = parts[-1] if parts else ""
    return (*parts[:-1], os.path.splitext(name)[0])


def composed(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Names in Unicode's NFC: Macs write them decomposed (NFD), others composed, and both look the same."""
    return tuple(unicodedata.normalize("NFC", part) for part in parts)
