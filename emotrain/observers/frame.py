"""The dashboard's picture of a board, and the summary that stays when a run is over.

What a user asks comes first: is it getting better, when does it end, how fast, how much memory, what is wrong. The
emotion's values have at most a third of the room. No sentence is cut: long ones go on in the next line.
"""

from __future__ import annotations

import math
import re

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.layout import Layout
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from emotrain.observers.board import MAX_NOTICES, Board
from emotrain.observers.curve import Plot, Points, Scale, Source, scale_for
from emotrain.observers.text import clean, duration, likeness_words, number, short_path, speed
from emotrain.train.events import RunEnd, ValidationEnd

STYLES = {  # of the 256 colours, those of middling brightness: readable on a dark terminal and on a light one
    "title": "bold",
    "label": "dim",
    "loss": "color(31)",  # cyan
    "validation": "bold color(133)",  # magenta
    "scalar": "color(28)",  # green
    "trust": "color(63)",  # blue
    "pulse": "color(130)",  # brown
    "good": "bold color(28)",
    "warning": "not dim bold color(166)",  # orange
    "bad": "bold color(196)",  # red
    "bar.back": "dim",
    "bar.complete": "color(28)",
    "bar.finished": "color(28)",
    "bar.pulse": "color(28)",
    "progress.elapsed": "default",
    "progress.remaining": "dim",
}
MAX_WIDTH, MAX_HEIGHT = 240, 64
WIDE = 110  # columns from which on the emotion's curves stand beside the loss
MIN_WIDTH, MIN_HEIGHT = 50, 21  # below: no chart, and what matters most comes first
MIN_CHART = 4  # rows
SHORT_PHASE_S = 1.0
LABEL = 11
EMOTION = (("loss", "loss"), ("scalar", "scalar"), ("trust", "trust"), ("emoPulse", "pulse"))
HEADLINES = {
    "signal": ("stopped automatically", "good"),
    "max_steps": ("reached its ceiling of steps", "good"),
    "interrupted": ("interrupted: saved, and it can go on", "warning"),
    "diverged": ("diverged", "bad"),
}


def compose(board: Board, console: Console) -> list[list[Segment]]:
    """The lines of the board's picture, at least one row less than the terminal has, so that nothing scrolls."""
    width, height = min(console.width, MAX_WIDTH), max(1, min(console.height - 1, MAX_HEIGHT))
    options = console.options.update(width=width, height=None)
    frame: RenderableType
    if board.last is None:
        frame = _waiting(board)
    elif width < MIN_WIDTH or height < MIN_HEIGHT:
        frame = _small(board)
    else:
        frame, options = _full(board, console, options, height), options.update(height=height)
    return console.render_lines(frame, options, pad=False)[:height]


def _waiting(board: Board) -> Group:
    """Before the first step: what is being done, and what is known about the run."""
    parts: list[RenderableType] = [_header(board), board.phases.make_tasks_table(board.phases.tasks)]
    if board.notices:
        parts.append(_notices(board, 3, also_notes=True))
    return Group(*parts, "", _facts(board))


def _small(board: Board) -> Group:
    """One thing a line, the most important first."""
    table = _grid()
    _add_questions(table, board)
    return Group(_progress(board), *_phase(board), table, _notices(board, 1), _emotion_table(board))


