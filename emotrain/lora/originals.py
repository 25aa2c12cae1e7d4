"""Names of the original checkpoints, which kohya and ComfyUI files use, whatever the family."""

from __future__ import annotations

import re
from functools import cache

from emotrain.families.registry import FAMILIES

# Text encoders have these beside the words of the families.
_TEXT_WORDS = ("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj")


def families_of_original(path: str) -> tuple[str, ...]:
    """The families that have an original name of this kind; none for a diffusers name."""
    return tuple(name for name, spec in FAMILIES.items() if path.startswith(spec.lora.originals.heads))


@cache
def _word() -> re.Pattern[str]:
    words = {*_TEXT_WORDS, *(word for spec in FAMILIES.values() for word in spec.lora.originals.words)}
    return re.compile("(?:(" + "|".join(sorted(words, key=lambda w: (-len(w), w))) + ")|([^_]+))(?:_|$)")


def dotted(name: str) -> str:
    """A name whose dots became underscores, with its dots again.

    >>> dotted("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0")
    'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    words, place = [], 0
    while place < len(name):
        found = _word().match(name, place)
        if found is None:
            return name
        words.append(found.group(1) or found.group(2))
        place = found.end()
    return ".".join(words)
