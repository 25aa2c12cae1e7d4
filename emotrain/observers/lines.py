"""Small tools for lines of spans: measure, cut, fill up, put side by side, break into several."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from emotrain.observers.charts import Line
from emotrain.observers.text import ascii_only, fit


def width_of(line: Line) -> int:
    """Terminal cells of a line."""
    text = "".join([text for text, _ in line])
    return len(text) if text.isascii() else cell_len(text)


def crop(line: Line, width: int) -> Line:
    """The line cut to `width` cells."""
    if width_of(line) <= width:
        return line
    kept: Line = []
    room = width
    for text, style in line:
        if room <= 0:
            break
        size = cell_len(text)
        if size > room:
            text = fit(text, room)
            size = cell_len(text)
        kept.append((text, style))
        room -= size
    return kept


def pad(line: Line, width: int) -> Line:
    """The line cut or filled up to exactly `width` cells."""
    cut = crop(line, width)
    missing = width - width_of(cut)
    return [*cut, (" " * missing, "")] if missing > 0 else cut


def spread(left: Line, right: Line, width: int) -> Line:
    """One line at the left edge and one at the right, which goes where there is no room."""
    gap = width - width_of(left) - width_of(right)
    if gap < 1:
        return crop(left, width)
    return [*left, (" " * gap, ""), *right]


def join(parts: Sequence[Line], width: int, *, gap: str = "  ") -> Line:
    """As many of the leading parts as fit beside each other; the first one always."""
    line: Line = list(parts[0]) if parts else []
    used = width_of(line)
    for part in parts[1:]:
        size = width_of(part)
        if used + len(gap) + size > width:
            continue
        line = [*line, (gap, ""), *part]
        used += len(gap) + size
    return crop(line, width)


def beside(left: Sequence[Line], right: Sequence[Line], left_width: int, width: int) -> list[Line]:
    """Two blocks side by side, two cells between them."""
    height = max(len(left), len(right))
    rows: list[Line] = []
    for number in range(height):
        first = left[number] if number < len(left) else []
        second = right[number] if number < len(right) else []
        rows.append([*pad(first, left_width), ("  ", ""), *crop(second, width - left_width - 2)])
    return rows


def wrap(text: str, width: int) -> list[str]:
    """Text broken into lines of at most `width` cells, at spaces where that is possible."""
    if width < 1:
        return []
    lines: list[str] = []
    rest = text.strip()
    while rest:
        cut = _cells_cut(rest, width)
        if cut < len(rest):
            space = rest.rfind(" ", 1, cut + 1)
            cut = space if space > 0 else cut
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines


def _cells_cut(text: str, width: int) -> int:
    """How many leading characters fit into `width` cells, at least one."""
    if cell_len(text) <= width:
        return len(text)
    used = 0
    for number, char in enumerate(text):
        used += cell_len(char)
        if used > width:
            return max(1, number)
    return len(text)


def ascii_lines(lines: Sequence[Line]) -> list[Line]:
    """Lines for a terminal that only shows ASCII; none gets longer."""
    return [[(ascii_only(text), style) for text, style in line] for line in lines]
