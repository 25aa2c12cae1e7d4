"""What one decoded picture is like: how sharp, how blank, and its look (no torch).

`measure` runs in worker processes: its argument and result are plain values.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emotrain.dataset.duplicates import LOOK_SIDE, look_of
from emotrain.dataset.images import Note, load_picture
from emotrain.dataset.lint_types import Finding
from emotrain.dataset.textfile import FileProblem

TILE = 32  # pixels
_CONTRAST = 48  # grey levels within a tile from where its edges count
_FEW_TILES = 4
BLURRED = 0.11  # edge sharpness below which a picture is called blurred
_SAME = 12  # colour levels that still count as the background
_BLANK = 0.004  # share of a look that is not background
_HIDDEN = 0.02  # share of pixels that can be seen at all
NOTE_SEVERITY = {
    "animated": "warning",
    "cmyk": "warning",
    "trailing-bytes": "warning",
    "exif-damaged": "warning",
    "icc-damaged": "warning",
    "wrong-extension": "warning",
    "mask-missing": "warning",
    "caption-empty": "warning",
    "caption-missing": "warning",
    "caption-lines": "info",
}
HINTS = {
    "animated": "keep the one frame or page that you mean",
    "cmyk": "save it as RGB where the colours matter",
    "trailing-bytes": "save it again in an image editor",
    "wrong-extension": "rename it",
    "caption-missing": "write one, or set `caption` for the folder",
    "caption-lines": "a line `%%%` begins another caption of the same picture, if you mean several",
    "caption-empty": "write what the picture shows, or delete the file",
    "mask-missing": "add a mask of the same stem",
}


@dataclass(frozen=True)
class Job:
    """One picture to measure; `preview` is its thumbnail's longest side in pixels (0: none)."""

    path: Path
    background: str = "white"
    preview: int = 0


@dataclass(frozen=True)
class Measured:
    """What was seen. `problem` is set where it cannot be decoded, and then nothing else is.

    `sharpness` is the steepest step between neighbouring pixels as a share of the contrast around
    it, in the sharpest places: near 1 for a hard edge, 1 / width for an edge several pixels wide;
    None where nothing has contrast. `drawn` is the share of the picture that is not of its
    background colour, `visible` the share that is not transparent (both 0..1).
    """

    problem: tuple[str, str, str | None] | None = None  # code, reason, hint
    notes: tuple[Note, ...] = ()
    sharpness: float | None = None
    drawn: float = 1.0
    visible: float = 1.0
    look: bytes = field(default=b"", repr=False)
    preview: bytes = field(default=b"", repr=False)


def measure(job: Job) -> Measured:
    """Decode a picture once and take all measures from it."""
    try:
        picture = load_picture(job.path, job.background)
    except FileProblem as problem:
        return Measured(problem=(problem.code, problem.reason, problem.hint))
    look = look_of(picture.image)
    return Measured(
        notes=picture.notes,
        sharpness=edge_sharpness(picture.image),
        drawn=drawn_share(look),
        visible=1.0 if picture.alpha is None else _visible(picture.alpha),
        look=look,
        preview=preview_of(picture.image, job.preview) if job.preview else b"",
    )


def edge_sharpness(picture: Image.Image) -> float | None:
    """Steepest step of neighbouring pixels over the contrast of the 32x32 tile around it.

    A blurred background does no harm: the tile at the 90th percentile counts. None where fewer than
    four tiles have any contrast to speak of.
    """
    grey = np.asarray(picture.convert("L"))
    rows, columns = grey.shape[0] // TILE, grey.shape[1] // TILE
    if not rows or not columns:
        return None
    grey = grey[: rows * TILE, : columns * TILE]
    contrast = _tiles(np.maximum, grey).astype(np.int16) - _tiles(np.minimum, grey)
    step = np.zeros_like(grey)
    across = np.maximum(grey[:, 1:], grey[:, :-1]) - np.minimum(grey[:, 1:], grey[:, :-1])
    down = np.maximum(grey[1:], grey[:-1]) - np.minimum(grey[1:], grey[:-1])
    step[:, :-1] = across
    np.maximum(step[:-1], down, out=step[:-1])
    steepest = _tiles(np.maximum, step)
    busy = contrast >= _CONTRAST
    if busy.sum() < min(_FEW_TILES, busy.size):
        return None
    ratio = steepest[busy] / contrast[busy]
    return float(min(1.0, np.percentile(ratio, 90)))


def _tiles(reduce: np.ufunc, grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Reduce over 32x32 tiles: [H, W] -> [H / 32, W / 32]."""
    rows, columns = grey.shape[0] // TILE, grey.shape[1] // TILE
    upright = reduce.reduce(grey.reshape(rows, TILE, columns * TILE), axis=1)
    tiles: NDArray[np.uint8] = reduce.reduce(upright.reshape(rows, columns, TILE), axis=2)
    return tiles


def drawn_share(look: bytes) -> float:
    """Share of a look's pixels that differ from its median colour."""
    pixels = np.frombuffer(look, np.uint8).reshape(LOOK_SIDE * LOOK_SIDE, 3).astype(np.int16)
    away = np.abs(pixels - np.median(pixels, axis=0).astype(np.int16)).max(axis=1)
    return float((away > _SAME).mean())


def _visible(alpha: Image.Image) -> float:
    return float((np.asarray(alpha) > 16).mean())


def preview_of(picture: Image.Image, side: int) -> bytes:
    """A JPEG of at most `side` x `side`, made of pixels alone: nothing else of the file is in it."""
    factor = max(picture.size) // (2 * side)
    small = picture.reduce(factor) if factor > 1 else picture.copy()
    small.thumbnail((side, side), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    pixels_alone = Image.frombytes("RGB", small.size, small.tobytes())
    tiny = max(small.size) <= 128 and small.size == picture.size  # every pixel of it counts
    pixels_alone.save(buffer, "JPEG", quality=90 if tiny else 76, subsampling=0 if tiny else 2)
    return buffer.getvalue()


def picture_findings(name: str, measured: Measured) -> list[Finding]:
    """Findings about one picture by itself; `name` is its id."""
    if measured.problem is not None:
        code, reason, hint = measured.problem
        return [Finding(code, "error", name, reason, hint)]
    found = []
    if measured.visible < _HIDDEN:
        message = "is transparent all over: there is nothing to see"
        found.append(Finding("invisible", "warning", name, message, "take it out"))
    elif measured.drawn < _BLANK:
        message = "is nearly blank: almost all of it has one colour"
        found.append(Finding("blank", "warning", name, message, "take it out"))
    if measured.sharpness is not None and measured.sharpness < BLURRED:
        width = round(1 / max(measured.sharpness, 0.01))
        message = f"is blurred, or was enlarged: its sharpest edges are about {width} pixels wide"
        hint = "use a sharper original: what the pictures lack in detail, the results will lack"
        found.append(Finding("blurred", "warning", name, message, hint))
    return found


def note_findings(name: str, notes: tuple[Note, ...]) -> list[Finding]:
    """The reader's notes as findings; each code once."""
    once = {note.code: note for note in notes}
    return [
        Finding(
            note.code,
            "warning" if NOTE_SEVERITY.get(note.code) == "warning" else "info",
            name,
            note.message,
            HINTS.get(note.code),
        )
        for note in once.values()
    ]
