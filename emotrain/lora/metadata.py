"""The strings in a LoRA's header: what A1111, ComfyUI managers and model sites read, and emotrain's own record.

Strings only, nested values as JSON; no absolute path and no user name ever get in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from emotrain.lora import container


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Add `sshs_model_hash` and `sshs_legacy_hash`, by which web interfaces recognise the weights.

    The first is the sha256 of the tensors' bytes; the second the first 8 digits of the sha256 of 64 KiB at 1 MiB in a file that has
    only the `ss_*` metadata.
    """
    plain = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    whole, legacy = hashlib.sha256(), hashlib.sha256()
    position = 0
    for number, piece in enumerate(container.encode(tensors, plain)):
        if number >= 2:
            whole.update(piece)
        start, end = max(0x100000 - position, 0), max(0x110000 - position, 0)
        legacy.update(piece[start:end])
        position += len(piece)
    return {
        **metadata,
        "format": "pt",
        "sshs_model_hash": whole.hexdigest(),
        "sshs_legacy_hash": legacy.hexdigest()[:8],
    }
