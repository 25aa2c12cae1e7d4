"""How much of the computer's memory a process may still take (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# Where a control group says its limit, what it uses, and what of that are pages of files, which it can give back.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


@dataclass(frozen=True)
class Ram:
    """Bytes: of memory in all, what is free of it, and free swap, where pages wait that are seldom used."""

    total: int
    free: int
    swap: int


def ram(root: Path = Path("/")) -> Ram:
    """Of this machine, or of the narrowest of the control groups (container, service) that this process is in.

    Args:
        root: under which the system's own files lie.
    """
    memory = psutil.virtual_memory()
    total, free, swap = memory.total, memory.available, psutil.swap_memory().free
    for folder, (most, used, cached) in _groups(root):
        if (limit := _number(folder / most)) is None:
            continue
        held = _number(folder / used) or 0
        stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
        total = min(total, limit)
        free = min(free, max(0, limit - held + sum(int(stat.get(name, 0)) for name in cached)))
        if (swap_limit := _number(folder / "memory.swap.max")) is not None:
            swap = min(swap, max(0, swap_limit - (_number(folder / "memory.swap.current") or 0)))
    return Ram(total, free, swap)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """The control groups of this process with the names of their files; within a container those that can be seen."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                yield folder, VERSION_1 if kinds else VERSION_2


def _number(path: Path) -> int | None:
    """A file's number; None where it is not there, or says that there is no limit."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
