from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest

from emotrain.observers.curve import AXIS, Plot, Points, Scale, Source, Trace, scale_for, sparkline, step_axis
from emotrain.observers.dashboard import make_console


class Line:
    """Values that are drawn as they are, stretched to the columns."""

    def __init__(self, values: list[float]) -> None:
        self.values = np.array(values)

    def columns(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        values = self.values[(np.arange(width) * len(self.values)) // width]
        return values, values


def drawn(plot: Plot, width: int, height: int, *, encoding: str = "utf-8") -> list[str]:
    console = make_console(io.TextIOWrapper(io.BytesIO(), encoding=encoding), {"TERM": "xterm"}, width=width, height=90)
    lines = console.render_lines(plot, console.options.update(height=height), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


def cells(source: Source, width: int, height: int) -> list[str]:
    return [line[AXIS:] for line in drawn(Plot([(source, "loss")], Scale(0.0, 1.0)), width + AXIS, height)]


def trace_of(values: list[float], capacity: int = 16) -> Trace:
    trace = Trace(capacity)
    for value in values:
        trace.add(value)
    return trace


def test_a_trace_keeps_its_size_and_every_peak() -> None:
    values = [math.sin(i / 700.0) for i in range(20_000)]
    values[12_345] = 9.0
    values[345] = -9.0
    trace = trace_of(values, capacity=64)
    assert len(trace) <= 64
    assert trace.num_values == 20_000
    assert trace.bounds() == (-9.0, 9.0)
    low, high = trace.columns(40)
    assert high.max() == 9.0
    assert low.min() == -9.0
    assert abs(int(np.argmax(high)) - round(40 * 12_345 / 20_000)) <= 1


def test_a_short_trace_is_stretched_over_the_whole_width() -> None:
    low, high = trace_of([0.0, 1.0]).columns(5)
    assert np.allclose(low, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert np.array_equal(low, high)


def test_a_trace_leaves_out_what_is_not_finite() -> None:
    trace = trace_of([math.nan, 1.0, math.inf, 2.0])
    assert trace.bounds() == (1.0, 2.0)
    assert np.isfinite(trace.columns(9)[0]).all()
    empty = trace_of([math.nan])
    assert empty.bounds() is None
    assert np.isnan(empty.columns(4)[0]).all()
    assert sparkline(empty, 4, Scale(0.0, 1.0)) == "    "


def test_bounds_can_leave_out_single_spikes() -> None:
    trace = trace_of([1.0] * 99 + [50.0] + [1.0] * 100, capacity=1024)
    assert trace.bounds(0.02) == (1.0, 1.0)
    assert trace.bounds() == (1.0, 50.0)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(("width", "height"), [(20, 2), (33, 3), (60, 9)])
def test_a_plot_has_exactly_the_size_that_was_asked_for(width: int, height: int, encoding: str) -> None:
    trace = trace_of([1.0, 2.0, math.nan, 3.0, 1.0])
    points = Points([(2, 2.0), (99, -99.0)], 1, 5)
    plot = Plot([(trace, "loss")], scale_for(trace.bounds()), marks=(points, "validation"), steps=(1, 5))
    shown = drawn(plot, width, height, encoding=encoding)
    assert [len(line) for line in shown] == [width] * height
    assert encoding == "utf-8" or all(line.isascii() for line in shown)
    assert shown[-1].endswith("step 5")


def test_a_rising_curve_rises_in_braille() -> None:
    assert cells(Line([step / 7 for step in range(8)]), 4, 2) == ["  ⡠⠊", "⡠⠊  "]


def test_a_jump_is_drawn_without_holes() -> None:
    assert all(line.strip() for line in cells(Line([0.0] * 4 + [1.0] * 4), 4, 3))


def test_marks_stand_at_their_step_in_front_of_the_curve() -> None:
    marks = (Points([(0, 0.5), (10, 0.5)], 0, 10), "validation")
    (_, line) = drawn(Plot([(Line([0.5] * 8), "loss")], Scale(0.0, 1.0), marks=marks), AXIS + 11, 2)
    assert line[AXIS] == line[AXIS + 10] == "◆"
    assert "◆" not in line[AXIS + 1 : AXIS + 10]


def test_the_line_between_points_ends_with_them() -> None:
    low, _ = Points([(10, 1.0), (20, 3.0)], 0, 40).columns(41)
    assert np.isnan(low[:9]).all()
    assert low[10:21].tolist() == pytest.approx([1.0 + step / 5 for step in range(11)])
    assert np.isnan(low[22:]).all()


@pytest.mark.parametrize(("first", "last"), [(1, 1), (0, 7), (1, 165), (21, 30_000), (50_000, 50_013)])
@pytest.mark.parametrize("width", [5, 12, 40, 150])
def test_the_axis_has_round_steps_over_their_places(first: int, last: int, width: int) -> None:
    axis = step_axis(first, last, width)
    assert len(axis) == (width if width >= len(f"step {last}") else 0)
    assert axis.endswith(f"step {last}") or not axis
    for match in re.finditer(r"\d+", axis.rpartition("step")[0]):
        middle = (match.start() + match.end() - 1) / 2
        place = (int(match[0]) - first) / max(last - first, 1) * (width - 1)
        assert abs(middle - place) <= len(match[0]) / 2 + 1


def test_symmetric_scales_keep_zero_in_the_middle_and_log_scales_take_zero() -> None:
    scale = scale_for((-0.1, 0.4), symmetric=True)
    assert scale.low == -scale.high
    heights = Scale(1e-8, 1e-3, log=True).heights(np.array([0.0, 1e-8, 1e-3, math.nan]))
    assert heights[:3].tolist() == [0.0, 0.0, 1.0]
    assert math.isnan(heights[3])


def test_a_sparkline_shows_low_and_high() -> None:
    assert sparkline(trace_of([0.0, 1.0]), 2, Scale(0.0, 1.0)) == "▁█"
    assert sparkline(trace_of([0.0, 1.0]), 2, Scale(0.0, 1.0), ascii_only=True).isascii()
