"""Sample prompts: a text, and the flags that kohya's prompt files put behind it (no torch)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FLAG = re.compile(r"\s--(\w+)(?:\s+|$)")
MAX_STEPS = 1000
MAX_SIDE = 8192
LOOKS_FOREIGN = re.compile(r"<lora:[^>]*>|\([^()]*:[\d.]+\)")  # words of image generators that draw nothing here


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to draw; None is the preset's own value."""

    text: str
    negative: str = ""
    width: int | None = None  # pixels
    height: int | None = None
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None


def parse_prompt(line: str) -> SamplePrompt:
    """`a cat --n blurry --w 768 --h 1024 --d 1 --l 7 --s 20` (kohya's sd-scripts, "Prompt for sampling").

    n is the negative prompt, w and h the size in pixels, d the seed, l the guidance scale, s the steps.

    Raises:
        ValueError: an unknown flag, one that is there twice, or a value out of its range.
    """
    first, *parts = FLAG.split(" " + line)
    found = SamplePrompt(first.strip())
    seen: set[str] = set()
    for flag, value in zip(parts[::2], parts[1::2], strict=True):
        if flag not in _FLAGS:
            raise ValueError(f"`--{flag}` is not known (known: {', '.join(f'--{name}' for name in _FLAGS)})")
        if flag in seen:
            raise ValueError(f"`--{flag}` is there twice")
        seen.add(flag)
        key, read = _FLAGS[flag]
        try:
            found = replace(found, **{key: read(value.strip())})
        except ValueError as error:
            raise ValueError(f"`--{flag}` is `{value.strip()[:40]}`, which is {error}") from None
    return found


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not value.isascii() or not value.isdigit() or len(value) > 20 or not low <= int(value) <= high:
            raise ValueError(f"not a whole number from {low} to {high}")
        return int(value)

    return read


def _guidance(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,6})?", value):
        raise ValueError("not a number of 0 or more")
    return float(value)


_FLAGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative", str), "w": ("width", _whole(64, MAX_SIDE)), "h": ("height", _whole(64, MAX_SIDE)),
    "d": ("seed", _whole(0, 2**63 - 1)), "l": ("guidance", _guidance), "s": ("steps", _whole(1, MAX_STEPS)),
}  # fmt: skip


def is_prompt_file(text: str) -> bool:
    """Whether an entry names a file of prompts: one word that ends with .txt, or a path that does."""
    return text.lower().endswith(".txt") and len(text.splitlines()) == 1 and ", " not in text


def prompts_of_file(text: str, path: Path) -> list[tuple[int, str]]:
    """The prompts of a file's text, each with the number of its line; blank lines and `#` comments are left out.

    Raises:
        ValueError: there is none.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    found = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found
