"""The safetensors container: the same bytes for the same content, written whole or not at all, read with distrust."""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from emotrain.errors import ModelError, ResourceError, first_line
from emotrain.files import disguise, header_at, replace_file

MAX_FILE = 8 * 2**30  # bytes
MAX_HEADER = 8 * 2**20  # bytes
MAX_TENSORS = 20_000

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_WHOLE = {"I64", "I32", "I16", "I8", "U8"}


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
    """Write the file as a whole or not at all.

    Returns:
        sha256 of the file.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written to.
    """
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for piece in encode(tensors, metadata):
            digest.update(piece)
            yield piece

    try:
        replace_file(path, pieces())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{path}: the disk is full", "make room; what was there before is untouched") from error
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror})", "is the folder there, and yours?"
        ) from error
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
            f"{path}: damaged safetensors file ({first_line(error)})", "download or copy it again"
        ) from error


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(name -> {dtype, shape, data_offsets}, metadata) without reading a tensor.

    Raises:
        ModelError: as `read`, as far as the header shows it.
    """
    size = _regular_size(path)
    try:
        with path.open("rb") as file:
            if found := disguise(file.read(512)):
                raise ModelError(f"{path}: it is {found[0]}, not a safetensors file", found[1])
            header, metadata = header_at(file, size, MAX_HEADER)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        words = f"{path}: not a safetensors file, or a damaged one ({first_line(error)})"
        raise ModelError(words, "download or copy it again") from error
    if len(header) > MAX_TENSORS:
        raise ModelError(f"{path}: {len(header)} tensors are more than a LoRA has")
    return header, metadata


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
