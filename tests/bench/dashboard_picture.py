"""Draw the dashboard as it stood in a recorded run.

    python tests/bench/dashboard_picture.py METRICS.jsonl OUT.svg [--columns 120 --rows 32]

The log is played into the dashboard's own code and its last frame is written as an SVG file.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path

from recorded_run import recorded
from rich.console import Console
from rich.segment import SegmentLines
from rich.terminal_theme import TerminalTheme
from rich.theme import Theme

from emotrain.config.load import load_preset
from emotrain.observers.board import Board
from emotrain.observers.frame import STYLES, compose
from emotrain.train.events import RunStart, StepEnd

THEME = TerminalTheme(
    (20, 22, 28),
    (214, 218, 226),
    [
        (40, 44, 52), (224, 92, 92), (120, 200, 120), (230, 190, 90),
        (90, 140, 230), (200, 120, 220), (80, 190, 200), (214, 218, 226),
    ],
    [
        (110, 116, 128), (255, 120, 120), (150, 225, 140), (250, 215, 120),
        (125, 175, 255), (240, 130, 200), (110, 230, 240), (250, 250, 250),
    ],
)  # fmt: skip


def draw(metrics: Path, columns: int, rows: int, last_step: int | None, known: dict[str, str | int]) -> str:
    """The SVG of the frame after `last_step`, for a terminal of that size."""
    now = 0.0
    board = Board(lambda: now)
    start = RunStart("run", metrics.parent, 0, 0, 0.0, "", 0, 0, 0, "")
    board.note(replace(start, **{"run_dir": Path("runs") / str(known.get("name", "run")), **known}))
    for event in recorded(metrics):
        if isinstance(event, StepEnd):
            if last_step is not None and event.step > last_step:
                break
            now += event.step_s
        board.note(event)
    console = Console(
        record=True,
        file=io.StringIO(),
        width=columns,
        height=rows,
        force_terminal=True,
        theme=Theme(STYLES),
        _environ={},
    )
    console.print(SegmentLines(compose(board, console), new_lines=True))
    title = f"emotrain run {board.start.name if board.start else ''}"
    return console.export_svg(title=title, theme=THEME)


def known_of(folder: Path) -> dict[str, str | int]:
    """What the run folder tells beside its log."""
    known: dict[str, str | int] = {}
    if (folder / "preset.yaml").is_file():
        preset = load_preset(folder / "preset.yaml")
        known.update(optimizer=preset.train.optimizer.name, max_steps=preset.train.max_steps)
    if (folder / "run.json").is_file():
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        known.update({key: facts[key] for key in ("name", "device") if key in facts})
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--columns", type=int, default=120)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--last-step", type=int)
    for name in ("name", "optimizer", "device"):
        parser.add_argument(f"--{name}", help="shown at the top, where run.json does not tell it")
    parser.add_argument("--max-steps", type=int)
    args = parser.parse_args()
    names = ("name", "optimizer", "device", "max_steps")
    known = known_of(args.metrics.parent)
    known |= {name: value for name in names if (value := getattr(args, name)) is not None}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    svg = draw(args.metrics, args.columns, args.rows, args.last_step, known)
    args.out.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
