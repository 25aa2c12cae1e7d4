"""Where the cache lies, how large it is, and how to empty it (no torch).

Entries are `v1/<kind>/<first two letters>/<key>.safetensors` below the cache folder. Only files of
this form are ever counted or removed, so a folder named by mistake keeps everything else in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "EMOTRAIN_CACHE"
LAYOUT = "v1"
KINDS = ("latents", "masks", "texts")
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors|\.tmp-[0-9a-f]{64}\.safetensors-\d+-\d+")


@dataclass(frozen=True)
class Usage:
    """What one kind of entry takes: their number and bytes."""

    kind: str
    entries: int
    size: int


def default_cache_dir() -> Path:
    """`$EMOTRAIN_CACHE`, else `emotrain` in the platform's folder for caches."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        return Path(base) / "emotrain" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "emotrain"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emotrain"


def entry_path(folder: Path, kind: str, key: str) -> Path:
    """The file of one entry."""
    return folder / LAYOUT / kind / key[:2] / f"{key}.safetensors"


def measure(folder: Path) -> tuple[Usage, ...]:
    """Number and bytes of the entries of each kind; zeros where there is no cache."""
    sizes: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for kind, path in _entries(folder):
        with contextlib.suppress(OSError):
            sizes[kind].append(path.stat().st_size)
    return tuple(Usage(kind, len(found), sum(found)) for kind, found in sizes.items())


def clear(folder: Path, *, unused_days: float | None = None) -> tuple[int, int]:
    """Remove all entries, or those not used for so many days; returns their number and bytes.

    Raises:
        OSError: an entry cannot be removed.
    """
    count = size = 0
    before = None if unused_days is None else time.time() - unused_days * 86_400
    for _, path in list(_entries(folder)):
        with contextlib.suppress(FileNotFoundError):  # another process cleared it
            status = path.stat()
            if before is None or status.st_mtime < before:
                path.unlink()
                count, size = count + 1, size + status.st_size
    return count, size


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    for kind in KINDS:
        for path in sorted((folder / LAYOUT / kind).glob("??/*")):
            if ENTRY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                yield kind, path
