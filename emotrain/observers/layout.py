"""The dashboard's frame for a board and a size: every line fits, and the important ones come first.

Three forms: compact (small terminals: one line a curve), standard (one column), wide (curves beside
each other). Whatever the size, loss, scalar, trust and emoPulse are kept before everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emotrain.observers import curves, parts
from emotrain.observers.board import MAX_NOTICES, Board
from emotrain.observers.charts import Line
from emotrain.observers.lines import ascii_lines, beside, crop
from emotrain.observers.look import Look

WIDE_COLUMNS, WIDE_ROWS = 116, 26
STANDARD_COLUMNS, STANDARD_ROWS = 60, 17
MAX_WIDTH, MAX_HEIGHT = 240, 64
MAX_LOSS_ROWS, MAX_STRIP_ROWS = 28, 8


def compose(board: Board, columns: int, rows: int, *, ascii: bool = False) -> list[Line]:
    """The frame for a terminal of `columns` x `rows`.

    Returns:
        At most `rows` - 1 lines (one row is left for the cursor) of at most `columns` - 1 cells.
    """
    width = max(1, min(columns - 1, MAX_WIDTH))
    height = max(1, min(rows - 1, MAX_HEIGHT))
    look = Look(ascii)
    if board.last is None:
        frame = _waiting(board, width, height, look)
    elif width >= WIDE_COLUMNS and height >= WIDE_ROWS:
        frame = _wide(board, width, height, look)
    elif width >= STANDARD_COLUMNS and height >= STANDARD_ROWS:
        frame = _standard(board, width, height, look)
    else:
        frame = _compact(board, width, height, look)
    frame = [crop(line, width) for line in frame[:height]]
    return ascii_lines(frame) if ascii else frame


def notice_lines(board: Board, columns: int, *, ascii: bool = False) -> list[Line]:
    """The last notices alone."""
    lines = parts.notices(board, max(1, columns - 1), MAX_NOTICES)
    return ascii_lines(lines) if ascii else lines


def _waiting(board: Board, width: int, height: int, look: Look) -> list[Line]:
    """Before the first step: what is being done, and what is known about the run."""
    head = [parts.header(board, width, look)]
    phases = parts.phase_lines(board, width, look)
    notices = parts.notices(board, width, 3)
    facts = parts.facts(board, width)
    room = height - len(head) - len(phases) - len(notices)
    frame = [*head, *facts[: max(0, room)]]
    return [*frame, *phases[-max(1, height - len(frame)) :], *notices]


def _compact(board: Board, width: int, height: int, look: Look) -> list[Line]:
    """One line each; what has no room is left out, the least important first."""
    blocks: list[tuple[int, Callable[[], Line]]] = [
        (8, lambda: parts.header(board, width, look)),
        (4, lambda: parts.status(board, width, look)),
        (9, lambda: parts.progress(board, width, look)),
        (0, lambda: curves.strip_line("loss", board, width, look)),
        (1, lambda: curves.strip_line("scalar", board, width, look)),
        (2, lambda: curves.strip_line("trust", board, width, look)),
        (3, lambda: curves.strip_line("emoPulse", board, width, look)),
        (5, lambda: parts.stop(board, width, look)),
        (6, lambda: parts.timing(board, width, look)),
        (7, lambda: parts.last_notice(board, width)),
        (10, lambda: parts.validation(board, width)),
        (11, lambda: parts.samples(board, width)),
        (12, lambda: parts.saved(board, width)),
    ]
    made = [(rank, make()) for rank, make in blocks]
    made = [(rank, line) for rank, line in made if line]
    kept = sorted(made, key=lambda item: item[0])[:height]
    ranks = {rank for rank, _ in kept}
    return [line for rank, line in made if rank in ranks]


def _standard(board: Board, width: int, height: int, look: Look) -> list[Line]:
    head = [
        parts.header(board, width, look),
        parts.progress(board, width, look),
        parts.status(board, width, look),
    ]
    foot = _present(
        parts.stop(board, width, look),
        parts.validation(board, width),
        parts.samples(board, width),
        parts.saved(board, width),
        parts.last_notice(board, width),
    )
    room = height - len(head) - len(foot) - 1
    strip_rows = min(MAX_STRIP_ROWS, max(1, room // 6))
    loss_rows = min(MAX_LOSS_ROWS, max(2, room - 3 * strip_rows))
    spare = room - loss_rows - 3 * strip_rows
    gap: list[Line] = [[]] if spare > 0 else []
    return [
        *head,
        *gap,
        curves.loss_legend(board, width),
        *curves.loss_chart(board, width, loss_rows, look),
        *_strips(board, width, strip_rows, look),
        *foot,
    ]


def _wide(board: Board, width: int, height: int, look: Look) -> list[Line]:
    head: list[Line] = [
        parts.header(board, width, look),
        parts.progress(board, width, look),
        parts.status(board, width, look),
        [],
    ]
    left_width = int(width * 0.58)
    right_width = width - left_width - 2
    half = width // 2
    foot = beside(
        _present(
            parts.stop(board, half, look),
            parts.validation(board, half),
            parts.samples(board, half),
            parts.saved(board, half),
            parts.folder(board, half),
        ),
        parts.notices(board, width - half - 2, 5),
        half,
        width,
    )
    names = ["scalar", "trust", "emoPulse", *(["observed_loss"] if board.observes_other else [])]
    room = min(height - len(head) - len(foot) - 1, MAX_LOSS_ROWS + 6)
    loss = [
        curves.loss_legend(board, left_width),
        *curves.loss_chart(board, left_width, room - 1, look),
    ]
    each = room // len(names)
    right: list[Line] = []
    for name in names:
        right.append(curves.strip_title(name, board, right_width, look))
        right.extend(curves.strip_chart(name, board, right_width, each - 1, look))
    return [*head, *beside(loss, right, left_width, width), [], *foot]


def _strips(board: Board, width: int, rows: int, look: Look) -> list[Line]:
    lines: list[Line] = []
    for name in ("scalar", "trust", "emoPulse"):
        if rows == 1:
            lines.append(curves.strip_line(name, board, width, look))
        else:
            lines.extend(curves.strip(name, board, width, rows, look))
    return lines


def _present(*lines: Sequence[tuple[str, str]]) -> list[Line]:
    return [list(line) for line in lines if line]
