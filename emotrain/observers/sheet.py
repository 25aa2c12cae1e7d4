"""The contact sheet of a run: a row for each prompt, a column for each sampled step and one for the LoRA file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from emotrain.observers.text import clean

MIN_CELL = 128  # pixels: smaller pictures are enlarged to this
MAX_CELL = 256
MAX_COLUMNS = 24
MAX_PIXELS = 2**26  # of one sample; no preset asks for more
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow makes of a damaged PNG
GAP = 6
LABEL_WIDTH = 190
HEADER = 30
FONT_PX = 16
LORA = "lora.safetensors"
BACKGROUND = (250, 250, 250)
INK = (32, 32, 32)
FAINT = (130, 130, 130)
MISSING = (225, 225, 225)
BEST = (22, 140, 70)

_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "msgothic.ttc",
)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def make_sheet(
    columns: Mapping[int, Sequence[Path]],
    prompts: Sequence[str],
    *,
    strengths: Mapping[str, Sequence[Path]] | None = None,
    lora: Sequence[Path] = (),
    best_step: int | None = None,
    drawn_on: str = "",
    max_columns: int = MAX_COLUMNS,
) -> Image.Image:
    """Draw the sheet.

    Pictures of less than 128 pixels are enlarged by a whole factor without smoothing, larger ones
    than 256 reduced. A picture that is missing or cannot be read leaves a grey cell. Above
    `max_columns` steps, evenly spaced ones are shown; the first, the last and the best are always
    among them.

    Args:
        columns: for each step the paths of its pictures, in the order of `prompts`.
        prompts: the row labels.
        strengths: label -> pictures of the LoRA file at other strengths: columns before its own.
        lora: pictures of the LoRA file itself, if there are any: the last column, whatever `max_columns` says.
        best_step: column to mark.
        drawn_on: name of the model that drew, for the corner.
        max_columns: widest sheet, at least 2.

    Returns:
        An RGB picture.

    Raises:
        ValueError: no pictures or no prompts.
    """
    if not (columns or lora) or not prompts:
        raise ValueError("a sheet needs at least one step, or the LoRA's pictures, and one prompt")
    steps = choose_steps(sorted(columns), max_columns, best_step)
    shown = [(f"step {step}" + (" (best)" if step == best_step else ""), columns[step]) for step in steps]
    shown += [*(strengths or {}).items(), *([(LORA, lora)] if lora else [])]
    cell_w, cell_h = _cell_size([path for _, paths in shown for path in paths])
    width = LABEL_WIDTH + len(shown) * (cell_w + GAP) + GAP
    height = HEADER + len(prompts) * (cell_h + GAP) + GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if drawn_on:
        text = f"on {clean(drawn_on)}"
        font = _font(text)
        draw.text((GAP, HEADER / 2), _shorten(draw, text, LABEL_WIDTH - 2 * GAP, font), FAINT, font, anchor="lm")
    for column, (label, paths) in enumerate(shown):
        left = LABEL_WIDTH + GAP + column * (cell_w + GAP)
        _draw_label(draw, label, left, cell_w, marked=label == LORA or label.endswith("(best)"))
        for row in range(len(prompts)):
            top = HEADER + row * (cell_h + GAP)
            picture = _thumbnail(paths[row], cell_w, cell_h) if row < len(paths) else None
            _paste(sheet, draw, picture, (left, top, cell_w, cell_h))
    for row, prompt in enumerate(prompts):
        _draw_prompt(draw, prompt, HEADER + row * (cell_h + GAP), cell_h)
    return sheet


def save_sheet(
    path: Path,
    columns: Mapping[int, Sequence[Path]],
    prompts: Sequence[str],
    *,
    strengths: Mapping[str, Sequence[Path]] | None = None,
    lora: Sequence[Path] = (),
    best_step: int | None = None,
    drawn_on: str = "",
) -> Path:
    """Draw the sheet and put it at `path` (PNG) in one move: nobody sees half of it."""
    sheet = make_sheet(columns, prompts, strengths=strengths, lora=lora, best_step=best_step, drawn_on=drawn_on)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        sheet.save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def choose_steps(steps: Sequence[int], most: int, best_step: int | None = None) -> list[int]:
    """At most `most` of the sorted steps, evenly spaced, with the first, the last and the best."""
    if len(steps) <= most:
        return list(steps)
    if most < 2:
        raise ValueError(f"a sheet needs at least 2 columns, got {most}")
    places = {round(i * (len(steps) - 1) / (most - 1)) for i in range(most)}
    chosen = sorted(steps[place] for place in places)
    if best_step is not None and best_step in steps and best_step not in chosen:
        gaps = [abs(step - best_step) for step in chosen[1:-1]]
        if gaps:
            chosen[1 + gaps.index(min(gaps))] = best_step
            chosen.sort()
    return chosen


def _cell_size(paths: Sequence[Path]) -> tuple[int, int]:
    """Width and height of all cells, from the first picture that can be read."""
    for path in paths:
        try:
            with Image.open(path, formats=("PNG",)) as picture:
                if picture.width * picture.height <= MAX_PIXELS:
                    return _scaled(*picture.size)
        except UNREADABLE:
            continue
    return MIN_CELL, MIN_CELL


def _scaled(width: int, height: int) -> tuple[int, int]:
    longest = max(width, height)
    if longest < MIN_CELL:
        factor = -(-MIN_CELL // longest)
        return width * factor, height * factor
    if longest > MAX_CELL:
        scale = MAX_CELL / longest
        return max(1, round(width * scale)), max(1, round(height * scale))
    return width, height


def _thumbnail(path: Path, cell_w: int, cell_h: int) -> Image.Image | None:
    """The picture inside the cell, its shape kept; None where it cannot be read or is too large for a sample."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            picture = file.convert("RGB") if file.width * file.height <= MAX_PIXELS else None
    except UNREADABLE:
        return None
    if picture is None:
        return None
    scale = min(cell_w / picture.width, cell_h / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if size == picture.size:
        return picture
    whole = scale >= 1.0 and float(scale).is_integer()
    return picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _paste(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Image.Image | None,
    box: tuple[int, int, int, int],
) -> None:
    left, top, cell_w, cell_h = box
    if picture is None:
        draw.rectangle((left, top, left + cell_w - 1, top + cell_h - 1), fill=MISSING)
        centre = (left + cell_w / 2, top + cell_h / 2)
        draw.text(centre, "missing", fill=FAINT, font=_font("missing"), anchor="mm")
        return
    shift_x, shift_y = (cell_w - picture.width) // 2, (cell_h - picture.height) // 2
    sheet.paste(picture, (left + shift_x, top + shift_y))


def _draw_label(draw: ImageDraw.ImageDraw, label: str, left: int, cell_w: int, *, marked: bool) -> None:
    font = _font(label)
    text = _shorten(draw, label, cell_w, font)
    draw.text((left + cell_w / 2, HEADER / 2), text, fill=BEST if marked else INK, font=font, anchor="mm")


def _draw_prompt(draw: ImageDraw.ImageDraw, prompt: str, top: int, cell_h: int) -> None:
    text = clean(prompt).strip() or "(empty prompt)"
    font = _font(text)
    line_h = FONT_PX + 4
    lines = _wrap(draw, text, LABEL_WIDTH - 2 * GAP, font, max(1, cell_h // line_h))
    y = top + max(0, (cell_h - len(lines) * line_h) // 2)
    for line in lines:
        draw.text((GAP, y), line, fill=INK if clean(prompt).strip() else FAINT, font=font)
        y += line_h


def _wrap(draw: ImageDraw.ImageDraw, text: str, width: int, font: Font, most: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces; the last one may end in `...`."""
    lines: list[str] = []
    rest = text
    while rest and len(lines) < most:
        if draw.textlength(rest, font=font) <= width:
            lines.append(rest)
            return lines
        if len(lines) == most - 1:
            break
        cut = _fitting(draw, rest, width, font)
        space = rest.rfind(" ", 1, cut + 1)
        if space > 0:
            cut = space
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if rest:
        lines.append(_shorten(draw, rest, width, font))
    return lines


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int, font: Font) -> int:
    """How many leading characters fit, at least one."""
    lengths = (draw.textlength(text[:length], font=font) for length in range(1, len(text) + 1))
    return max(1, sum(1 for _ in takewhile(lambda length: length <= width, lengths)))


def _shorten(draw: ImageDraw.ImageDraw, text: str, width: int, font: Font) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    room = width - draw.textlength("...", font=font)
    return text[: _fitting(draw, text, int(room), font)].rstrip() + "..."


def _font(text: str) -> Font:
    """The font that comes with Pillow; for other scripts one of the system's, if any."""
    if all(ord(char) < 0x250 for char in text):
        return ImageFont.load_default(FONT_PX)
    for name in _WIDE_FONTS:
        try:
            return ImageFont.truetype(name, FONT_PX)
        except OSError:
            continue
    return ImageFont.load_default(FONT_PX)
