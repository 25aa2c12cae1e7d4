"""Reading files from strangers, and writing files that are whole or not there: once, for every room (no torch).

What is parsed here has the types and sizes that it says.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import threading
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

# Bytes for each number; those of less than a byte are left to whoever reads the tensors.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "F4": 0, "F6_E2M3": 0, "F6_E3M2": 0,
}  # fmt: skip
MAX_DIMENSIONS = 8
MAX_SIDE = 2**40
MAX_DIGITS = 40  # tokenizers write "no limit" with 31
MAX_JSON = 16 * 2**20  # bytes
MAX_HEADER = 100_000_000  # bytes of a safetensors file; the format's own limit


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


def sha256_of(path: Path) -> str:
    """Of a file, in hex; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_at(file: BinaryIO, size: int, limit: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The header at the beginning of a safetensors file, as `parse_header` gives it; no tensor is read.

    Args:
        file: opened for bytes.
        size: of the whole file.
        limit: bytes that a header may have.

    Raises:
        ValueError: there is none, or a damaged one; the reason in a few words.
    """
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(limit, size - 8):
        raise ValueError("it does not begin with the length of a header")
    return parse_header(file.read(length), size - 8 - length)


_DISGUISES = (
    (b"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull` in its folder, or download the file again"),
    (b"<!doctype", "a web page", "the download needs a login or another link; download the file again"),
    (b"<html", "a web page", "the download needs a login or another link; download the file again"),
    (b"<?xml", "a web page", "the download needs a login or another link; download the file again"),
    (b"pk\x03\x04", "a zip or .pt file", "use or make its .safetensors version"),
    (b"\x80\x02", "a pickle, which is never opened", "use or make its .safetensors version"),
    (b"\x80\x04", "a pickle, which is never opened", "use or make its .safetensors version"),
    (b"gguf", "a GGUF file, quantised for inference only", "use its .safetensors version"),
)


def disguise(start: bytes) -> tuple[str, str] | None:
    """What a file is that people take for a model, by its first bytes, and what to do; None if none of these.

    A pickle's mark is also how a safetensors file with a header of 640 or 1,152 bytes begins.
    """
    if start[:1] == b"\x80" and len(start) >= 8 and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return None
    heads = start.lower(), start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next(((what, hint) for mark, what, hint in _DISGUISES if any(h.startswith(mark) for h in heads)), None)


# ------------------------------------------------------------ text that is safe to show

_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_JOINERS = "\u200c\u200d\ufe0f"  # zero-width joiners, which emoji and some scripts need


def clean(text: str) -> str:
    """Text that a terminal, a log or a page can show: line breaks and tabs become spaces.

    Control, escape, direction and private characters become U+FFFD.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter
        if letter in _JOINERS or unicodedata.category(letter) not in _INVISIBLE
        else (" " if letter in "\n\r\t" else "\N{REPLACEMENT CHARACTER}")
        for letter in text
    )


# ------------------------------------------------------------ written so that a power cut cannot take it back

Stage = Callable[[str], None]


def no_stage(name: str) -> None:
    """The usual stage hook: nothing happens. Fault tests hand in one that ends the process."""


def fsync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk; nothing where folders cannot be opened (Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def fsync_file(path: Path) -> None:
    """Bring a file's bytes to the disk; its folder's entry is the caller's to sync.

    Raises:
        OSError: it is not there, or the disk refuses.
    """
    _fsync(path, os.O_RDWR)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes, stage: Stage = no_stage) -> None:
    """Write a new file and bring its bytes to the disk; the folder entry is the caller's to sync.

    Raises:
        OSError: no space, no permission, or `path` exists.
    """
    with path.open("xb") as file:
        stage(f"opened {path.name}")
        file.write(content)
        file.flush()
        stage(f"written {path.name}")
        os.fsync(file.fileno())
    stage(f"synced {path.name}")


def replace_file(path: Path, pieces: bytes | Iterable[bytes], *, sync: bool = True) -> None:
    """Put `pieces` in the place of `path`: a reader sees the old bytes or the new, never a mix.

    Args:
        path: the file.
        pieces: its bytes; or parts of them, one behind the other.
        sync: whether the bytes have to be on the disk before anything else is done.

    Raises:
        OSError: no space or no permission; the old file is then as it was.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with temporary.open("wb") as file:
            file.writelines([pieces] if isinstance(pieces, bytes) else pieces)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if sync:
            fsync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # a place that takes no file holds none
            temporary.unlink(missing_ok=True)


# ------------------------------------------------------------ JSON that gives every float back exactly


def encode_json(value: Any) -> bytes:
    """JSON that gives every float back exactly.

    Infinities become `{"$float": "inf"}`, tuples become lists.

    Raises:
        ValueError: a NaN, a key that is not a string, or a type that JSON has no word for.
    """
    text = json.dumps(_to_json(value, "$"), ensure_ascii=True, allow_nan=False, indent=1)
    return (text + "\n").encode()


def decode_json(content: bytes) -> Any:
    """What `encode_json` was given.

    Raises:
        ValueError: not JSON, or JSON with a NaN in it.
    """
    try:
        return json.loads(content, object_hook=_from_json, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} in JSON")


def _from_json(value: dict[str, Any]) -> Any:
    return float(value["$float"]) if value.keys() == {"$float"} else value


def _to_json(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if value != value:
            raise ValueError(f"{where} is NaN")
        return {"$float": repr(value)} if value in (float("inf"), float("-inf")) else float(value)
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{where} has the key {wrong[0]!r}, which is not a string")
        return {key: _to_json(item, f"{where}.{key}") for key, item in value.items()}
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold")
