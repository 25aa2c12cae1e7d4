"""What a disk may hold after a power cut: only what was brought to it is sure, the rest may be there or not.

A process under `record` writes down, in order, every change of names (create, rename, remove) below a folder, and at
every fsync what that made sure: of a file its bytes, of a folder its names. `after_power_cut` builds a folder that an
unkind but legal disk could hold at the last moment: names that were not synced come and go by chance, files that were
not synced are whole, cut, zeros or empty by chance, and so is what was added to a file since it was synced.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def record(root: Path, journal: Path, before: Callable[[str], None]) -> None:
    """From now on, in this process: note every change below `root` in `journal`; call `before` ahead of each.

    `journal` is a folder outside of `root`; it gets `ops.jsonl`, and the bytes of every synced file.
    """
    journal.mkdir(parents=True, exist_ok=True)
    log = os.open(journal / "ops.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    inside = str(root)
    busy = [False]

    def note(kind: str, *paths: str) -> None:
        os.write(log, (json.dumps([kind, *paths]) + "\n").encode())

    def full(path: Any, folder: int = -1) -> str:
        if isinstance(path, int):
            return ""
        text = os.fsdecode(path)
        base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
        return os.path.normpath(os.path.join(base, text))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if busy[0]:
            return
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & WRITES:
                return
            ops = [("create", full(args[0]))] if args[0] is not None else []
        elif event == "os.rename":
            ops = [("rename", full(args[0], args[2]), full(args[1], args[3]))]
        elif event in ("os.remove", "os.rmdir"):
            ops = [("remove", full(args[0], args[1]))]
        elif event == "os.mkdir":
            ops = [("mkdir", full(args[0], args[2]))]
        else:
            return
        for kind, *paths in ops:
            if any(path.startswith(inside) for path in paths):
                busy[0] = True
                try:
                    before(f"{kind} {os.path.basename(paths[0])}")
                    note(kind, *paths)
                finally:
                    busy[0] = False

    plain_fsync, count = os.fsync, [0]

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        if not path.startswith(inside):
            plain_fsync(descriptor)
            return
        before(f"fsync {os.path.basename(path)}")
        plain_fsync(descriptor)
        busy[0] = True
        try:
            if os.path.isdir(path):
                note("sync_folder", path)
            else:
                count[0] += 1
                shutil.copyfile(path, journal / f"{os.getpid()}-{count[0]}")
                note("sync_file", path, f"{os.getpid()}-{count[0]}")
        finally:
            busy[0] = False

    os.fsync = fsync
    sys.addaudithook(hook)


class _Disk:
    """Names and bytes that are sure, and changes of names that are not yet, folder by folder."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.names: dict[str, int] = {}  # path -> file number (0: a folder), as the process sees it
        self.sure: dict[str, int] = {}  # the same on the disk
        self.content: dict[int, str] = {}  # file number -> copy of its synced bytes
        self.pending: list[tuple[str, list[tuple[str, str, int]]]] = []  # (folder, changes that go together)
        self.last = 0

    def add(self, kind: str, *paths: str) -> None:
        path = paths[0]
        folder = os.path.dirname(path)
        if kind == "create" and path not in self.names:
            self.last += 1
            self.names[path] = self.last
            self.pending.append((folder, [("set", path, self.last)]))
        elif kind == "mkdir" and path not in self.names:
            self.names[path] = 0
            self.pending.append((folder, [("set", path, 0)]))
        elif kind == "remove" and path in self.names:
            del self.names[path]
            self.pending.append((folder, [("drop", path, 0)]))
        elif kind == "rename" and path in self.names:
            self._move(self.names, path, paths[1])
            self.pending.append((folder, [("move", path, 0), ("to", paths[1], 0)]))
        elif kind == "sync_file" and path in self.names:
            self.content[self.names[path]] = paths[1]
        elif kind == "sync_folder":
            mine = [changes for where, changes in self.pending if where == path]
            self.pending = [(where, changes) for where, changes in self.pending if where != path]
            for changes in mine:
                self.apply(changes)

    @staticmethod
    def _move(names: dict[str, int], source: str, target: str) -> None:
        for path in [path for path in names if path == target or path.startswith(target + "/")]:
            del names[path]
        for path in [path for path in names if path == source or path.startswith(source + "/")]:
            names[target + path[len(source) :]] = names.pop(path)

    def apply(self, changes: list[tuple[str, str, int]]) -> None:
        kind, path, number = changes[0]
        if kind == "set":
            self.sure[path] = number
        elif kind == "drop":
            for inner in [name for name in self.sure if name == path or name.startswith(path + "/")]:
                del self.sure[inner]
        elif path in self.sure:
            target = changes[1][1]
            self._move(self.sure, path, target)
            self.pending = [
                (_renamed(where, path, target), [(k, _renamed(p, path, target), n) for k, p, n in rest])
                for where, rest in self.pending
            ]

    def cut(self) -> None:
        """Of what is pending, some has reached the disk: of each folder a prefix, or any part of it."""
        ordered = self.chance.random() < 0.5
        stopped: set[str] = set()
        while self.pending:
            where, changes = self.pending.pop(0)
            if where in stopped:
                continue
            if self.chance.random() < 0.5:
                self.apply(changes)
            elif ordered:
                stopped.add(where)


def _renamed(path: str, source: str, target: str) -> str:
    return target + path[len(source) :] if path == source or path.startswith(source + "/") else path


def after_power_cut(root: Path, journal: Path, target: Path, seed: int) -> list[str]:
    """Build in `target` what `root` may look like on the disk after a power cut; the paths that are there.

    Args:
        root: the folder that was recorded, as it is now.
        journal: what `record` has written.
        target: new folder.
        seed: of the chance.
    """
    chance = random.Random(seed)
    disk = _Disk(chance)
    for line in (journal / "ops.jsonl").read_text().splitlines():
        disk.add(*json.loads(line))
    live = {number: path for path, number in disk.names.items()}
    disk.cut()
    target.mkdir(parents=True)
    for path, number in sorted(disk.sure.items()):
        place = target / os.path.relpath(path, root)
        if number == 0:
            place.mkdir(parents=True, exist_ok=True)
            continue
        if not place.parent.is_dir():
            continue  # its folder's name has not reached the disk
        now = Path(live[number]).read_bytes() if number in live and Path(live[number]).is_file() else b""
        if number in disk.content:
            sure = (journal / disk.content[number]).read_bytes()
            later = now[len(sure) :] if now.startswith(sure) else b""  # lines that were added to a log since
            place.write_bytes(sure + chance.choice((later, later[: len(later) // 2], bytes(len(later)), b"")))
            continue
        kinds = (now, now[: len(now) // 2], bytes(len(now)), b"")
        place.write_bytes(chance.choice(kinds))
    return [str(path.relative_to(target)) for path in sorted(target.rglob("*"))]
