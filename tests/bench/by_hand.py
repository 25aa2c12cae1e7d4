"""A report whose lower part is written by hand and stays when the script writes the upper part anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SAID = "## What it says"  # from here on the report is written by hand


def write_report(path: Path, lines: Sequence[str]) -> None:
    """The upper part of a report; what stands below the line `SAID` is kept."""
    said = path.read_text(encoding="utf-8").partition(f"\n{SAID}\n")[2] if path.exists() else ""
    path.write_text("\n".join([*lines, "", SAID, ""]) + said, encoding="utf-8")
