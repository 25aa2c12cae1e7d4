"""What is in a LoRA file, as plain data."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from emotrain.lora import names
from emotrain.lora.check import norm_of
from emotrain.lora.file import LoraFile
from emotrain.lora.formats import pairs
from emotrain.lora.kron import krons

_BLOCK = re.compile(
    r"(?:down_blocks|up_blocks)\.\d+\.\w+\.\d+|mid_block|(?:single_)?transformer_blocks\.\d+"
    r"|text_model\.encoder\.layers\.\d+"
)


def summarise(lora: LoraFile) -> dict[str, Any]:
    """Everything `lora inspect` shows: JSON-able, and no absolute path.

    `blocks` holds the Frobenius norm of the update (alpha / rank B A, all modules of a block
    together), so that an untrained or a runaway block shows.
    """
    own, products = pairs(lora.state, lora.alphas), krons(lora.state)
    ranks = Counter(pair.rank for pair in own.values())
    factors = Counter("{} x {}".format(*kron.w1.shape) for kron in products.values())
    norms = {path: float(norm_of(pair.down, pair.up)) * pair.strength for path, pair in own.items()}
    norms |= {path: kron.norm for path, kron in products.items()}
    squares: dict[str, float] = {}
    silent = 0
    for path, size in norms.items():
        silent += size == 0.0
        block = _block(path)
        squares[block] = squares.get(block, 0.0) + size**2
    return {
        "file": lora.path.name,
        "sha256": lora.sha256,
        "size_bytes": lora.path.stat().st_size,
        "format": lora.format,
        "family": lora.family,
        "dtype": lora.dtype,
        "network": "lora" if not products else "lokr" if not own else "lora and lokr",
        "modules": len(norms),
        "parts": dict(Counter(path.split(".", 1)[0] for path in norms)),
        "parameters": sum(value.numel() for value in lora.state.values()),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "lokr_w1": dict(sorted(factors.items())),
        "alphas": _counted(pair.alpha for pair in own.values()),
        "strengths": _counted(pair.strength for pair in own.values()),
        "zero_modules": silent,
        "norm": math.sqrt(sum(squares.values())),
        "blocks": {block: math.sqrt(square) for block, square in squares.items()},
        "notes": list(lora.notes),
        "ignored": list(lora.ignored),
        "left_out": lora.left_out,
        "parents": parents_of(lora.metadata),
        "metadata": dict(sorted(lora.metadata.items())),
    }


def parents_of(metadata: dict[str, str]) -> list[Any]:
    """The earlier LoRAs that the file names, newest first as written; empty where there are none."""
    try:
        parents = json.loads(metadata.get("emotrain.parents", "[]"))
    except (ValueError, RecursionError):
        return []
    return parents if isinstance(parents, list) else []


def _block(path: str) -> str:
    part = names.part_of_key(path)
    found = _BLOCK.search(path)
    return f"{part}.{found.group()}" if found else path


def _counted(values: Any) -> dict[str, int]:
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}
