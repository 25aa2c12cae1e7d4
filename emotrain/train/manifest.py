"""What makes a checkpoint folder one thing: which files, how long, which sha256 (no torch)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emotrain import __version__
from emotrain.errors import CheckpointError
from emotrain.train.durable import decode_json, encode_json

MANIFEST = "MANIFEST.json"
SCHEMA_VERSION = 2  # 1: emotrain 0.1
STEP_FOLDER = re.compile(r"step-(\d{1,15})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}\.(safetensors|json)")


class Unusable(Exception):
    """Why a checkpoint cannot be used, in a few words."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint; `size` in bytes."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder holds; `parent` is the checkpoint that the run went on from."""

    step: int
    files: Mapping[str, FileEntry]
    config_hash: str
    parent: str | None = None
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
        fields = decode_json(read_regular(path / MANIFEST))
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
    content = read_regular(folder / name)
    if len(content) != entry.size:
        raise Unusable(f"{name} has {len(content)} bytes instead of {entry.size}")
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise Unusable(f"{name} sha256 mismatch")
    return content


def read_regular(path: Path) -> bytes:
    """All bytes of a plain file; links, pipes and devices are not opened.

    Raises:
        Unusable: missing, unreadable, or no plain file.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise Unusable(f"{path.name} is missing")
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
