"""Changes to caption files: what a caption would say, with everything else of the file as it is (no torch).

A file keeps its encoding, byte order mark, line ends and spacing; only the tags that are named are touched. Tags stand
between commas, line ends and `|||`; a line `%%%` begins another caption, and each one is changed by itself.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emotrain.dataset.captions import PLACEHOLDER
from emotrain.dataset.textfile import NEXT_CAPTION, FileProblem

BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
_NEXT = re.compile(rf"^([ \t]*{re.escape(NEXT_CAPTION)}[ \t]*(?:\r\n|\r|\n|\Z))", re.MULTILINE)
# A number such as 1,000 (taken whole), or what stands between two tags.
_BETWEEN = re.compile(r"(?<![\w.])(\d{1,3}(?:,\d{3})+)(?!\w)|\s*(?:,|\|\|\|)\s*|[ \t]*[\r\n]\s*")


@dataclass(frozen=True)
class Edits:
    """What to do with each caption, in this order."""

    replace: Sequence[tuple[str, str]] = ()  # (old, new) texts, wherever the old one stands
    remove: Sequence[str] = ()  # tags
    add: Sequence[str] = ()  # tags, behind the others where a caption lacks them
    move: Sequence[tuple[str, int]] = ()  # (tag, place): 1 is the first, -1 the last
    trigger: str | None = None  # a word to stand in front

    def __bool__(self) -> bool:
        return bool(self.replace or self.remove or self.add or self.move or self.trigger)


@dataclass
class _Tags:
    """A caption taken apart: text = head + tags with what is between them + tail."""

    head: str
    tags: list[str]
    between: list[str]  # one fewer than tags
    tail: str

    def text(self) -> str:
        middle = "".join(tag + gap for tag, gap in zip(self.tags, [*self.between, ""], strict=True))
        return self.head + middle + self.tail

    def find(self, tag: str) -> int | None:
        return next((index for index, own in enumerate(self.tags) if _same(own, tag)), None)

    def ends_with(self, tag: str) -> bool:
        """Whether the tag stands behind the last sentence, where `insert` puts it."""
        return re.search(rf"[.!?;:]\s{re.escape(tag)}\Z", self.tags[-1], re.IGNORECASE) is not None

    def remove(self, index: int) -> None:
        """Take a tag out, with the gap behind it, or before it where that one says less."""
        del self.tags[index]
        if not self.between:
            self.tags = [""]
            return
        behind = index < len(self.between)
        before_is_plain = index > 0 and self.between[index - 1].strip() == ","
        del self.between[
            index if behind and not (before_is_plain and self.between[index].strip() != ",") else index - 1
        ]

    def insert(self, index: int, tag: str) -> None:
        """Put a tag in; the gap to its neighbour is a comma, or a space behind the end of a sentence."""
        if self.tags == [""]:
            self.tags = [tag]
            return
        before = self.tags[index - 1] if index else ""
        self.tags.insert(index, tag)
        self.between.insert(max(index - 1, 0), " " if before.endswith((".", "!", "?", ";", ":")) else ", ")


def edit_bytes(data: bytes, edits: Edits, path: Path) -> bytes:
    """A caption file's bytes after the edits; the same ones where nothing changes.

    Raises:
        FileProblem: it is not text.
    """
    bom, encoding = _encoding(data)
    try:
        text = data[len(bom) :].decode(encoding)
    except UnicodeDecodeError as error:
        reason = f"is not {encoding.upper()}: byte {error.start} is 0x{data[len(bom) + error.start]:02x}"
        raise FileProblem("caption-encoding", path, reason, "save the file as UTF-8") from error
    return bom + edit_text(text, edits).encode(encoding)


def text_of(data: bytes) -> str:
    """A caption file's text, for the eye."""
    bom, encoding = _encoding(data)
    return data[len(bom) :].decode(encoding, "replace")


def _encoding(data: bytes) -> tuple[bytes, str]:
    return next(((bom, name) for bom, name in BOMS if data.startswith(bom)), (b"", "utf-8"))


def edit_text(text: str, edits: Edits) -> str:
    """As `edit_bytes`, of the file's text."""
    parts = _NEXT.split(text)  # captions and, between them, the lines that part them
    alone = len(parts) == 1
    return "".join(
        _edit(part, edits) if index % 2 == 0 and (alone or part.strip()) else part for index, part in enumerate(parts)
    )


def _edit(caption: str, edits: Edits) -> str:
    for old, new in edits.replace:
        caption = caption.replace(old, new)
    found = _take_apart(caption)
    for tag in edits.remove:
        while (at := found.find(tag)) is not None:
            found.remove(at)
    for tag in edits.add:
        if found.find(tag) is None and not found.ends_with(tag):
            found.insert(len(found.tags), tag)
    for tag, place in edits.move:
        if (at := found.find(tag)) is not None:
            found.tags.insert(_index(place, len(found.tags)), found.tags.pop(at))
    if edits.trigger:
        _put_in_front(found, edits.trigger)
    return found.text()


def _index(place: int, count: int) -> int:
    return min(place - 1, count - 1) if place > 0 else max(count + place, 0)


def _put_in_front(found: _Tags, trigger: str) -> None:
    """Where the caption has the trigger as a tag, that moves; where it begins with it, or says [trigger], it stays."""
    begins = re.match(rf"{re.escape(trigger)}(?!\w)", found.tags[0], re.IGNORECASE)
    if begins or any(PLACEHOLDER in tag for tag in found.tags):
        return
    if (at := found.find(trigger)) is not None:
        found.tags.insert(0, found.tags.pop(at))
    else:
        found.insert(0, trigger)


def _take_apart(caption: str) -> _Tags:
    head = caption[: len(caption) - len(caption.lstrip())] if caption.strip() else ""
    body = caption.strip()
    tail = caption[len(head) + len(body) :]
    tags, between, start = [], [], 0
    for gap in _BETWEEN.finditer(body):
        if gap[1] is None:
            tags.append(body[start : gap.start()])
            between.append(gap[0])
            start = gap.end()
    return _Tags(head, [*tags, body[start:]], between, tail)


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()
