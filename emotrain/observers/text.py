"""Text that is safe to show, and figures in words."""

from __future__ import annotations

import math
import re
import unicodedata
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emotrain.train.events import LikenessMeasured

_DROPPED = {"Cc", "Cf", "Cs", "Co", "Cn"}
_MAX_MARKS = 2  # combining marks kept on one character; more of them paint over neighbouring lines


def clean(text: object) -> str:
    """One line without control, bidirectional, zero-width or private characters.

    Line breaks and tabs become one space. At most two combining marks stay on a character.
    """
    raw = str(text)
    if raw.isascii() and raw.isprintable():
        return raw
    spaced = re.sub(r"\s", " ", unicodedata.normalize("NFC", raw))
    kept = (char for char in spaced if unicodedata.category(char) not in _DROPPED and not "\ufe00" <= char <= "\ufe0f")
    return "".join("".join(islice(run, _MAX_MARKS if marks else None)) for marks, run in groupby(kept, _is_mark))


def _is_mark(char: str) -> bool:
    return unicodedata.category(char) in ("Mn", "Me")


def short_path(path: Path) -> str:
    """The path as seen from the working folder, where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def duration(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`, `3d 04:05`; `-` where it is not a number."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        days, hours = divmod(hours, 24)
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def number(value: float | None, *, digits: int = 4, signed: bool = False) -> str:
    """A figure of steady width: fixed point from 0.001 to 9999, else with an exponent."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    sign = "+" if signed else ""
    size = abs(value)
    if size != 0.0 and (size < 1e-3 or size >= 1e4):
        return f"{value:{sign}.2e}"
    return f"{value:{sign}.{digits}f}"


def likeness_words(event: LikenessMeasured) -> str:
    """The likeness, and what it is held against."""
    beside = {"base model": event.base_likeness, "pictures among themselves": event.among_pictures}
    words = ", ".join(f"{name} {number(value)}" for name, value in beside.items() if value is not None)
    return number(event.likeness) + (f" ({words})" if words else "")


def speed(step_s: float | None) -> str:
    """Steps in a second, or seconds in a step where they are slower than one a second."""
    if step_s is None or not math.isfinite(step_s) or step_s <= 0.0:
        return "- it/s"
    if step_s > 1.0:
        return f"{step_s:.2f} s/it"
    return f"{1.0 / step_s:.2f} it/s"
