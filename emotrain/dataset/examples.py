"""What a scan of the data folders finds: frozen values (no torch)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emotrain.dataset.images import Note

Severity = Literal["error", "warning", "info"]
CaptionSource = Literal["file", "metadata", "folder", "default", "none"]


@dataclass(frozen=True)
class Example:
    """One picture to learn; sides in pixels as displayed. `id` (unique): folder name / path."""

    id: str
    path: Path
    width: int
    height: int
    captions: tuple[str, ...]  # at least one; ("",) where nothing is said
    sha256: str  # of the file's bytes
    file_size: int
    repeats: int = 1
    flip: bool = False
    mask: Path | Literal["alpha"] | None = None
    weight: float = 1.0  # of its loss
    prior: bool = False  # a regularisation picture
    folder: int = 0  # index into the folders scanned
    caption_source: CaptionSource = "none"
    caption_path: Path | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A file that is not used. `error` marks pictures that were meant to be used and cannot be."""

    path: Path
    code: str
    reason: str  # reads on after the path: "is empty (0 bytes)"
    severity: Severity = "info"
    hint: str | None = None
    folder: int = 0


@dataclass(frozen=True)
class Scan:
    """All files of the data folders; `files` counts every entry seen, the sum of all others."""

    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...]
    captions: int = 0  # caption files that belong to a picture
    listings: int = 0  # metadata.jsonl files
    hidden: int = 0  # hidden and system files
    files: int = 0
    listed_missing: tuple[Path, ...] = ()  # pictures that a metadata.jsonl names and that are not there
    folders: tuple[Path, ...] = ()

    def errors(self) -> tuple[Skipped, ...]:
        """The skipped files that were meant to be used."""
        return tuple(item for item in self.skipped if item.severity == "error")

    def totals(self) -> str:
        """One line in words: how many files there are and what became of them."""
        reasons = Counter(item.code for item in self.skipped)
        parts = [f"{len(self.examples)} pictures used", f"{self.captions} caption files"]
        masks = sum(example.mask is not None for example in self.examples)
        parts += [f"{masks} of {len(self.examples)} pictures have masks"] * bool(masks)
        parts += [f"{self.listings} metadata files"] * bool(self.listings) + [f"{self.hidden} hidden"] * bool(
            self.hidden
        )
        parts += [f"{count} skipped: {code}" for code, count in sorted(reasons.items())]
        return f"{self.files} files: " + ", ".join(parts)
