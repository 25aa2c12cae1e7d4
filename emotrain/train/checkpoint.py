"""Checkpoints that are there whole or not at all.

A save writes into a temporary folder, brings every file and the folder to the disk, reads them
back, and renames the folder: that rename is the commit. Only then are older ones removed. A load
takes nothing that does not match its manifest.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emotrain.errors import CheckpointError, ResourceError
from emotrain.train.durable import (
    Stage,
    fsync_folder,
    no_stage,
    process_lives,
    write_synced,
)
from emotrain.train.manifest import (
    MANIFEST,
    Manifest,
    Unusable,
    entry_of,
    folder_name,
    read_file,
    read_manifest,
    step_folders,
)
from emotrain.train.snapshot import Checkpoint, read_checkpoint, to_files

__all__ = ["Checkpoint", "CheckpointStore"]

MIN_KEEP = 2  # the newest may be the one that a fault hits
_STALE = re.compile(r"\.(?:tmp-step-\d+-(?P<pid>\d+)|del-.*)")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made at the first save.
        keep_last: how many of the newest are kept, the best besides.
        stage: called with the name of every stage of a save and prune, before and after it.

    Raises:
        ValueError: `keep_last` is below 2.
    """

    def __init__(self, folder: Path, keep_last: int = 3, *, stage: Stage = no_stage) -> None:
        if keep_last < MIN_KEEP:
            raise ValueError(f"keep_last must be at least {MIN_KEEP}, got {keep_last}")
        self.folder = folder
        self.keep_last = keep_last
        self._stage = stage

    def steps(self) -> tuple[int, ...]:
        """Steps that have a checkpoint folder, rising; whether they are whole shows on load."""
        return tuple(step_folders(self.folder))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Any],
        *,
        best: bool = False,
        keep: Collection[int] = (),
        config_hash: str,
        parent: str | None = None,
    ) -> Path:
        """Commit one checkpoint, then remove those that are no longer kept (`keep` are). Returns its folder.

        Raises:
            DivergedError: a tensor holds a number that is not finite; nothing was written.
            ValueError: a document that JSON cannot hold, e.g. with a NaN; nothing was written.
            ResourceError: the disk is full, read-only or refuses; earlier checkpoints are as they
                were, and nothing half-written is left.
        """
        files = to_files(step, tensors, documents)
        entries = {name: entry_of(content) for name, content in files.items()}
        manifest = Manifest(step, entries, config_hash, parent, best)
        target = self.folder / folder_name(step)
        temporary = self.folder / f".tmp-{target.name}-{os.getpid()}"
        try:
            self.sweep()
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            self._stage("made temporary folder")
            for name, content in (*files.items(), (MANIFEST, manifest.to_bytes())):
                write_synced(temporary / name, content, self._stage)
            fsync_folder(temporary)
            self._stage("synced temporary folder")
            for name, entry in entries.items():
                read_file(temporary, name, entry)
            self._stage("read back")
            self._make_room(target)
            temporary.rename(target)
            self._stage("renamed")
            fsync_folder(self.folder)
            self._stage("committed")
        except (OSError, Unusable) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _refusal(step, self.folder, error) from error
        self._prune(keep)
        return target

    def load(self, step: int | None = None) -> tuple[Checkpoint, list[str]]:
        """The checkpoint of `step`, or the newest whole one; and a line for each one skipped.

        Skipped ones are renamed to `.bad-...` once a whole one is found; nothing is ever deleted.

        Raises:
            CheckpointError: that step is not there or damaged, there is none that is whole, or a
                newer emotrain wrote it.
        """
        self.sweep()
        found = step_folders(self.folder)
        if step is not None:
            return self._load_named(step, found), []
        skipped: list[tuple[int, str]] = []
        for candidate in reversed(found):
            try:
                checkpoint = read_checkpoint(found[candidate])
            except Unusable as error:
                skipped.append((candidate, str(error)))
                continue
            return checkpoint, [self._put_aside(found[bad], why) for bad, why in skipped]
        if not skipped:
            raise CheckpointError(f"no checkpoint in {self.folder}", "a run that was not saved yet has to start anew")
        reasons = "; ".join(f"{found[bad].name}: {why}" for bad, why in skipped)
        raise CheckpointError(
            f"no whole checkpoint in {self.folder} ({reasons})",
            "they were left as they are; restore one from a copy, or start a new run with --name",
        )

    def drop_after(self, step: int) -> list[str]:
        """Set aside the checkpoints after `step`, for a run that goes back to it.

        Without this the next resume would take one of the line that was left. Nothing is deleted.

        Raises:
            ResourceError: a folder cannot be renamed.
        """
        notices = []
        for later, path in step_folders(self.folder).items():
            if later > step:
                try:
                    left = _rename_free(path, f".left-{path.name}")
                except OSError as error:
                    raise ResourceError(f"{path} cannot be renamed: {error.strerror}") from error
                notices.append(f"{path.name} is of the line that was left; it is now {left.name}")
        return notices

    def sweep(self) -> None:
        """Remove what interrupted saves (`.tmp-`, of dead processes) and prunes (`.del-`) left."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            match = _STALE.fullmatch(path.name)
            if match is None or path.is_symlink():
                continue
            pid = int(match["pid"] or 0)
            if pid == os.getpid() or not process_lives(pid):
                shutil.rmtree(path, ignore_errors=True)

    def _load_named(self, step: int, found: Mapping[int, Path]) -> Checkpoint:
        if step not in found:
            there = ", ".join(str(known) for known in found) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}", f"there: {there}")
        try:
            return read_checkpoint(found[step])
        except Unusable as error:
            raise CheckpointError(
                f"{found[step]} is damaged: {error}",
                "without --checkpoint the newest whole one is used",
            ) from error

    def _put_aside(self, path: Path, why: str) -> str:
        with contextlib.suppress(OSError):
            _rename_free(path, f".bad-{path.name}")
        return f"skipped {path.name}: {why}"

    def _make_room(self, target: Path) -> None:
        if target.exists():
            _rename_free(target, f".left-{target.name}")
            self._stage("set the former one aside")

    def _prune(self, keep: Collection[int]) -> None:
        found = step_folders(self.folder)
        kept = {*list(found)[-self.keep_last :], *keep}
        best = next((step for step in reversed(found) if _is_best(found[step])), None)
        for step, path in found.items():
            if step in kept or step == best:
                continue
            with contextlib.suppress(OSError):  # tried again after the next save
                doomed = _rename_free(path, f".del-{path.name}")
                self._stage(f"pruning {path.name}")
                shutil.rmtree(doomed)
                self._stage(f"pruned {path.name}")


def _is_best(path: Path) -> bool:
    try:
        return read_manifest(path).best
    except (Unusable, CheckpointError):
        return False


def _rename_free(path: Path, name: str) -> Path:
    """Rename within the folder, to the first of `name`, `name-2`, `name-3`, ... that is free."""
    target, count = path.with_name(name), 1
    while os.path.lexists(target):
        count += 1
        target = path.with_name(f"{name}-{count}")
    return path.rename(target)


def _refusal(step: int, folder: Path, error: OSError | Unusable) -> ResourceError:
    why = error.strerror if isinstance(error, OSError) else f"read back wrong: {error}"
    return ResourceError(
        f"step {step} could not be saved in {folder}: {why}",
        "earlier checkpoints are as they were; make room, the next save tries again",
    )
