"""The curves of the dashboard's frame, each made for a given width."""

from __future__ import annotations

from emotrain.observers.board import Board
from emotrain.observers.charts import (
    Line,
    Mark,
    Scale,
    chart,
    curve_of,
    scale_for,
    sparkline,
)
from emotrain.observers.lines import crop, join, pad
from emotrain.observers.look import Look
from emotrain.observers.text import fit, number
from emotrain.observers.trace import Trace

AXIS = 9  # cells for the figures at the left of a chart
LABEL = 19  # cells for the label and value at the left of a strip


def loss_legend(board: Board, width: int) -> Line:
    """The figures of the loss chart."""
    last = board.last
    if last is None:
        return []
    items: list[Line] = [
        [("loss ", "label"), (number(last.loss), "raw")],
        [("smoothed ", "label"), (number(board.smooth.value), "loss")],
    ]
    if board.observes_other:
        items.append([("observed ", "label"), (number(last.observed_loss), "observed_loss")])
    if board.validation is not None:
        items.append([("validation ", "label"), (number(board.validation.loss), "validation")])
    return join(items, width)


def loss_chart(board: Board, width: int, rows: int, look: Look) -> list[Line]:
    """Raw loss, the loss the optimizer uses, smoothed loss, and the validation as marks."""
    if rows < 1 or board.last is None:
        return []
    span = width - AXIS
    marks = [Mark(x, value, "validation") for x, value in board.validation_marks()]
    scale = scale_for(_loss_bounds(board, [mark.value for mark in marks]))
    curves = [curve_of(board.loss, span, "raw", dots=True, ascii_only=look.ascii)]
    if board.observes_other:
        curves.append(curve_of(board.observed_loss, span, "observed_loss", dots=True, ascii_only=look.ascii))
    curves.append(curve_of(board.smoothed, span, "loss", ascii_only=look.ascii))
    drawn = chart(curves, scale, span, rows, marks=marks, ascii_only=look.ascii)
    return _with_axis(drawn, scale, AXIS)


def _loss_bounds(board: Board, validations: list[float]) -> tuple[float, float] | None:
    """Room for nearly all raw values and all smoothed ones; single spikes are cut off."""
    found = [bounds for bounds in (board.loss.robust_bounds(), board.smoothed.bounds()) if bounds is not None]
    if validations:
        found.append((min(validations), max(validations)))
    if not found:
        return None
    return min(low for low, _ in found), max(high for _, high in found)


def _with_axis(drawn: list[Line], scale: Scale, width: int) -> list[Line]:
    """The highest and the lowest figure at the left of a chart."""
    lines: list[Line] = []
    for row, line in enumerate(drawn):
        text = ""
        if row == 0:
            text = number(scale.high, digits=3)
        elif row == len(drawn) - 1:
            text = number(scale.low, digits=3)
        lines.append([(fit(text, width - 1).rjust(width - 1) + " ", "rule"), *line])
    return lines


def _strip_source(name: str, board: Board) -> tuple[Trace, Scale, str, str]:
    """Trace, scale, style and the present value in words."""
    if name == "loss":
        scale = scale_for(_loss_bounds(board, []))
        return board.smoothed, scale, "loss", number(board.last.loss if board.last else None)
    if name == "observed_loss":
        value = number(board.last.observed_loss if board.last else None)
        return board.observed_loss, scale_for(board.observed_loss.robust_bounds()), "observed_loss", value
    if name == "scalar":
        scale = scale_for(board.scalar.bounds(), symmetric=True)
        return board.scalar, scale, "scalar", number(board.scalar.last, signed=True)
    if name == "trust":
        return board.trust, Scale(-1.0, 1.0), "trust", number(board.trust.last, signed=True)
    scale = scale_for(board.pulse.bounds(), log=True)
    return board.pulse, scale, "pulse", f"{board.pulse.last:.2e}"


def strip_line(name: str, board: Board, width: int, look: Look) -> Line:
    """Label, value and the curve in one line."""
    trace, scale, style, value = _strip_source(name, board)
    head: Line = [(f"{name:<8} ", "label"), (f"{value:>9} ", style)]
    room = width - LABEL
    if room < 4:
        return crop([(f"{name} ", "label"), (value, style)], width)
    return [*head, (sparkline(trace, room, scale, ascii_only=look.ascii), style)]


def strip(name: str, board: Board, width: int, rows: int, look: Look) -> list[Line]:
    """Label and value at the left of a curve of several rows."""
    trace, scale, style, value = _strip_source(name, board)
    span = width - LABEL
    drawn = _curve(trace, scale, style, span, rows, look)
    heads: list[Line] = [[(f"{name:<8} ", "label"), (f"{value:>9} ", style)]]
    return [[*pad(heads[0] if row == 0 else [], LABEL), *line] for row, line in enumerate(drawn)]


def strip_title(name: str, board: Board, width: int, look: Look) -> Line:
    """Label and value above a curve."""
    _, _, style, value = _strip_source(name, board)
    return crop([(f"{name} ", "label"), (value, style)], width)


def strip_chart(name: str, board: Board, width: int, rows: int, look: Look) -> list[Line]:
    """A curve of several rows with its axis."""
    if rows < 1:
        return []
    trace, scale, style, _ = _strip_source(name, board)
    drawn = _curve(trace, scale, style, width - AXIS, rows, look)
    return _with_axis(drawn, scale, AXIS)


def _curve(trace: Trace, scale: Scale, style: str, span: int, rows: int, look: Look) -> list[Line]:
    curves = [curve_of(trace, span, style, ascii_only=look.ascii)]
    return chart(curves, scale, span, rows, zero=True, ascii_only=look.ascii)
