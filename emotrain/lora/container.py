"""The safetensors container: the same bytes for the same content, written whole or not at all, read with distrust."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from emotrain.errors import ModelError, ResourceError
from emotrain.files import parse_header

MAX_FILE = 8 * 2**30  # bytes
MAX_HEADER = 8 * 2**20  # bytes
MAX_TENSORS = 20_000

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_WHOLE = {"I64", "I32", "I16", "I8", "U8"}
_DISGUISES = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "download the file, for example with `git lfs pull`",
    ),
    (
        b"<!doctype",
        "a web page, not a safetensors file",
        "the download gave a page instead of the file: download it again",
    ),
    (b"<html", "a web page, not a safetensors file", "the download gave a page instead of the file: download it again"),
    (
        b"pk\x03\x04",
        "a zip or .pt file, not a safetensors file",
        "convert it to safetensors with the tool that made it",
    ),
    (b"\x80\x02", "a pickle, which is never opened", "convert it to safetensors with the tool that made it"),
    (b"\x80\x04", "a pickle, which is never opened", "convert it to safetensors with the tool that made it"),
    (b"gguf", "a GGUF file, not a safetensors file", None),
)


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """Yield the file's bytes: header length, header, then each tensor. Wider dtypes first, then by name.

    Raises:
        ValueError: a metadata value that is not a string, or a dtype other than float64, 32, 16 and bfloat16.
    """
    odd = next((key for key, value in metadata.items() if not isinstance(value, str)), None)
    if odd is not None:
        raise ValueError(f"metadata must hold strings, `{odd}` does not")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"`{name}` has dtype {tensor.dtype}")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write the file as a whole or not at all: a temporary one beside it, fsync, rename, fsync of the folder.

    Returns:
        sha256 of the file.

    Raises:
        ResourceError: the disk is full.
        ModelError: the folder cannot be written to.
    """
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for piece in encode(tensors, metadata):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{path}: the disk is full", "make room; what was there before is untouched") from error
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror})", "is the folder there, and yours?"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # a place that takes no file holds none
            temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as they are stored, and the metadata, after every check that costs no memory.

    Raises:
        ModelError: not a file, not safetensors (said what it is instead), damaged, too large, or with duplicate names.
    """
    entries, metadata = read_header(path)
    for name, entry in entries.items():
        allowed = _FLOATS | _WHOLE if name.endswith(".alpha") else _FLOATS
        if entry.get("dtype") not in allowed:
            raise ModelError(f"{path}: `{name}` has dtype {entry.get('dtype')}, a LoRA holds floating-point numbers")
    try:
        return load_file(path), metadata
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{path}: damaged safetensors file ({_one_line(error)})", "download or copy it again"
        ) from error


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(name -> {dtype, shape, data_offsets}, metadata) without reading a tensor.

    Raises:
        ModelError: as `read`, as far as the header shows it.
    """
    size = _regular_size(path)
    try:
        with path.open("rb") as file:
            start = file.read(512)
            _refuse_disguise(path, start)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ModelError(f"{path}: not a safetensors file, or a damaged one", "download or copy it again")
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    return _parsed_header(path, text, size - 8 - length)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _regular_size(path: Path) -> int:
    try:
        info = path.stat()
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such LoRA file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"{path}: not a file", "name the .safetensors file itself")
    if info.st_size == 0:
        raise ModelError(f"{path}: the file is empty", "download or copy it again")
    if info.st_size > MAX_FILE:
        raise ModelError(f"{path}: {info.st_size / 2**30:.1f} GiB is more than a LoRA has, is it a whole model?")
    return info.st_size


def _refuse_disguise(path: Path, start: bytes) -> None:
    low = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for mark, what, hint in _DISGUISES:
        if low.startswith(mark) or start.lower().startswith(mark):
            raise ModelError(f"{path}: it is {what}", hint)


def _parsed_header(path: Path, text: bytes, data_size: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    try:
        header, metadata = parse_header(text, data_size)
    except ValueError as error:
        words = f"{path}: not a safetensors file, or a damaged one ({_one_line(error)})"
        raise ModelError(words, "download or copy it again") from error
    if len(header) > MAX_TENSORS:
        raise ModelError(f"{path}: {len(header)} tensors are more than a LoRA has")
    return header, metadata


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows has no fsync for folders; its rename is durable enough
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
