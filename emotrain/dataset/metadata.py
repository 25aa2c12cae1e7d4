"""`metadata.jsonl` of an image folder: a JSON object a line, `file_name` and `text` (no torch)."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from emotrain.dataset.textfile import (
    MAX_METADATA_BYTES,
    FileProblem,
    clean_lines,
    decode_text,
    read_bytes,
)

METADATA = "metadata.jsonl"
TEXT_KEYS = ("text", "caption")
Listing = dict[tuple[str, ...], tuple[str, ...]]


def read_listing(path: Path, above: tuple[str, ...]) -> Listing:
    """Captions by the parts of the picture's path below the data folder.

    `above` are the parts of the folder that the listing lies in.

    `text` (or `caption`) is a string or a list of strings; lines without one name the picture and
    leave it without a caption.

    Raises:
        FileProblem: unreadable, not UTF-8, or a line that is not such an object; the line is named.
    """
    lines = decode_text(read_bytes(path, limit=MAX_METADATA_BYTES), path).split("\n")
    listing: Listing = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileProblem("metadata", path, f"is not JSON in line {number}", "one object a line") from error
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise FileProblem(
                "metadata",
                path,
                f"has no `file_name` in line {number}",
                '{"file_name": "a.png", "text": "..."}',
            )
        listing[(*above, *PurePosixPath(name.replace("\\", "/")).parts)] = _texts(entry, path, number)
    return listing


def _texts(entry: dict[str, object], path: Path, number: int) -> tuple[str, ...]:
    value = next((entry[key] for key in TEXT_KEYS if entry.get(key) is not None), [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FileProblem(
            "metadata",
            path,
            f"has a `text` in line {number} that is not a string or a list of strings",
        )
    if any("\0" in text for text in texts):
        raise FileProblem("metadata", path, f"holds a NUL in line {number}")
    return tuple(" ".join(lines) for text in texts if (lines := clean_lines(text)))
