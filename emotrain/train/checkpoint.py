"""Checkpoints that are there whole or not at all.

A save writes safetensors and JSON files, each with its step inside, and a manifest (which files, how long, which
sha256) into a temporary folder, brings every file and the folder to the disk, reads them back, and renames the folder:
that rename is the commit. Only then are older ones removed. A load takes nothing that does not match its manifest.
Whoever saves or loads holds the run's lock, so that what an earlier save left half-done is nobody's work.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotrain import __version__
from emotrain.errors import CheckpointError, DivergedError, ResourceError
from emotrain.files import (
    MAX_JSON,
    Stage,
    decode_json,
    encode_json,
    fsync_folder,
    header_at,
    is_regular,
    no_stage,
    write_synced,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "MANIFEST.json"
SCHEMA_VERSION = 3  # 1: emotrain 0.1; 2: with a parent and a digest of the preset, which nothing read
MIN_KEEP = 2  # the newest may be the one that a fault hits
STEP_FOLDER = re.compile(r"step-(\d{1,15})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}\.(safetensors|json)")
_STALE = re.compile(r"\.(?:tmp-step-\d+-\d+|del-.*)")


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
        manifest = Manifest(step, entries, best)
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
            hint = "the run was not saved yet: start it anew under another --name, or once its folder is removed"
            raise CheckpointError(f"no checkpoint in {self.folder}", hint)
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
        """Remove what interrupted saves (`.tmp-`) and prunes (`.del-`) left."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if _STALE.fullmatch(path.name) and not path.is_symlink():
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


# ------------------------------------------------------------ the manifest


class Unusable(Exception):
    """Why a checkpoint cannot be used, in a few words."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint; `size` in bytes."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder holds, and whether it is the best of its run so far."""

    step: int
    files: Mapping[str, FileEntry]
    best: bool = False
    emotrain: str = __version__

    def to_bytes(self) -> bytes:
        """The file: JSON that holds the sha256 of its own other fields."""
        fields = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return encode_json({**fields, "sha256": _digest(fields)})


def folder_name(step: int) -> str:
    """Where the checkpoint of `step` lies: `step-00000250`."""
    return f"step-{step:08d}"


def step_folders(folder: Path) -> dict[int, Path]:
    """The checkpoint folders in `folder` by step, rising; links and other names are left alone."""
    found: dict[int, Path] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        match = STEP_FOLDER.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        step = int(match[1])
        if step not in found or path.name == folder_name(step):
            found[step] = path
    return dict(sorted(found.items()))


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder; no other file is read.

    Raises:
        Unusable: it is missing or damaged, or names another step than its folder.
        CheckpointError: a newer emotrain wrote it.
    """
    try:
        fields = decode_json(_read_plain(path / MANIFEST))
    except ValueError as error:
        raise Unusable(f"{MANIFEST} is not readable JSON") from error
    if not isinstance(fields, dict) or fields.pop("sha256", None) != _digest(fields):
        raise Unusable(f"{MANIFEST} does not match its own sha256")
    version = fields.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path.name} was written by emotrain {fields.get('emotrain')} in a format this one "
            f"({__version__}) cannot read",
            "finish it with that version, or start a new run from its LoRA with start_from.continue"
            if version in range(SCHEMA_VERSION)
            else "upgrade emotrain",
        )
    try:
        files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
        manifest = Manifest(files=files, **fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise Unusable(f"{MANIFEST} has other fields than expected") from error
    _check(manifest, path)
    return manifest


def read_file(folder: Path, name: str, entry: FileEntry) -> bytes:
    """The bytes of one file, once they are what the manifest says.

    Raises:
        Unusable: missing, of another size, or with another sha256.
    """
    content = _read_plain(folder / name)
    if len(content) != entry.size:
        raise Unusable(f"{name} has {len(content)} bytes instead of {entry.size}")
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise Unusable(f"{name} sha256 mismatch")
    return content


def _read_plain(path: Path) -> bytes:
    """All bytes of a plain file; links, pipes and devices are not opened."""
    if path.is_symlink() or not is_regular(path):
        raise Unusable(f"{path.name} is missing")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path.name} cannot be read ({error.strerror})") from error


def entry_of(content: bytes) -> FileEntry:
    """The manifest's entry for these bytes."""
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def _check(manifest: Manifest, path: Path) -> None:
    match = STEP_FOLDER.fullmatch(path.name)
    if match is not None and manifest.step != int(match[1]):
        raise Unusable(f"{MANIFEST} is of step {manifest.step}")
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name):
            raise Unusable(f"{MANIFEST} names a file outside of the checkpoint")


def _digest(fields: Any) -> str:
    return hashlib.sha256(encode_json(fields)).hexdigest()


# ------------------------------------------------------------ contents as files and back


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    `tensors` maps a file's stem to its tensors (CPU, dtype as saved), `documents` a file's stem to
    its JSON value.
    """

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, Any]
    best: bool = False


def to_files(step: int, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> dict[str, bytes]:
    """The files' bytes by name.

    Raises:
        DivergedError: a tensor holds a number that is not finite.
        ValueError: a document that JSON cannot hold.
    """
    import torch
    from safetensors.torch import save

    from emotrain.batch import fetch

    files = {}
    for stem, given in tensors.items():
        named = dict(zip(given, fetch(list(given.values())), strict=True))
        for name, tensor in named.items():
            if not bool(torch.isfinite(tensor).all()):
                raise DivergedError(
                    f"step {step} was not saved: `{name}` of `{stem}` is not finite",
                    "the checkpoints before it are whole",
                )
        files[f"{stem}.safetensors"] = save(named, metadata={"step": str(step)})
    for stem, value in documents.items():
        files[f"{stem}.json"] = encode_json({"step": step, "value": value})
    return files


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, every byte of it verified.

    Raises:
        Unusable: something is missing, damaged or of another step.
        CheckpointError: a newer emotrain wrote it.
    """
    manifest = read_manifest(path)
    contents = ((name, read_file(path, name, entry)) for name, entry in manifest.files.items())
    return from_files(path, manifest.step, contents, best=manifest.best)


def from_files(path: Path, step: int, contents: Iterable[tuple[str, bytes]], *, best: bool) -> Checkpoint:
    """Inverse of `to_files`: the checkpoint of `step` with these names and bytes.

    Raises:
        Unusable: one cannot be read, or is of another step.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    tensors: dict[str, dict[str, Tensor]] = {}
    documents: dict[str, Any] = {}
    for name, content in contents:
        stem, _, kind = name.partition(".")
        try:
            if kind == "safetensors":
                metadata = header_at(io.BytesIO(content), len(content), MAX_JSON)[1]
                own_step, tensors[stem] = int(metadata["step"]), load(content)
            else:
                document = decode_json(content)
                own_step, documents[stem] = document["step"], document["value"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise Unusable(f"{name} cannot be read ({error})") from error
        if own_step != step:
            raise Unusable(f"{name} is of step {own_step}")
    return Checkpoint(step, path, tensors, documents, best)
