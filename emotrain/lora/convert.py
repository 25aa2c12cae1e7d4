"""LoRA files out of LoRA files: another layout, or several merged into one; each is checked after it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import emotrain
from emotrain.errors import CheckpointError, ModelError
from emotrain.lora import container
from emotrain.lora.check import self_check
from emotrain.lora.file import DTYPES, LoraFile, file_tensors, read_lora, rounded
from emotrain.lora.formats import Layout, layout_of
from emotrain.lora.merge import Merged, merge
from emotrain.lora.metadata import About, build_metadata, with_hashes


@dataclass(frozen=True)
class Written:
    """A file that was written and checked."""

    path: Path
    sha256: str
    format: Layout
    family: str
    dtype: str
    modules: int
    warnings: tuple[str, ...] = ()


def convert(path: Path, to: Layout, out: Path, *, overwrite: bool = False) -> Written:
    """Bring a LoRA or LoKr of any known dialect to another layout, with the update of every module unchanged.

    The file keeps its dtype where that holds every number exactly, else it becomes float32.

    Raises:
        ModelError: the file cannot be used, or the layout has no name for one of its modules.
        CheckpointError: `out` exists.
    """
    refuse_existing(out, overwrite)
    lora = read_lora(path)
    tensors = file_tensors(lora.state, alphas=lora.alphas, family=lora.family, layout=to, dtype="fp32")
    dtype = exact_dtype(tensors, lora.dtype)
    kept = {key: value for key, value in lora.metadata.items() if key != "lora_adapter_metadata"}
    written = _write(out, tensors, dtype, lora, to, {**kept, "emotrain.converted_from": lora.sha256})
    return replace(written, warnings=_said_of([lora]))


def merge_files(
    parts: Sequence[tuple[Path, float]],
    out: Path,
    *,
    rank: int | None = None,
    format: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
) -> tuple[Written, Merged]:
    """Merge LoRA files into one.

    Args:
        parts: (file, weight) each.
        out: the new file.
        rank: bring each module down to this rank by SVD; None is exact.
        format: auto, kohya, diffusers or comfyui.
        dtype: auto, fp16, bf16 or fp32; auto is the files' own where that loses nothing, else fp32.
        overwrite: replace `out`.

    Raises:
        ModelError: a file cannot be used, or they are for different families.
        ConfigError: a weight or rank that cannot be used.
        CheckpointError: `out` exists.
    """
    refuse_existing(out, overwrite)
    loras = [(read_lora(path, whole=rank is not None), weight) for path, weight in parts]
    merged = merge(loras, rank=rank)
    layout = layout_of(merged.family, format)
    tensors = file_tensors(merged.state, alphas=merged.alphas, family=merged.family, layout=layout, dtype="fp32")
    own = {lora.dtype for lora, _ in loras}
    if dtype == "auto":
        common = own.pop() if len(own) == 1 else "fp32"
        dtype = exact_dtype(tensors, common) if rank is None else common if common in DTYPES else "fp32"
    source = LoraFile(
        out, merged.state, merged.alphas, merged.family, layout, dtype, {}, "",
    )  # fmt: skip
    written = _write(out, tensors, dtype, source, layout, _merged_metadata(out, loras, merged))
    return replace(written, warnings=_said_of([lora for lora, _ in loras])), merged


def _said_of(loras: Sequence[LoraFile]) -> tuple[str, ...]:
    """What is left out of files, and what was assumed of them."""
    lines = [line for lora in loras if (line := lora.left_out) is not None]
    return (*lines, *(f"{lora.path}: {note}" for lora in loras for note in lora.notes))


def exact_dtype(tensors: Mapping[str, Tensor], wished: str) -> str:
    """`wished` where it holds every number exactly, else fp32."""
    dtype = DTYPES.get(wished)
    if dtype is None:
        return "fp32"
    weights = (tensor for name, tensor in tensors.items() if not name.endswith(".alpha"))
    return wished if all(torch.equal(t.to(dtype).to(torch.float32), t) for t in weights) else "fp32"


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise a CheckpointError where a file would be written over, a ModelError where it could not be written."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists", "give another name, or --yes to write over it")
    if not path.parent.is_dir():
        raise ModelError(f"{path.parent} is not a folder")


def _write(
    out: Path, tensors: Mapping[str, Tensor], dtype: str, lora: LoraFile, layout: Layout, metadata: Mapping[str, str]
) -> Written:
    stored = {key: rounded(key, value, DTYPES[dtype]) for key, value in tensors.items()}
    strings = {**metadata, "emotrain.family": lora.family}
    sha256 = container.write(out, stored, with_hashes(stored, strings))
    self_check(out, lora.state, lora.alphas, lora.family)
    return Written(out, sha256, layout, lora.family, dtype, len(lora.alphas))


def _merged_metadata(out: Path, loras: Sequence[tuple[LoraFile, float]], merged: Merged) -> dict[str, str]:
    triggers = [lora.metadata.get("modelspec.trigger_phrase", "") for lora, _ in loras]
    variants = {lora.metadata.get("emotrain.variant", "") for lora, _ in loras}
    rank = max(merged.ranks.values())
    about = About(
        family=merged.family,
        variant=variants.pop() if len(variants) == 1 else "",
        name=out.stem,
        rank=rank,
        alpha=float(rank),
        trigger=", ".join(dict.fromkeys(word for word in triggers if word)) or None,
        parents=[
            {"kind": "merge", "sha256": lora.sha256, "weight": weight, "name": lora.path.name} for lora, weight in loras
        ],
        version=emotrain.__version__,
    )
    return build_metadata(about)
