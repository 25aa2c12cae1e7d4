"""Reading the outside of model files: safetensors headers and JSON configs (no torch)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.errors import ModelError
from emotrain.files import MAX_JSON, is_regular, parse_header, strict_json

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Header:
    """A safetensors header: shape and stored type per tensor, and the metadata strings."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
        total = 0
        for name, shape in self.shapes.items():
            count = 1
            for side in shape:
                count *= side
            total += count * sizes.get(self.dtypes[name], 1)
        return total


def own_name(name: str) -> str:
    """The name of a denoiser's tensor without the prefixes that files put before it."""
    return name.removeprefix("model.diffusion_model.").removeprefix("net.")


def refuse_unreadable(path: Path) -> None:
    """Refuse what is certainly no safetensors file, saying what it is.

    Raises:
        ModelError: missing, pickled, an LFS pointer, a web page, or another format.
    """
    if not is_regular(path):
        there = os.path.lexists(path) if "\0" not in str(path) else False
        raise ModelError(
            f"`{path}` is not a file that can be read" if there else f"`{path}` does not exist",
            "check the path; relative paths start at the preset's folder",
        )
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"`{path}` is a pickled file, which can run code when it is opened; only .safetensors is read",
            "download its .safetensors version, or convert it with a tool that you trust to open it",
        )
    if path.suffix.lower() == ".gguf":
        raise ModelError(
            f"`{path}` is a GGUF file, which holds quantised weights for inference only",
            "use the .safetensors version",
        )
    with path.open("rb") as file:
        start = file.read(512)
    head = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"`{path}` is a Git LFS pointer, not the model itself",
            "run `git lfs pull` in its folder, or download the file again",
        )
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ModelError(
            f"`{path}` is a web page, not a model",
            "the download needs a login or another link; download the file again",
        )
    if start.startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")):
        raise ModelError(
            f"`{path}` is a pickled or zipped file with another name; only .safetensors is read",
            "download its .safetensors version",
        )


def read_header(path: Path) -> Header:
    """The header of a safetensors file, with the file's length checked against it.

    Raises:
        ModelError: see `refuse_unreadable`; also a damaged header, or a file that is cut off.
    """
    refuse_unreadable(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size):
            raise ModelError(
                f"`{path}` is not a safetensors file, or only its beginning",
                "download the file again",
            )
        raw = file.read(length)
    try:
        entries, metadata = parse_header(raw, size - 8 - length)
    except ValueError as error:
        raise ModelError(f"`{path}` has a damaged header: {error}", "download the file again") from error
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return Header(shapes, {name: entry["dtype"] for name, entry in entries.items()}, metadata)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: missing, a pointer or web page, or not a JSON object.
    """
    if not is_regular(path):
        raise ModelError(f"`{path}` is missing", "the model's folder is not complete; download it again")
    try:
        text = path.read_bytes()[: MAX_JSON + 1].decode("utf-8", errors="replace")
    except OSError as error:
        raise ModelError(f"`{path}` cannot be read ({error.strerror})") from error
    if len(text) > MAX_JSON:
        raise ModelError(f"`{path}` is too large for a config", "the download is damaged; download it again")
    if text.startswith("version https://git-lfs"):
        raise ModelError(
            f"`{path}` is a Git LFS pointer, not the file itself",
            "run `git lfs pull` in its folder",
        )
    try:
        loaded = strict_json(text)
    except ValueError as error:
        raise ModelError(
            f"`{path}` is not valid JSON: {error}", "the download is damaged; download it again"
        ) from error
    if not isinstance(loaded, dict):
        raise ModelError(f"`{path}` is not a JSON object", "the download is damaged; download it again")
    return loaded
