"""Names that can be a file's name everywhere."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

MAX_NAME_BYTES = 200
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{device}{digit}" for device in ("com", "lpt") for digit in "123456789¹²³"}
_FORBIDDEN = set('/\\:*?"<>|')


def check_run_name(name: str) -> str:
    """Return `name` if it can be a file's name on every system, and one that means only itself.

    Raises:
        ValueError: why it cannot, as the end of a sentence.
    """
    if not name or not name.strip():
        raise ValueError("which is empty")
    if name in (".", "..") or set(name) & _FORBIDDEN:
        raise ValueError('which is not a plain name: no path, and none of / \\ : * ? " < > |')
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        raise ValueError("which holds a control character")
    if name != name.strip() or name.endswith("."):
        raise ValueError("which begins or ends with a space or ends with a dot")
    if name.startswith(("-", "~", ".")):
        raise ValueError("which begins with `-`, `~` or a dot")
    if name.split(".")[0].strip().casefold() in _RESERVED:
        raise ValueError("which is a device's name on Windows")
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise ValueError(f"which is longer than {MAX_NAME_BYTES} bytes")
    return name


def name_from_file(path: Path) -> str:
    """A run's name from its preset's file: the stem, with `_` for what a name cannot hold."""
    stem = re.sub(r"[^\w .+=@-]", "_", path.stem).strip(" .-~") or "run"
    stem = stem.encode("utf-8", "ignore")[:MAX_NAME_BYTES].decode("utf-8", "ignore")
    try:
        return check_run_name(stem)
    except ValueError:
        return f"run_{stem}"
