"""Tensors kept by content: an entry's key is a digest of all that its value depends on.

A picture that is renamed or moved finds its entry again; one that is edited does not. Entries carry
a checksum, so that a damaged one is noticed and made again, and are put in place by a rename, so
that a reader never sees half of one. The cache lies outside the data folders; nothing is written
into those.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from emotrain.dataset.cachedir import default_cache_dir, entry_path
from emotrain.files import MAX_JSON, header_at, replace_file

Tensors = dict[str, Tensor]


def content_key(**parts: object) -> str:
    """A digest of named values (numbers, strings, lists of them): 64 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """Entries on disk, or none where the disk refuses.

    Args:
        folder: where entries lie (default: `default_cache_dir()`).
        warn: told once, in one line, when entries cannot be written; the run goes on without them.
    """

    def __init__(self, folder: Path | None = None, warn: Callable[[str], None] = lambda message: None) -> None:
        self.folder = default_cache_dir() if folder is None else folder
        self.warn = warn
        self.writable = True
        self.made = 0
        self.damaged = 0

    def get(self, kind: str, key: str) -> Tensors | None:
        """The tensors of an entry; None where there is none or it is damaged."""
        path = entry_path(self.folder, kind, key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        tensors = _unpack(data, key)
        if tensors is None:
            self.damaged += 1
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # `cache clear --unused-days` goes by this
        return tensors

    def has(self, kind: str, key: str) -> bool:
        """Whether there is an entry; not whether it is whole."""
        return entry_path(self.folder, kind, key).is_file()

    def put(self, kind: str, key: str, tensors: Tensors) -> None:
        """Write an entry, replacing a damaged one. Failing to is no error: it is said once."""
        self.made += 1
        if not self.writable:
            return
        path = entry_path(self.folder, kind, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, _pack(tensors, key), sync=False)
        except OSError as error:
            self.writable = False
            self.warn(
                f"cache {self.folder} cannot be written ({error.strerror}): latents and captions "
                "are kept in memory and encoded again next time"
            )

    def lookup(self, kind: str, key: str, make: Callable[[], Tensors]) -> Tensors:
        """The entry, made with `make` and written where there is none."""
        found = self.get(kind, key)
        if found is None:
            found = make()
            self.put(kind, key, found)
        return found


def narrow(tensor: Tensor) -> Tensor:
    """`tensor` in bfloat16 or float16 where that keeps every number as it is, else unchanged.

    Encoders that compute in 16 bits give such numbers; keeping them narrow halves memory and disk.
    """
    if tensor.dtype != torch.float32:
        return tensor
    for dtype in (torch.bfloat16, torch.float16):
        small = tensor.to(dtype)
        if torch.equal(small.float(), tensor):
            return small
    return tensor


def _pack(tensors: Tensors, key: str) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = _checksum(plain)
    data: bytes = save(plain, metadata={"key": key, "sha256": checksum})
    return data


def _unpack(data: bytes, key: str) -> Tensors | None:
    try:
        marks = header_at(io.BytesIO(data), len(data), MAX_JSON)[1]
        tensors = load(data)
        intact = marks["key"] == key and marks["sha256"] == _checksum(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return None
    return tensors if intact else None


def _checksum(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
