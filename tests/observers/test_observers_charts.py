from __future__ import annotations

import math

import numpy as np
import pytest

from emotrain.observers.charts import (
    Curve,
    Mark,
    Scale,
    chart,
    curve_of,
    meter,
    scale_for,
    sparkline,
)
from emotrain.observers.screen import to_plain
from emotrain.observers.trace import Trace


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
    low, _ = trace_of([3.0, 4.0, 5.0]).columns(6, joined=False)
    assert np.array_equal(low, [3.0, math.nan, 4.0, math.nan, math.nan, 5.0], equal_nan=True)


def test_a_trace_leaves_out_what_is_not_finite() -> None:
    trace = trace_of([math.nan, 1.0, math.inf, 2.0])
    assert trace.bounds() == (1.0, 2.0)
    assert np.isfinite(trace.columns(9)[0]).all()
    empty = trace_of([math.nan])
    assert empty.bounds() is None
    assert np.isnan(empty.columns(4)[0]).all()
    assert sparkline(empty, 4, Scale(0.0, 1.0)) == "    "


def test_robust_bounds_leave_out_single_spikes() -> None:
    trace = trace_of([1.0] * 99 + [50.0] + [1.0] * 100, capacity=1024)
    assert trace.robust_bounds() == (1.0, 1.0)
    assert trace.bounds() == (1.0, 50.0)


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 2), (60, 9)])
def test_a_chart_has_exactly_the_size_that_was_asked_for(width: int, height: int, ascii_only: bool) -> None:
    trace = trace_of([1.0, 2.0, math.nan, 3.0, 1.0])
    curves = [curve_of(trace, width, "loss", ascii_only=ascii_only)]
    marks = [Mark(0.5, 2.0, "validation"), Mark(7.0, -99.0, "validation")]
    lines = chart(curves, scale_for(trace.bounds()), width, height, marks=marks, ascii_only=ascii_only)
    shown = to_plain(lines)
    assert [len(line) for line in shown] == [width] * height
    assert not ascii_only or all(line.isascii() for line in shown)


def test_a_rising_curve_rises_in_braille() -> None:
    ramp = np.linspace(0.0, 1.0, 8)
    shown = to_plain(chart([Curve("loss", ramp, ramp)], Scale(0.0, 1.0), 4, 2))
    assert shown == ["  ⡠⠊", "⡠⠊  "]


def test_a_jump_is_drawn_without_holes() -> None:
    jump = np.array([0.0] * 4 + [1.0] * 4)
    shown = to_plain(chart([Curve("loss", jump, jump)], Scale(0.0, 1.0), 4, 3))
    assert all(line.strip() for line in shown)


def test_in_ascii_single_values_are_points_and_lines_are_stars() -> None:
    level = np.full(3, 1.0)
    dots, line = Curve("raw", level, level, dots=True), Curve("loss", level * 0, level * 0)
    shown = to_plain(chart([dots, line], Scale(0.0, 1.0), 3, 2, ascii_only=True))
    assert shown == ["...", "***"]


def test_marks_show_in_front_of_curves() -> None:
    flat = np.full(8, 0.5)
    lines = chart([Curve("loss", flat, flat)], Scale(0.0, 1.0), 4, 1, marks=[Mark(0.0, 0.5, "validation")])
    assert lines[0][0] == ("◆", "validation")
    assert lines[0][1][1] == "loss"


def test_symmetric_scales_keep_zero_in_the_middle_and_log_scales_take_zero() -> None:
    scale = scale_for((-0.1, 0.4), symmetric=True)
    assert scale.low == -scale.high
    heights = Scale(1e-8, 1e-3, log=True).heights(np.array([0.0, 1e-8, 1e-3, math.nan]))
    assert heights[:3].tolist() == [0.0, 0.0, 1.0]
    assert math.isnan(heights[3])


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.33, 0.999, 1.0, 7.0, math.nan])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_meter_is_as_wide_as_asked(share: float, ascii_only: bool) -> None:
    filled, empty = meter(share, 10, ascii_only=ascii_only)
    assert len(filled) + len(empty) == 10
    if share >= 1.0:
        assert empty == ""


def test_a_sparkline_shows_low_and_high() -> None:
    assert sparkline(trace_of([0.0, 1.0]), 2, Scale(0.0, 1.0)) == "▁█"
    assert sparkline(trace_of([0.0, 1.0]), 2, Scale(0.0, 1.0), ascii_only=True).isascii()