def _full(board: Board, console: Console, options: ConsoleOptions, height: int) -> Layout:
    questions = _grid()
    _add_questions(questions, board)
    if height >= 30:
        _add_files(questions, board)
    wide = options.max_width >= WIDE
    question_rows = len(console.render_lines(questions, options))
    room = height - 3 - question_rows
    emotion_rows = 0 if wide else len(EMOTION) * (2 if height >= 42 else 1)
    for most in (5, 3, 2, 1):  # as many as there is room for whole; the chart keeps a few rows
        notices = _notices(board, most, also_notes=height >= 30)
        notice_rows = len(console.render_lines(notices, options))
        if notice_rows <= room - emotion_rows - MIN_CHART:
            break
    body, chart, emotion = Layout(name="body"), Layout(_loss_plot(board)), Layout()
    if wide:
        chart.ratio, emotion.ratio = 2, 1
        emotion.split_column(*(Layout(_emotion_plot(board, *one, axis=one == EMOTION[-1])) for one in EMOTION))
        body.split_row(chart, Layout(" ", size=2), emotion)
    else:
        emotion.size = emotion_rows
        emotion.update(_emotion_table(board, emotion_rows // len(EMOTION)))
        body.split_column(chart, emotion)
    frame = Layout()
    frame.split_column(
        Layout(_header(board), size=1),
        Layout(_progress(board), size=1),
        Layout(Group(*_phase(board)), size=1),
        Layout(questions, size=question_rows),
        Layout(notices, size=max(1, min(notice_rows, room - emotion_rows))),
        body,
    )
    return frame


def _grid() -> Table:
    """Labels, and values that go on in the next line where they are long."""
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(style="label", width=LABEL - 1, no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    return table


def _header(board: Board) -> Table:
    """Name at the left; optimizer, device and time at the right."""
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True, overflow="ellipsis", justify="right")
    start = board.start
    name = clean(start.name) if start is not None else "starting"
    device = f"{clean(start.optimizer)} on {clean(start.device)}"[:40] if start is not None else ""
    right = Text.assemble((device, "label"), "  ", (duration(board.elapsed_s), "title"))
    table.add_row(Text.assemble(("emotrain ", "label"), (name, "title")), right)
    return table


def _progress(board: Board) -> Table:
    """The step, and how far it is to the step that the run is expected to end at, or to the ceiling."""
    early, late = board.pace.last_step
    where = f"of at most {board.max_steps}" if early == late == board.max_steps else f"of {early} to {late}"
    if early == late != board.max_steps:
        where = f"of {late}"
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right")
    epoch = f"epoch {board.last.epoch:.1f}" if board.last is not None else ""
    table.add_row(
        Text.assemble(("step ", "label"), (str(board.step), "title"), (f" {where}", "label")),
        ProgressBar(total=max(late, 1), completed=min(board.step, late)),
        Text(epoch, style="label"),
    )
    return table


def _phase(board: Board) -> list[RenderableType]:
    """What takes longer than a second just now."""
    if board.stopping:
        return [Text("stopping after this step; press Ctrl-C again to quit at once", style="warning")]
    task = board.phases.current
    if task is None or board.phases.current_s < SHORT_PHASE_S:
        return []
    return [board.phases.make_tasks_table([task])]


def _add_questions(table: Table, board: Board) -> None:
    """Is it getting better, when does it end, how fast, how much memory."""
    last, validation = board.last, board.validation
    if last is None:
        return
    table.add_row("validation", _validation_words(validation) if validation else Text("none yet"))
    if validation is not None and validation.forecast:
        end = validation.forecast
    else:
        end = f"the stop signal is at {last.stop_meter:.0%}; ends at step {board.max_steps} at the latest"
    table.add_row("stop", Text(end))
    left = " to ".join(dict.fromkeys(duration(seconds) for seconds in board.pace.remaining_s() or (math.nan,)))
    table.add_row("time", Text(f"{left} left, {speed(board.pace.step_s)}"))
    total = board.start.device_memory_gib if board.start is not None else 0.0
    memory = f"{last.memory_gib:.2f} GiB peak" if last.memory_gib > 0.0 else "not known"
    memory += f" of {total:.1f}" if total else ""
    skipped = f", {last.skipped} steps skipped: not finite" if last.skipped else ""
    gradient = f"  gradient norm {number(last.grad_norm, digits=3)}"
    table.add_row("memory", Text.assemble(memory, (gradient, "label"), (skipped, "warning")))
    if board.likeness is not None:
        words = likeness_words(board.likeness)
        table.add_row("likeness", Text.assemble((f"step {board.likeness.step}  ", "label"), words))
    if board.samples is not None:
        path = short_path(board.samples.sheet)
        table.add_row("samples", Text.assemble((f"step {board.samples.step}  ", "label"), clean(path)))


def _validation_words(event: ValidationEnd) -> Text:
    """The last validation beside the best one and the base model."""
    base = f"base model {number(event.base_loss)}"
    if event.step == 0:
        return Text(base)
    change = (event.best_loss - event.base_loss) / event.base_loss if event.base_loss else 0.0
    best = (f"{change:+.0%}", "good" if change < 0.0 else "bad")
    text = Text.assemble((number(event.loss), "validation"), f" at step {event.step}, ")
    which = (
        "the best so far" if event.best_step == event.step else f"best {number(event.best_loss)} at {event.best_step}"
    )
    text.append_tokens([(f"{which} (", None), best, (f"), {base}", None)])
    return text.append(f"; {event.comparison}", "label") if event.comparison else text


def _add_files(table: Table, board: Board) -> None:
    """What was saved, and where."""
    if board.saved is not None:
        best = " (best)" if board.saved.best else ""
        path = clean(short_path(board.saved.path))
        table.add_row("saved", Text.assemble((f"step {board.saved.step}{best}  ", "label"), path))
    if board.start is not None:
        table.add_row("run", Text(clean(short_path(board.start.run_dir))))


def _notices(board: Board, most: int, *, also_notes: bool = False) -> Table:
    """What is wrong: the last warnings, with notes among them or, without warnings, notes alone."""
    table = _grid()
    warnings = [notice for notice in board.notices if notice[0] == "warning"]
    shown = (list(board.notices) if also_notes else warnings or list(board.notices))[-most:]
    for level, message in shown:
        label = Text("warning", style="warning") if level == "warning" else Text("note", style="label")
        table.add_row(label, Text(message))
    if board.num_warnings > sum(level == "warning" for level, _ in shown):
        table.add_row("", Text(f"{board.num_warnings} warnings so far", style="label"))
    if not board.num_warnings and board.last is not None:
        table.add_row("warnings", Text("none"))
    return table


def _loss_plot(board: Board) -> Plot:
    """The validation over the smoothed training loss."""
    smoothed, (first, last) = board.traces["smoothed"], board.steps
    points = Points([(step, loss) for step, loss in board.validations if step >= first - 1], first, last)
    found = [bounds for bounds in (smoothed.bounds(0.02),) if bounds is not None]
    if points.points:
        losses = [loss for _, loss in points.points]
        found.append((min(losses), max(losses)))
    bounds = (min(low for low, _ in found), max(high for _, high in found)) if found else None
    title = Text.assemble(("training loss ", "label"), (number(board.smooth.value), "loss"), (" smoothed", "label"))
    if points.points:
        value = number(points.points[-1][1])
        title.append_tokens([("   validation ", "label"), (f"◆ {value}", "validation")])
    layers: list[tuple[Source, str]] = [(smoothed, "loss")]
    if points.points:
        layers.append((points, "validation"))
    return Plot(layers, scale_for(bounds), marks=(points, "validation"), title=title, steps=(first, last))


def _emotion_plot(board: Board, label: str, name: str, *, axis: bool = False) -> Plot:
    """One of the emotion's values with its figure above and its scale."""
    trace = board.traces[name]
    value = f"{trace.last:.2e}" if name == "pulse" else number(trace.last, signed=name in ("scalar", "trust"))
    title = Text.assemble((f"{label} ", "label"), (value, name))
    if name == "loss" and board.last is not None and board.last.observed_loss != board.last.loss:
        title.append_tokens([("  observed ", "label"), (number(board.last.observed_loss), name)])
    if name == "trust":
        scale = Scale(-1.0, 1.0)
    elif name == "loss":
        scale = scale_for(trace.bounds(0.02))
    else:
        scale = scale_for(trace.bounds(), log=name == "pulse", symmetric=name == "scalar")
    return Plot([(trace, name)], scale, title=title, steps=board.steps if axis else None)


def _emotion_table(board: Board, rows: int = 1) -> Table:
    """The emotion's values, a row or two each."""
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(no_wrap=True, width=2 * LABEL - 2)
    table.add_column(ratio=1)
    for label, name in EMOTION:
        plot = _emotion_plot(board, label, name)
        value = plot.title.plain.split(" ")[1]
        head = Text.assemble((f"{label:<{LABEL - 1}}", "label"), " ", (f"{value:>9}", name))
        table.add_row(head, Plot(plot.layers, plot.scale, rows=rows))
    return table


def _facts(board: Board) -> Table:
    """What is known about the run before its first step."""
    table, start = _grid(), board.start
    if start is None:
        return table
    told = {label for label, _ in start.facts}
    own = (
        ("data", f"{start.num_images} pictures, {start.steps_per_epoch:g} steps an epoch"),
        ("LoRA", f"{start.num_modules} modules, {start.num_parameters / 1e6:.2f} M parameters"),
        ("steps", f"at most {start.max_steps}"),
    )
    rows = [row for row in own if row[0] not in told]
    if start.start_step:
        rows.append(("resumed", f"after step {start.start_step}"))
    for label, value in (*rows, *start.facts, ("run", short_path(start.run_dir))):
        table.add_row(Text(clean(label)), Text(clean(value)))
    return table


def print_summary(console: Console, board: Board, end: RunEnd) -> None:
    """What stays on the screen after a run: why it ended, where everything is, what to do next.

    Sentences go on in the next line at a word; paths and commands are left to the terminal, so that they can be copied
    whole.
    """
    words, style = HEADLINES.get(end.stop_reason, (clean(end.stop_reason), "title"))
    name = clean(board.start.name) if board.start is not None else "run"
    console.print(Text(f"{name}: {words}", style=style))
    console.print(Text(clean(end.sentence)))
    for label, path in (("LoRA", end.lora), ("report", end.report)):
        if path is not None:
            _print_whole(console, label, str(path), "good")
    if board.samples is not None:
        _print_whole(console, "samples", short_path(board.samples.sheet))
    if board.start is not None:
        _print_whole(console, "run", short_path(board.start.run_dir))
    _print_rows(console, _summary_table(board, end))
    if end.lora is not None:
        _print_whole(console, "diffusers", f"pipeline.load_lora_weights({str(end.lora)!r})")
    if end.resume_command:
        _print_whole(console, "resume", end.resume_command, "title")
    if end.all_command:
        console.print(Text("to train on all pictures, the held-out ones too, for as long:", style="label"))
        _print_whole(console, "", end.all_command)


def _summary_table(board: Board, end: RunEnd) -> Table:
    """The sentences of the summary."""
    table = _grid()
    if end.best_step is not None:
        base = board.validation.base_loss if board.validation is not None else None
        before = "" if base is None else f", {number(base)} without the LoRA"
        table.add_row("best", Text(f"step {end.best_step}, validation loss {number(end.best_loss)}{before}"))
    pace = f", {speed(board.pace.step_s)}" if board.pace.step_s is not None else ""
    table.add_row("took", Text(f"{end.session_steps or end.step} steps in {duration(end.seconds)}{pace}"))
    warnings = [message for level, message in board.notices if level == "warning"]
    for message in warnings:
        table.add_row(Text("warning", style="warning"), Text(message))
    if board.num_warnings > len(warnings):
        table.add_row("", Text(f"{board.num_warnings} warnings in all", style="label"))
    if end.lora is not None:
        text = f"copy {clean(end.lora.name)} into models/loras (A1111: models/Lora), strength 1.0"
        if board.start is not None and (trigger := dict(board.start.facts).get("trigger")):
            text += f"; prompts with the trigger {clean(trigger)}"
        table.add_row("ComfyUI", Text(text))
    return table


def _print_rows(console: Console, table: Table) -> None:
    """A table without the blanks at its right: a terminal that is narrowed later would fold them into empty lines."""
    with console.capture() as rows:
        console.print(table)
    console.file.write(re.sub(r" +((\x1b\[0m)?)$", r"\1", rows.get(), flags=re.MULTILINE))


def _print_whole(console: Console, label: str, value: str, style: str = "") -> None:
    text = Text.assemble((f"{label:<{LABEL}}" if label else "", "label"), (clean(value), style))
    console.print(text, soft_wrap=True)


def print_notices(console: Console, board: Board) -> None:
    """The notices alone: of a run that never came to a step."""
    if board.notices:
        _print_rows(console, _notices(board, MAX_NOTICES, also_notes=True))
