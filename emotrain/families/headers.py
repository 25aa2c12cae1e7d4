"""Reading the outside of model files: safetensors headers and JSON configs (no torch)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.errors import ModelError
from emotrain.files import DTYPE_BYTES, MAX_HEADER, MAX_JSON, disguise, header_at, is_regular, strict_json

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"  # which classes the parts of a folder are of
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Header:
    """A safetensors header: shape and stored type per tensor, and the metadata strings."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(math.prod(shape) * (DTYPE_BYTES[self.dtypes[name]] or 1) for name, shape in self.shapes.items())


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
    with path.open("rb") as file:
        start = file.read(512)
    if found := disguise(start):
        raise ModelError(f"`{path}` is {found[0]}, not a model", found[1])


def read_header(path: Path) -> Header:
    """The header of a safetensors file, with the file's length checked against it.

    Raises:
        ModelError: see `refuse_unreadable`; also a damaged header, or a file that is cut off.
    """
    refuse_unreadable(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            entries, metadata = header_at(file, size, MAX_HEADER)
    except ValueError as error:
        raise ModelError(
            f"`{path}` is not a safetensors file, or a damaged one: {error}", "download the file again"
        ) from error
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return Header(shapes, {name: entry["dtype"] for name, entry in entries.items()}, metadata)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a diffusers folder, of a pipeline or of modular blocks: part -> [library, class].

    Raises:
        ModelError: as `read_json`.
    """
    modular = folder / MODULAR_INDEX
    return index_entries(
        read_json(modular if not is_regular(folder / INDEX) and is_regular(modular) else folder / INDEX)
    )


def index_entries(index: dict[str, Any]) -> dict[str, Any]:
    """An index without what modular blocks say of where a part is loaded from: it lies in the folder."""
    return {key: value[:2] if isinstance(value, list) else value for key, value in index.items()}


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
    if found := disguise(text[:512].encode()):
        raise ModelError(f"`{path}` is {found[0]}, not the file itself", found[1])
    try:
        loaded = strict_json(text)
    except ValueError as error:
        raise ModelError(
            f"`{path}` is not valid JSON: {error}", "the download is damaged; download it again"
        ) from error
    if not isinstance(loaded, dict):
        raise ModelError(f"`{path}` is not a JSON object", "the download is damaged; download it again")
    return loaded
