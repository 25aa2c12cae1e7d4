"""Charts as SVG, by hand, for a page or a file (no torch, no drawing library)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
_COLOURS = ("#3b6fb6", "#d1663f", "#3f9a6b", "#8a5fb0", "#777777")
_LEFT, _RIGHT, _TOP, _GAP = 64, 16, 30, 46


@dataclass(frozen=True)
class Panel:
    """One chart: named curves of (x, y), a linear or logarithmic y axis, marked places on the x axis."""

    title: str
    curves: Sequence[tuple[str, Points]]
    log: bool = False
    bounds: tuple[float, float] | None = None
    marks: Sequence[tuple[float, str]] = ()
    x_label: str = "step"


def svg(panels: Sequence[Panel], *, title: str = "", width: int = 820, panel_height: int = 150) -> str:
    """Panels below each other as one SVG text, with one x axis for all.

    A page may colour it anew: the classes are paper, grid, mark, and c0, c1 ... for the curves.

    Args:
        panels: with finite points; values that are not positive are left out of a logarithmic one.
        title: above all panels.
        width: in pixels.
        panel_height: in pixels, without its title and axis.
    """
    top = 34 if title else 8
    height = top + len(panels) * (panel_height + _TOP + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#333333">',
        f'<rect class="paper" width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    if title:
        parts.append(f'<text x="{_LEFT}" y="22" font-size="15" font-weight="bold">{html.escape(title)}</text>')
    x_range = _range([x for panel in panels for _, curve in panel.curves for x, _ in curve])
    for panel in panels:
        parts += _panel(panel, x_range, top + _TOP, width - _LEFT - _RIGHT, panel_height)
        top += panel_height + _TOP + _GAP
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, x_range: tuple[float, float], top: int, width: int, height: int) -> list[str]:
    (x_low, x_high), drawn = x_range, [y for _, curve in panel.curves for _, y in curve if not panel.log or y > 0]
    y_low, y_high = panel.bounds or _range([_shape(y, panel.log) for y in drawn])
    if panel.bounds and panel.log:
        y_low, y_high = math.log10(y_low), math.log10(y_high)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (min(max(_shape(y, panel.log), y_low), y_high) - y_low) / (y_high - y_low)
        return _LEFT + (x - x_low) / (x_high - x_low) * width, top + (1.0 - share) * height

    parts = [f'<text x="{_LEFT}" y="{top - 8}" font-weight="bold">{html.escape(panel.title)}</text>']
    for value in _ticks(y_low, y_high, panel.log):
        y = top + (1.0 - (value - y_low) / (y_high - y_low)) * height
        label = f"1e{value:.0f}" if panel.log else f"{value:.4g}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}h{width}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value in _ticks(x_low, x_high, False):
        x = _LEFT + (value - x_low) / (x_high - x_low) * width
        parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{value:.7g}</text>')
    label_x, label_y = _LEFT + width, top + height + 31
    parts.append(f'<text x="{label_x}" y="{label_y}" text-anchor="end">{html.escape(panel.x_label)}</text>')
    legend = _LEFT + width
    for number, (name, curve) in reversed(list(enumerate(panel.curves))):
        index = number % len(_COLOURS)
        colour, own = _COLOURS[index], f'class="c{index}"'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in curve if not panel.log or p[1] > 0))
        parts.append(f'<polyline {own} points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
        if name:
            parts.append(
                f'<text {own} x="{legend}" y="{top - 8}" text-anchor="end" fill="{colour}">{html.escape(name)}</text>'
            )
            legend -= 7 * len(name) + 18
    for number, (mark, text) in enumerate(panel.marks):
        x = _LEFT + (mark - x_low) / (x_high - x_low) * width
        parts.append(f'<path class="mark" d="M{x:.1f} {top}v{height}" stroke="#c0392b" stroke-dasharray="4 3"/>')
        anchor = "end" if x > _LEFT + width / 2 else "start"
        shift = -4 if anchor == "end" else 4
        parts.append(
            f'<text class="mark" x="{x + shift:.1f}" y="{top + 12 + 14 * number}" text-anchor="{anchor}" '
            f'fill="#c0392b">{html.escape(text)}</text>'
        )
    return parts


def _shape(y: float, log: bool) -> float:
    return math.log10(max(y, 1e-300)) if log else y


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        return [float(power) for power in range(math.ceil(low), math.floor(high) + 1)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2.0))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
