"""A checkpoint's contents as files and back: safetensors and JSON, each with its step inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from emotrain.errors import DivergedError
from emotrain.train.durable import decode_json, encode_json
from emotrain.train.manifest import Unusable, read_file, read_manifest


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
    config_hash: str = ""
    parent: str | None = None
    best: bool = False


def to_files(step: int, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> dict[str, bytes]:
    """The files' bytes by name.

    Raises:
        DivergedError: a tensor holds a number that is not finite.
        ValueError: a document that JSON cannot hold.
    """
    files = {}
    for stem, named in tensors.items():
        for name, tensor in named.items():
            if not bool(torch.isfinite(tensor).all()):
                raise DivergedError(
                    f"step {step} was not saved: `{name}` of `{stem}` is not finite",
                    "the checkpoints before it are whole",
                )
        content = save_tensors(dict(_unshared(named)), metadata={"step": str(step)})
        files[f"{stem}.safetensors"] = content
    for stem, value in documents.items():
        files[f"{stem}.json"] = encode_json({"step": step, "value": value})
    return files


def _unshared(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors on the CPU, each with memory of its own, as the file format wants it."""
    seen = set()
    for name, tensor in named.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        yield name, plain


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, every byte of it verified.

    Raises:
        Unusable: something is missing, damaged or of another step.
        CheckpointError: a newer emotrain wrote it.
    """
    manifest = read_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    documents: dict[str, Any] = {}
    for name, entry in manifest.files.items():
        content = read_file(path, name, entry)
        stem, _, kind = name.partition(".")
        try:
            if kind == "safetensors":
                step, tensors[stem] = _header_step(content), load_tensors(content)
            else:
                document = decode_json(content)
                step, documents[stem] = document["step"], document["value"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise Unusable(f"{name} cannot be read ({error})") from error
        if step != manifest.step:
            raise Unusable(f"{name} is of step {step}")
    return Checkpoint(
        manifest.step,
        path,
        tensors,
        documents,
        config_hash=manifest.config_hash,
        parent=manifest.parent,
        best=manifest.best,
    )


def _header_step(content: bytes) -> int:
    """The step in a safetensors file's header: its length in 8 bytes little-endian, then JSON."""
    length = int.from_bytes(content[:8], "little")
    return int(decode_json(content[8 : 8 + length])["__metadata__"]["step"])
