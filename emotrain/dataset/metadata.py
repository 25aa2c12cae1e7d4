"""Captions that lie in data files: metadata.jsonl, metadata.csv, and a .json beside each picture (no torch)."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path, PurePosixPath

from emotrain.dataset.textfile import (
    MAX_METADATA_BYTES,
    FileProblem,
    clean_lines,
    decode_text,
    printable,
    read_bytes,
)

METADATA = ("metadata.jsonl", "metadata.csv")
TEXT_KEYS = ("text", "caption", "prompt")
TAG_KEYS = ("tags", "tag_string")  # of the .json that gallery downloaders write beside a picture
Listing = dict[tuple[str, ...], tuple[str, ...]]


def read_listing(path: Path, above: tuple[str, ...]) -> Listing:
    """Captions by the parts of the picture's path below the data folder.

    `above` are the parts of the folder that the listing lies in.

    `text` (or `caption`, `prompt`) is a string or a list of strings; lines without one name the picture and
    leave it without a caption. A .csv has a line of column names, `file_name` and one of these.

    Raises:
        FileProblem: unreadable, not UTF-8, or a line that is not such an object; the line is named.
    """
    text = decode_text(read_bytes(path, limit=MAX_METADATA_BYTES), path)
    return _of_csv(text, path, above) if path.suffix.lower() == ".csv" else _of_lines(text, path, above)


def _of_csv(text: str, path: Path, above: tuple[str, ...]) -> Listing:
    listing: Listing = {}
    try:
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise FileProblem("metadata", path, f"is not a table of comma-separated values ({error})") from error
    for number, row in enumerate(rows, start=2):
        name = row.get("file_name")
        if not name:
            raise FileProblem("metadata", path, f"has no `file_name` in line {number}", "file_name,text")
        listing[(*above, *PurePosixPath(name.replace("\\", "/")).parts)] = _texts(dict(row), path, number)
    return listing


def read_sidecar(path: Path) -> tuple[str, ...]:
    """The captions of a .json beside a picture: `caption`, `text` or `prompt`, else its `tags`; () where it has none.

    Raises:
        FileProblem: unreadable, not JSON, or a value of another kind.
    """
    try:
        entry = json.loads(decode_text(read_bytes(path, limit=MAX_METADATA_BYTES), path))
    except (ValueError, RecursionError) as error:
        raise FileProblem("metadata", path, "is not JSON") from error
    if not isinstance(entry, dict):
        raise FileProblem("metadata", path, "is not a JSON object")
    if any(entry.get(key) for key in TEXT_KEYS):
        return _texts(entry, path, 1)
    tags = next((entry[key] for key in TAG_KEYS if entry.get(key)), None)
    if isinstance(tags, str):
        tags = tags.split(",") if "," in tags else tags.split()
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        return (", ".join(clean_lines("\n".join(tags))),)
    return ()


def _of_lines(text: str, path: Path, above: tuple[str, ...]) -> Listing:
    lines = text.split("\n")
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
    others = [key for key, held in entry.items() if key not in ("file_name", *TEXT_KEYS) and isinstance(held, str)]
    if value == [] and others:
        reason = f"has no `text` in line {number}, but {', '.join(f'`{printable(str(key))}`' for key in others[:3])}"
        raise FileProblem("metadata", path, reason, "rename the key that holds the caption to `text`")
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
