"""Files that strangers made: bytes, text, and names that are safe to show (no torch)."""

from __future__ import annotations

import codecs
import errno
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from emotrain.errors import DatasetError
from emotrain.files import read_regular

MAX_CAPTION_BYTES = 64 * 1024
MAX_METADATA_BYTES = 64 * 1024 * 1024
UNSEEN_FORMATS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


class FileProblem(DatasetError):
    """A file that cannot be used: `code` a short word, `reason` the message without the path."""

    def __init__(self, code: str, path: str | Path, reason: str, hint: str | None = None) -> None:
        super().__init__(f"{printable(path)} {reason}", hint)
        self.code = code
        self.reason = reason


def printable(text: str | Path) -> str:
    r"""A name or caption that any terminal, log or JSON file can take.

    Control characters, directional marks, line ends and bytes that are not UTF-8 become `\x1b`,
    `\u202e`, `\udcff`; all other characters stay.
    """
    return "".join(c if _is_plain(c) else c.encode("unicode_escape").decode("ascii") for c in str(text))


def _is_plain(c: str) -> bool:
    return c.isascii() and c.isprintable() or (
        unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp", "Cn") and c not in UNSEEN_FORMATS
    )  # fmt: skip


def read_bytes(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    A FIFO, socket or device is never waited for, even where it took a file's place after the folder
    was listed.

    Raises:
        FileProblem: missing, unreadable, not a regular file, or larger than `limit`.
    """
    try:
        return read_regular(path, limit)
    except FileNotFoundError as error:
        raise FileProblem("missing", path, "does not exist (any more)") from error
    except OSError as error:
        code = {errno.EFBIG: "too-large", errno.EINVAL: "not-a-file"}.get(error.errno or 0, "unreadable")
        reason = f"cannot be read ({error.strerror})" if code == "unreadable" else f"is {error.strerror}"
        raise FileProblem(code, path, reason) from error


def decode_text(data: bytes, path: Path) -> str:
    """Text of UTF-8 bytes, or of UTF-16 and UTF-32 bytes with a BOM; line ends become newlines.

    Raises:
        FileProblem: another encoding (named by the offset of its first byte), or NUL characters.
    """
    hint = "save the file as UTF-8"
    encoding = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name, at = encoding.removesuffix("-sig").upper(), error.start
        reason = f"is not {name}: byte {at} is 0x{data[at]:02x}"
        raise FileProblem("caption-encoding", path, reason, hint) from error
    if "\0" in text:
        raise FileProblem("caption-encoding", path, f"holds a NUL at character {text.index(chr(0))}", hint)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


NEXT_CAPTION = "%%%"  # alone on a line: what follows is another caption of the same picture


def read_captions(path: Path) -> tuple[tuple[str, ...], int]:
    """The captions of a caption file, () where it says nothing, and how many lines were joined into longer ones.

    The lines of a file are one caption: captioning models write several sentences on several lines. A line `%%%`
    begins another caption. Control characters other than white space are taken out, and white space at both ends.

    Raises:
        FileProblem: as `read_bytes` and `decode_text`; captions end at 64 KiB.
    """
    lines = clean_lines(decode_text(read_bytes(path, limit=MAX_CAPTION_BYTES), path))
    groups: list[list[str]] = [[]]
    for line in lines:
        if line == NEXT_CAPTION:
            groups.append([])
        else:
            groups[-1].append(line)
    captions = tuple(joined(group) for group in groups if group)
    return captions, sum(len(group) for group in groups if len(group) > 1)


def joined(lines: Sequence[str]) -> str:
    """Lines as one caption: a comma where a line ends in the middle of a list of tags, else a space."""
    text = ""
    for line in lines:
        text += ("" if not text else " " if text[-1] in ".,;:!?" else ", ") + line
    return text


def clean_lines(text: str) -> tuple[str, ...]:
    """Lines of `text` that say something, without control characters."""
    lines = (
        "".join(c for c in line if c == "\t" or unicodedata.category(c) not in ("Cc", "Cs"))
        for line in text.split("\n")
    )
    return tuple(line.strip() for line in lines if line.strip())
