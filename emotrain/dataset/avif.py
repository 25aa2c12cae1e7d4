"""How many frames an AVIF picture makes its decoder work on: hidden ones too, which cost as much as those shown.

Boxes: ISO/IEC 14496-12 (`iloc`, `stsz`, `stco`); the bits of a picture: AV1 specification, 5.3 (open bitstream units).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

FRAMES = (3, 6)  # OBU types: a frame's header alone, and a whole frame


def num_frames(data: bytes) -> int:
    """Frames in the items of a file and in the first picture of each of its films, as far as they can be read."""
    places = {place for box in _boxes(data, b"iloc") for place in _items(box)} | set(_first_samples(data))
    return sum(kind in FRAMES for at, size in places for kind in _obus(data[at : at + size]))


def _boxes(data: bytes, name: bytes) -> Iterator[bytes]:
    """Contents of every box of that name, wherever it lies."""
    for found in re.finditer(re.escape(name), data):
        if found.start() >= 4:
            size = int.from_bytes(data[found.start() - 4 : found.start()], "big")
            yield data[found.end() : found.start() - 4 + size]


def _items(box: bytes) -> Iterator[tuple[int, int]]:
    """(offset, length) of the extents of an `iloc` box."""
    version, widths, base = box[0:1], box[4:6], 6
    if len(widths) < 2:
        return
    offset_size, length_size, base_size = widths[0] >> 4, widths[0] & 15, widths[1] >> 4
    index_size = widths[1] & 15 if version in (b"\1", b"\2") else 0
    wide = version == b"\2"
    reader = _Reader(box, base)
    for _ in range(reader.number(4 if wide else 2)):
        reader.at += (4 if wide else 2) + (2 if version in (b"\1", b"\2") else 0) + 2
        start = reader.number(base_size)
        for _ in range(reader.number(2)):
            reader.at += index_size
            offset = reader.number(offset_size)
            yield start + offset, reader.number(length_size)
            if reader.at > len(box):
                return
        if reader.at > len(box):
            return


def _first_samples(data: bytes) -> Iterator[tuple[int, int]]:
    """(offset, length) of the first picture of each film."""
    sizes = [_Reader(box, 4) for box in _boxes(data, b"stsz")]
    starts = [_Reader(box, 8).number(4) for box in _boxes(data, b"stco")]
    starts += [_Reader(box, 8).number(8) for box in _boxes(data, b"co64")]
    for start, reader in zip(starts, sizes, strict=False):
        one, _, first = reader.number(4), reader.number(4), reader.number(4)
        yield start, one or first


def _obus(data: bytes) -> Iterator[int]:
    """Types of the units in a picture's bits."""
    reader = _Reader(data, 0)
    while reader.at < len(data):
        head = reader.number(1)
        reader.at += head >> 2 & 1
        size = reader.leb128() if head & 2 else len(data) - reader.at
        reader.at += size
        yield head >> 3 & 15


class _Reader:
    """Numbers one after another; behind the end they are 0."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def number(self, size: int) -> int:
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "big")

    def leb128(self) -> int:
        value = 0
        for place in range(8):
            byte = self.number(1)
            value |= (byte & 127) << 7 * place
            if byte < 128:
                break
        return value
