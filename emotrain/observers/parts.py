"""The lines of the dashboard's frame besides its curves, each made for a given width."""

from __future__ import annotations

from emotrain.observers.board import Board, PhaseLine
from emotrain.observers.charts import Line, meter
from emotrain.observers.lines import crop, join, pad, spread
from emotrain.observers.look import Look
from emotrain.observers.text import clean, duration, fit, fit_path, number, short_path, speed

DETAIL = 9  # cells for the label of a detail line


def header(board: Board, width: int, look: Look) -> Line:
    """Name at the left; optimizer, device and time at the right."""
    right: Line = [(duration(board.elapsed_s), "value")]
    name = "starting"
    if board.start is not None:
        name = clean(board.start.name)
        device = " on ".join(word for word in (clean(board.start.optimizer), clean(board.start.device)) if word)
        right = [(fit(device, width // 3), "label"), ("  ", ""), *right]
    left: Line = [("emotrain ", "label"), (fit(name, max(8, width // 2)), "title")]
    return spread(left, right, width)


def progress(board: Board, width: int, look: Look) -> Line:
    """The step as a bar; the ceiling is not a target, so the bar may end early."""
    share = board.step / board.max_steps if board.max_steps else 0.0
    tail = f" {100.0 * share:3.0f}%"
    filled, empty = meter(share, width - len(tail), ascii_only=look.ascii)
    return [(filled, "bar"), (empty, "rule"), (tail, "label")]


def status(board: Board, width: int, look: Look) -> Line:
    """Step, epoch, speed and the time that is left."""
    last = board.last
    if last is None:
        return []
    items: list[Line] = [
        [("step ", "label"), (f"{last.step}", "value"), (f"/{board.max_steps}", "label")],
        [("epoch ", "label"), (f"{last.epoch:.2f}", "value")],
        [(speed(board.pace.step_s), "value")],
        *_eta(board, look),
    ]
    phase = board.phase
    if phase is not None:
        items.insert(1, [(fit(_phase_words(phase), 26), "warning")])
    if last.skipped:
        items.insert(1, [(f"{last.skipped} skipped", "warning")])
    return join(items, width)


def _eta(board: Board, look: Look) -> list[Line]:
    """The range of time, and the steps it stands for."""
    early, late = board.pace.last_step
    where = f"to step {early}{look.dash}{late}" if early != late else f"at most to step {late}"
    value = board.pace.eta(look.dash)
    return [[("ETA ", "label"), (value, "value")], [(where, "label")]]


def timing(board: Board, width: int, look: Look) -> Line:
    """Speed and the time that is left, for small terminals."""
    return join([[(speed(board.pace.step_s), "value")], *_eta(board, look)], width)


def _detail(label: str, text: str, width: int, style: str = "") -> Line:
    return [(f"{label:<{DETAIL}}", "label"), (fit(text, width - DETAIL), style)]


def stop(board: Board, width: int, look: Look) -> Line:
    """How far the stop rule is towards its decision."""
    if board.last is None:
        return []
    share = board.last.stop_meter
    room = 30 if width >= 76 else 20 if width >= 56 else max(4, width - DETAIL - 11)
    filled, empty = meter(share, room, ascii_only=look.ascii)
    bar: Line = [("stop".ljust(DETAIL), "label"), (filled, "stop"), (empty, "rule")]
    bar.append((f" {100.0 * share:3.0f}%", "value"))
    if board.last.ready:
        bar.append((" ready", "good"))
    memory, grad = board.last.memory_gib, number(board.last.grad_norm, digits=3)
    items = [bar, [("grad norm ", "label"), (grad, "value")]]
    if memory > 0.0:
        items.insert(1, [("memory ", "label"), (f"{memory:.2f} GiB", "value")])
    return join(items, width)


def validation(board: Board, width: int) -> Line:
    """The last validation and the best one."""
    event = board.validation
    if event is None:
        return []
    items: list[Line] = [
        [("validation".ljust(DETAIL), "label"), (number(event.loss), "validation")],
        [
            ("best ", "label"),
            (number(event.best_loss), "value"),
            (f" at step {event.best_step}", "label"),
        ],
        [("base ", "label"), (number(event.base_loss), "")],
        [("scalar ", "label"), (number(event.scalar, signed=True), "")],
    ]
    if event.drift is not None:
        items.append([("drift ", "label"), (number(event.drift), "")])
    return join(items, width)


def samples(board: Board, width: int) -> Line:
    """The last sheet of samples."""
    if board.samples is None:
        return []
    step = f"step {board.samples.step} "
    path = fit_path(short_path(board.samples.sheet), width - DETAIL - len(step))
    return [("samples".ljust(DETAIL), "label"), (step, ""), (path, "path")]


def saved(board: Board, width: int) -> Line:
    """The last file that was saved."""
    if board.saved is None:
        return []
    step = f"step {board.saved.step} " + ("best " if board.saved.best else "")
    path = fit_path(short_path(board.saved.path), width - DETAIL - len(step))
    return [("saved".ljust(DETAIL), "label"), (step, ""), (path, "")]


def folder(board: Board, width: int) -> Line:
    """The run folder."""
    path = board.run_dir()
    if path is None:
        return []
    return _detail("run", fit_path(short_path(path), width - DETAIL), width)


def last_notice(board: Board, width: int) -> Line:
    """The last warning; without one the last notice."""
    if not board.notices:
        return []
    warnings = [notice for notice in board.notices if notice[1] == "warning"]
    return _notice(*(warnings or list(board.notices))[-1], width)


def notices(board: Board, width: int, most: int) -> list[Line]:
    """The last notices, oldest first."""
    return [_notice(*notice, width) for notice in list(board.notices)[-most:]]


def _notice(step: int, level: str, message: str, width: int) -> Line:
    if level == "warning":
        return crop([("warning".ljust(DETAIL), "warning"), (message, "")], width)
    return crop([("note".ljust(DETAIL), "label"), (message, "")], width)


def facts(board: Board, width: int) -> list[Line]:
    """What is known about the run before its first step."""
    start = board.start
    if start is None:
        return []
    size = f"{start.num_images} pictures, {start.steps_per_epoch:g} steps an epoch"
    network = f"{start.num_modules} modules, {start.num_parameters / 1e6:.2f} M parameters"
    told = {label for label, _ in start.facts}
    own = (("data", size), ("LoRA", network), ("steps", f"at most {start.max_steps}"))
    rows = [row for row in own if row[0] not in told]
    if start.start_step:
        rows.append(("resumed", f"after step {start.start_step}"))
    rows.extend((clean(label), clean(value)) for label, value in start.facts)
    rows.append(("run", fit_path(short_path(start.run_dir), width - 12)))
    lines: list[Line] = []
    for label, value in rows:
        shown = fit(label, 10)
        lines.append(crop([*pad([(shown, "label")], 12), (value, "")], width))
    return lines


def phase_lines(board: Board, width: int, look: Look) -> list[Line]:
    """Phases so far: done ones with their time, the present one with a bar."""
    lines: list[Line] = []
    for phase in board.phases:
        seconds = (phase.ended if phase.ended is not None else board.clock()) - phase.began
        if phase.ended is not None:
            tick = "+" if look.ascii else "✓"
            tail: Line = [(duration(seconds), "label")]
            lines.append(spread([(f"{tick} ", "good"), (phase.name, "")], tail, width))
            continue
        lines.append(_phase_now(phase, seconds, width, look))
    return lines


def _phase_now(phase: PhaseLine, seconds: float, width: int, look: Look) -> Line:
    left: Line = [("> ", "bar"), (_phase_words(phase), "title")]
    right: Line = [(duration(seconds), "value")]
    if phase.total and phase.done:
        left_s = seconds / phase.done * (phase.total - phase.done)
        right = [("ETA ", "label"), (duration(left_s), "value"), ("  ", ""), *right]
    if phase.total:
        room = min(30, width // 3)
        filled, empty = meter(phase.done / phase.total, room, ascii_only=look.ascii)
        right = [(filled, "bar"), (empty, "rule"), ("  ", ""), *right]
    return spread(left, right, width)


def _phase_words(phase: PhaseLine) -> str:
    return f"{phase.name} {phase.done}/{phase.total}" if phase.total else phase.name
