"""Draw the dashboard as it stood in a recorded run.

    python tests/bench/dashboard_picture.py METRICS.jsonl OUT.svg [--columns 120 --rows 32]

The log is played into the dashboard's own code and its last frame is written as an SVG file.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from emotrain.observers.board import Board
from emotrain.observers.layout import compose
from emotrain.observers.playback import play_back, read_extras
from emotrain.observers.screen import to_text
from emotrain.train.events import StepEnd


def draw(metrics: Path, columns: int, rows: int, last_step: int | None) -> str:
    """The SVG of the frame after `last_step`, for a terminal of that size."""
    now = 0.0
    board = Board(lambda: now)
    for event in play_back(metrics):
        if isinstance(event, StepEnd):
            if last_step is not None and event.step > last_step:
                break
            now += event.step_s
        board.note(event)
    for event in read_extras(metrics):
        if last_step is None or event.step <= last_step:
            board.note(event)
    console = Console(
        record=True, file=io.StringIO(), width=columns, height=rows, force_terminal=True
    )
    console.print(to_text(compose(board, columns, rows)))
    title = f"emotrain run {board.start.name if board.start else ''}"
    return console.export_svg(title=title, theme=DIMMED_MONOKAI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--last-step", type=int)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    svg = draw(args.metrics, args.columns, args.rows, args.last_step)
    args.out.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
