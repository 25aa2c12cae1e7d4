"""Writing caption files so that it can be taken back: the originals go into a journal first (no torch).

A journal is a JSON file in the hidden folder `.emotrain-captions` of the data folder. It is on the disk before the
first caption changes, and each file is replaced as a whole: after a crash every file is either the old or the new one,
and the journal knows both.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from emotrain.dataset.textfile import MAX_CAPTION_BYTES, MAX_METADATA_BYTES, FileProblem, printable, read_bytes
from emotrain.dataset.walk import inside
from emotrain.errors import CheckpointError, DatasetError
from emotrain.files import Stage, fsync_folder, no_stage, replace_file, strict_json, write_synced

JOURNALS = ".emotrain-captions"
VERSION = 1


@dataclass(frozen=True)
class Change:
    """A caption file before and after; `before` is None where there is none yet."""

    path: Path
    before: bytes | None
    after: bytes


@dataclass(frozen=True)
class Undone:
    """What `undo` did: how many files are as they were, and those that someone changed in the meantime."""

    num_restored: int
    left_alone: tuple[Path, ...]


def why_not(path: Path, root: Path) -> str | None:
    """Why a caption file is not written to, as the end of a sentence; None where it can be."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None if os.access(path.parent, os.W_OK) else "lies in a folder that cannot be written to"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    if stat.S_ISLNK(status.st_mode):
        return "is a link: what it points to is not changed"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if not inside(path, root):
        return "lies outside of the folder"
    if not status.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(path, os.W_OK):
        return "is read-only"
    return None if os.access(path.parent, os.W_OK) else "lies in a folder that cannot be written to"


def write(changes: Sequence[Change], root: Path, stage: Stage = no_stage) -> Path:
    """Change caption files; the journal is written first.

    Args:
        changes: files below `root`; none of them twice.
        root: the data folder.
        stage: told what comes next, for tests of crashes.

    Returns:
        The journal.

    Raises:
        DatasetError: a file cannot be written to, or is not what it was when it was read; nothing is changed then.
        OSError: no space or no permission; what was changed by then is in the journal.
    """
    for change in changes:
        if (why := why_not(change.path, root)) is not None:
            raise DatasetError(f"{printable(change.path)} {why}", "nothing was changed")
        if _now(change.path) != change.before:
            raise DatasetError(f"{printable(change.path)} was changed in the meantime", "nothing was changed")
    journal = _new_journal(root, changes, stage)
    for change in changes:
        stage(f"change {change.path.name}")
        _put(change.path, change.after)
    return journal


def undo(root: Path) -> Undone:
    """Take the last `write` back.

    Files that were changed since are left alone; their originals stay in the journal.

    Raises:
        CheckpointError: there is nothing to take back, or the journal cannot be used.
    """
    journals = sorted((root / JOURNALS).glob("*.json")) if not (root / JOURNALS).is_symlink() else []
    if not journals:
        raise CheckpointError(f"{printable(root)} has no changes of `emotrain caption` to take back")
    journal = journals[-1]
    entries = list(_read_journal(journal, root))
    left = []
    restored = 0
    for path, before, after in entries:
        now = _now(path)
        if now == before:
            restored += 1
        elif now is not None and hashlib.sha256(now).hexdigest() == after and why_not(path, root) is None:
            if before is None:
                path.unlink()
            else:
                _put(path, before)
            restored += 1
        else:
            left.append((path, before, after))
    if left:
        replace_file(journal, _encode(left, root))
    else:
        journal.unlink()
        if not any((root / JOURNALS).iterdir()):
            (root / JOURNALS).rmdir()
    return Undone(restored, tuple(path for path, _, _ in left))


def _new_journal(root: Path, changes: Sequence[Change], stage: Stage) -> Path:
    folder = root / JOURNALS
    if folder.is_symlink():
        raise DatasetError(f"{printable(folder)} is a link: nothing was changed")
    folder.mkdir(exist_ok=True)
    last = max((int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()), default=0)
    journal = folder / f"{last + 1:06d}.json"
    entries = [(change.path, change.before, hashlib.sha256(change.after).hexdigest()) for change in changes]
    write_synced(journal, _encode(entries, root), stage)
    fsync_folder(folder)
    fsync_folder(root)
    return journal


def _encode(entries: Sequence[tuple[Path, bytes | None, str]], root: Path) -> bytes:
    files = [
        {
            "path": path.relative_to(root).as_posix(),
            "before": None if before is None else base64.b64encode(before).decode("ascii"),
            "after": after,
        }
        for path, before, after in entries
    ]
    return json.dumps({"version": VERSION, "files": files}).encode("ascii")


def _read_journal(journal: Path, root: Path) -> Iterator[tuple[Path, bytes | None, str]]:
    """Its entries, each checked: a journal may have come with a stranger's pictures."""
    try:
        found = strict_json(read_bytes(journal, limit=MAX_METADATA_BYTES))
        if found["version"] != VERSION:
            raise ValueError("another version of emotrain wrote it")
        for entry in found["files"]:
            parts = PurePosixPath(entry["path"]).parts
            if not parts or entry["path"].startswith("/") or ".." in parts or not isinstance(entry["after"], str):
                raise ValueError("it names a file outside of the folder")
            before = None if entry["before"] is None else base64.b64decode(entry["before"], validate=True)
            if before is not None and len(before) > MAX_CAPTION_BYTES:
                raise ValueError("it holds more than a caption")
            path = root.joinpath(*parts)
            if not inside(path.parent, root):
                raise ValueError("it names a file outside of the folder")
            yield path, before, entry["after"]
    except (ValueError, KeyError, TypeError, AttributeError, FileProblem) as error:
        raise CheckpointError(f"{printable(journal)} cannot be used: {error}") from error


def _now(path: Path) -> bytes | None:
    try:
        return read_bytes(path, limit=MAX_CAPTION_BYTES)
    except FileProblem as problem:
        if problem.code == "missing":
            return None
        raise


def _put(path: Path, content: bytes) -> None:
    """Replace a file as a whole, with the permissions that it had."""
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    replace_file(path, content)
    if mode is not None:
        path.chmod(mode)
