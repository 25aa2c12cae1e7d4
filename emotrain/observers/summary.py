"""What stays on the screen after a run: why it ended, where everything is, what to do next."""

from __future__ import annotations

from emotrain.observers.board import Board
from emotrain.observers.charts import Line, Scale, scale_for, sparkline
from emotrain.observers.lines import ascii_lines, crop, wrap
from emotrain.observers.text import clean, duration, number, short_path, speed
from emotrain.train.events import RunEnd

LABEL = 10

_HEADLINES = {
    "signal": ("stopped automatically", "good"),
    "max_steps": ("reached its ceiling of steps", "good"),
    "interrupted": ("interrupted: saved, and it can go on", "warning"),
    "diverged": ("diverged", "bad"),
}


def summarise(board: Board, columns: int, *, ascii: bool = False) -> list[Line]:
    """The lines for a terminal of `columns`; long paths are broken, never cut.

    Nothing without a `RunEnd` on the board.
    """
    end = board.end
    if end is None:
        return []
    width = max(20, min(columns - 1, 110))
    words, style = _HEADLINES.get(end.stop_reason, (clean(end.stop_reason), "title"))
    name = clean(board.start.name) if board.start is not None else "run"
    lines: list[Line] = [crop([("emotrain ", "label"), (f"{name} ", "title"), (words, style)], width)]
    lines += [[(text, "")] for text in wrap(clean(end.sentence), width)]
    for label, value, look in _rows(board, end):
        lines += _entry(label, value, look, width)
    lines += _curve(board, width, ascii)
    for row, text in enumerate(_advice(board, end)):
        lines += _entry("use it" if row == 0 else "", text, "", width)
    lines = [crop(line, width) for line in lines]
    return ascii_lines(lines) if ascii else lines


def _rows(board: Board, end: RunEnd) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    if end.lora is not None:
        rows.append(("LoRA", short_path(end.lora), "good"))
    if end.best_step is not None:
        base = board.validation.base_loss if board.validation is not None else None
        before = "" if base is None else f" (without the LoRA {number(base)})"
        rows.append(("best", f"step {end.best_step}, loss {number(end.best_loss)}{before}", ""))
    took = f"{end.session_steps or end.step} steps in {duration(end.seconds)}"
    if board.pace.step_s is not None:
        took += f", {speed(board.pace.step_s)}"
    rows.append(("took", took, ""))
    if board.samples is not None:
        rows.append(("samples", short_path(board.samples.sheet), ""))
    run_dir = board.run_dir()
    if run_dir is not None:
        rows.append(("run", short_path(run_dir), ""))
    if board.num_warnings:
        last = [message for _, level, message in board.notices if level == "warning"]
        text = f"{board.num_warnings}" + (f", the last: {last[-1]}" if last else "")
        rows.append(("warnings", text, ""))
    if end.resume_command:
        rows.append(("go on", end.resume_command, "value"))
    if end.all_command:
        rows.append(("with all", end.all_command, ""))
    return rows


def _entry(label: str, value: str, style: str, width: int) -> list[Line]:
    texts = wrap(clean(value), width - LABEL) or [""]
    return [[(f"{label if row == 0 else '':<{LABEL}}", "label"), (text, style)] for row, text in enumerate(texts)]


def _curve(board: Board, width: int, ascii: bool) -> list[Line]:
    bounds = board.smoothed.bounds()
    if bounds is None or board.smoothed.num_values < 2:
        return []
    scale: Scale = scale_for(bounds)
    room = max(1, min(48, width - LABEL - 24))
    curve = sparkline(board.smoothed, room, scale, ascii_only=ascii)
    first = float(board.smoothed.columns(2)[0][0])
    tail = f" {number(first)} to {number(board.smoothed.last)}"
    return [[("loss".ljust(LABEL), "label"), (curve, "loss"), (tail, "label")]]


def _advice(board: Board, end: RunEnd) -> list[str]:
    if end.lora is None:
        return []
    words = dict(board.start.facts) if board.start is not None else {}
    trigger = clean(words.get("trigger", ""))
    name = clean(end.lora.name)
    lines = [
        f"ComfyUI, A1111: copy {name} into the folder for LoRAs, strength 1.0",
        f"diffusers: pipeline.load_lora_weights({str(end.lora)!r})",
    ]
    if trigger:
        lines.append(f"prompts: with the trigger {trigger}")
    return lines
