"""Files from strangers, parsed at the door: what comes out has the types and sizes that it says (no torch)."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

# Bytes for each number; those of less than a byte are left to whoever reads the tensors.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "F4": 0, "F6_E2M3": 0, "F6_E3M2": 0,
}  # fmt: skip
MAX_DIMENSIONS = 8
MAX_SIDE = 2**40
MAX_DIGITS = 40  # tokenizers write "no limit" with 31
MAX_JSON = 16 * 2**20  # bytes


def strict_json(text: bytes | str) -> Any:
    """JSON whose names occur once, whose numbers are finite and of a sane length, and whose nesting ends.

    Raises:
        ValueError: it is not; the reason in a few words.
    """

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise ValueError(f"the name `{key[:80]}` is in it twice")
            found[key] = value
        return found

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError("a number has too many digits")
        return int(digits)

    def real(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError("a number is too large")
        return value

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number")

    try:
        return json.loads(text, object_pairs_hook=once, parse_int=whole, parse_float=real, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_header(text: bytes, data_size: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The header of a safetensors file: (name -> {dtype, shape, data_offsets}, metadata).

    Shapes are lists of at most 8 whole numbers, the bytes that a tensor takes are those of its shape and dtype, lie
    within the `data_size` bytes behind the header, and are no other tensor's (the format's own rules,
    huggingface/safetensors).

    Raises:
        ValueError: it is not such a header; the reason in a few words.
    """
    header = strict_json(text)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a list of texts")
    spans = []
    for name, entry in header.items():
        try:
            spans.append(_span(entry))
        except ValueError as error:
            raise ValueError(f"its tensor `{name[:80]}` {error}") from None
    end = 0
    for first, last in sorted(spans):
        if first < end:
            raise ValueError("two of its tensors share bytes")
        end = max(end, last)
    if end > data_size:
        raise ValueError(f"it is cut off: {data_size:,} of {end:,} bytes")
    return header, metadata


def _span(entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor."""
    if not isinstance(entry, dict):
        raise ValueError("has no entry of the right kind")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError("has no dtype that is known")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(side) for side in shape):
        raise ValueError("has no shape that can be")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise ValueError("has no place in the file")
    first, last = offsets
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    if last < first or (size and last - first != size):
        raise ValueError("takes other bytes than its shape and dtype")
    return first, last


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_SIDE


def read_regular(path: Path, limit: int = MAX_JSON) -> bytes:
    """All bytes of a regular file; a pipe or device in its place is not waited for.

    Raises:
        OSError: missing, unreadable, no regular file, or larger than `limit` bytes.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
        return file.read()


def is_regular(path: Path) -> bool:
    """Whether something can be read at `path` without waiting: a file, not a pipe, device or folder.

    A name that cannot be (too long, with a NUL, not permitted) is no file.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
