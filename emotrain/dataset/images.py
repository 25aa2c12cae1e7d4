"""Pictures as a person sees them: any mode, rotation and colour space to 8-bit sRGB (no torch).

Only the formats in `FORMATS` are tried, sizes are checked before anything is decoded, and nothing
is ever written.
"""

from __future__ import annotations

import io
import math
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageColor, UnidentifiedImageError, features

from emotrain.dataset.avif import num_frames
from emotrain.dataset.colour import Note as Note
from emotrain.dataset.colour import split_alpha
from emotrain.dataset.textfile import FileProblem, read_bytes
from emotrain.errors import ConfigError, first_line
from emotrain.files import disguise

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    *(("AVIF",) if features.check("avif") else ()),
)
SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".avif": "AVIF",
}
MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_ASPECT = 32.0  # longest side over shortest
MIN_SIDE = 8  # pixels
USUAL_SCANS = 20  # of a progressive JPEG; more are allowed while all of them together stay quick
MAX_SCANNED = 500_000_000  # pixels: each scan passes over the whole picture
SECONDS, SECONDS_PER_MEGAPIXEL = 3.0, 0.15  # of a processor, for the header, and to decode; good files take a tenth
MODES = frozenset(
    (
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "I",
        "I;16",
        "I;16L",
        "I;16B",
        "I;16N",
    )
)
TIFF_STRIP_BYTES, TIFF_TILE_BYTES, TIFF_TILE_SIDES = 279, 325, (322, 323)  # tags
MAX_AVIF_FRAMES = 16  # a picture is one, with its transparency two, a large one a grid of them
ORIENTATION = 0x0112  # EXIF tag
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_EMPTY = 20  # bytes of an EXIF block that says nothing
_TEXT_EXIF = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1"}
_WARNINGS = threading.Lock()  # `warnings.catch_warnings` is not made for threads
PNG_END = b"IEND\xaeB`\x82"
FIX = "open it in an image editor and save it again, or take it out of the folder"


@dataclass(frozen=True)
class Header:
    """What a picture says before it is decoded; sides in pixels as displayed (EXIF applied)."""

    format: str
    width: int
    height: int
    mode: str
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Picture:
    """A decoded picture: `image` RGB on the background, `alpha` L where anything is transparent."""

    image: Image.Image
    alpha: Image.Image | None
    header: Header
    notes: tuple[Note, ...]


class _Bounded(io.BytesIO):
    """A picture's bytes, which can be read for so long: decoders come back for more all the time.

    The thread's own processor time counts, so that a busy machine does not condemn a good picture.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.allow(0)

    def allow(self, pixels: int) -> None:
        """Begin anew, with the time that so many pixels take."""
        self._end = time.thread_time() + SECONDS + SECONDS_PER_MEGAPIXEL * pixels / 1e6

    def read(self, size: int | None = -1, /) -> bytes:
        """As `BytesIO.read`, while there is time."""
        if time.thread_time() > self._end:
            raise _TooSlow
        return super().read(size)


class _TooSlow(Exception):
    """A picture that takes far longer than its size."""


def parse_background(background: str) -> tuple[int, int, int]:
    """A colour name or #rrggbb as red, green and blue, 0..255.

    Raises:
        ConfigError: not a colour.
    """
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        hint = "a colour name such as white, or #rrggbb"
        raise ConfigError(f"dataset.background is `{background}`, which is not a colour", hint) from error
    return red, green, blue


def open_picture(path: Path, background: str = "white") -> Image.Image:
    """The picture in `path` as RGB, the way a viewer shows it.

    Raises:
        FileProblem: the file cannot be read or decoded (a DatasetError).
        ConfigError: `background` is not a colour.
    """
    return load_picture(path, background).image


def load_picture(path: Path, background: str = "white") -> Picture:
    """As `open_picture`, with the alpha channel and notes."""
    return decode_picture(read_bytes(path, limit=MAX_FILE_BYTES), background=background, path=path)


def load_mask(path: Path) -> Image.Image:
    """A mask picture as grey, white where the picture counts.

    One that has transparency and is black all over is drawn in its transparency: opaque counts.

    Raises:
        FileProblem: the file cannot be read or decoded.
    """
    picture = load_picture(path, "black")
    grey = picture.image.convert("L")
    return picture.alpha if picture.alpha is not None and grey.getextrema()[1] == 0 else grey


def mask_of(path: Path, mask: Path | Literal["alpha"]) -> Image.Image | None:
    """The mask of the picture `path`: a file, or its own transparency (None where it has none).

    Raises:
        FileProblem: a file cannot be read or decoded.
    """
    return load_picture(path).alpha if mask == "alpha" else load_mask(mask)


def read_header(data: bytes, *, path: str | Path) -> Header:
    """Format, displayed size and notes of a picture's bytes; nothing is decoded.

    Raises:
        FileProblem: empty, not a picture, too large, too small or too long for one, or a kind that
            is refused.
    """
    with _opened(data, path) as image:
        return _guarded_header(image, data, path)


def decode_picture(data: bytes, *, background: str = "white", path: str | Path) -> Picture:
    """Decode a picture's bytes; `path` is only for messages.

    Raises:
        FileProblem: as `read_header`, or truncated or damaged.
        ConfigError: `background` is not a colour.
    """
    colour = parse_background(background)
    with _opened(data, path) as image:
        header = _guarded_header(image, data, path)
        try:
            source = getattr(image, "fp", None)
            if isinstance(source, _Bounded):  # not where Pillow has read it whole
                source.allow(header.width * header.height)
            image.load()
            upright = _upright(image, header.format, data)
            notes: list[Note] = []
            rgb, alpha = split_alpha(upright, image.info, notes)
        except FileProblem:
            raise
        except _TooSlow as error:
            raise _too_slow(path) from error
        except Exception as error:  # OSError, ValueError, SyntaxError, struct.error ...
            raise FileProblem("damaged", path, f"is truncated or damaged ({first_line(error)})", FIX) from error
    if alpha is not None:
        notes.append(Note("transparent", f"is partly transparent: put on a {background} background"))
        canvas = Image.new("RGB", rgb.size, colour)
        canvas.paste(rgb, mask=alpha)
        rgb = canvas
    return Picture(rgb, alpha, header, header.notes + tuple(notes))


def _opened(data: bytes, path: str | Path) -> Image.Image:
    """The picture, recognised by its bytes alone; no pixel has been decoded."""
    if not data:
        raise FileProblem("empty", path, "is empty (0 bytes)", "take it out, or copy it again")
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(_Bounded(data), formats=FORMATS)
    except _TooSlow as error:
        raise _too_slow(path) from error
    except UnidentifiedImageError as error:
        raise FileProblem("not-a-picture", path, _what_it_is(data), "emotrain reads " + ", ".join(FORMATS)) from error
    except Image.DecompressionBombError as error:
        reason = f"claims more than {MAX_PIXELS // 1_000_000} megapixels"
        raise FileProblem("too-many-pixels", path, reason, "make it smaller") from error
    except Exception as error:
        raise FileProblem("damaged", path, f"is damaged ({first_line(error)})", FIX) from error


def _too_slow(path: str | Path) -> FileProblem:
    return FileProblem("too-slow", path, "takes far longer to read than a picture of its size", FIX)


def _what_it_is(data: bytes) -> str:
    head = data[:64].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "is a web page or drawing, not a picture"
    if found := disguise(data[:64]):
        return f"is {found[0]}, not a picture"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "is a HEIC picture, which is not read: convert it to JPEG or PNG"
    return "is not a picture in a format that is read, or its first bytes are damaged"


def _guarded_header(image: Image.Image, data: bytes, path: str | Path) -> Header:
    try:
        return _header(image, data, path)
    except FileProblem:
        raise
    except _TooSlow as error:
        raise _too_slow(path) from error
    except Exception as error:  # a second frame or a chunk that lies
        raise FileProblem("damaged", path, f"is damaged ({first_line(error)})", FIX) from error


def _header(image: Image.Image, data: bytes, path: str | Path) -> Header:
    width, height = image.size
    if width * height > MAX_PIXELS:
        reason = f"claims {width:,} x {height:,} pixels: more than {MAX_PIXELS // 1_000_000} megapixels"
        raise FileProblem("too-many-pixels", path, reason, "make it smaller")
    if min(width, height) < MIN_SIDE:
        raise FileProblem("too-small", path, f"is {width} x {height} pixels: too small to learn from")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise FileProblem("odd-shape", path, f"is {width} x {height} pixels: too long and thin", "crop it")
    if image.mode in ("F", "I") and not (image.mode == "I" and image.format == "PNG"):
        reason = "holds 32-bit numbers, whose black and white are not known"
        raise FileProblem("unsupported-depth", path, reason, "save it as an 8- or 16-bit picture")
    if image.mode not in MODES:
        raise FileProblem("unsupported-mode", path, f"is in {image.mode}, which is not read", "save it as RGB")
    _refuse_costly(image, data, path)
    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO", "TIFF") else 0
    if scans > USUAL_SCANS and scans * max(width * height, 64 * 64) > MAX_SCANNED:
        raise FileProblem("too-slow", path, f"is stored in {scans:,} passes, which take minutes to decode", FIX)
    if image.format == "PNG" and PNG_END not in data:
        raise FileProblem("damaged", path, "is cut off before its end", FIX)
    # MPO is a JPEG with further views behind it
    name = "JPEG" if image.format == "MPO" else str(image.format)
    turn, notes = _orientation(image, data)
    notes += _kind_notes(image, data, name, path)
    if turn >= 5 and name != "TIFF":  # Pillow turns TIFF by itself, its size included
        width, height = height, width
    return Header(name, width, height, image.mode, tuple(notes))


def _refuse_costly(image: Any, data: bytes, path: str | Path) -> None:
    """Refuse what a decoder that works in one call, which no clock stops, would work on for long.

    TIFF: strips that are stored on top of each other, or tiles that are larger together than the picture. AVIF: frames
    that are decoded and never shown.

    Raises:
        FileProblem: more work than a picture of its size and file needs.
    """
    if image.format == "TIFF":
        tags = image.tag_v2
        stored = tags.get(TIFF_STRIP_BYTES, ()) or tags.get(TIFF_TILE_BYTES, ())
        tiles = len(tags.get(TIFF_TILE_BYTES, ())) * math.prod(int(tags.get(tag, 0)) for tag in TIFF_TILE_SIDES)
        if sum(map(int, stored)) > 2 * len(data) or tiles > 16 * image.width * image.height + 2**24:
            raise _too_slow(path)
    if image.format == "AVIF" and num_frames(data) > MAX_AVIF_FRAMES:
        raise _too_slow(path)


def _kind_notes(image: Image.Image, data: bytes, name: str, path: str | Path) -> list[Note]:
    notes = []
    expected = SUFFIXES.get(Path(path).suffix.lower())
    if expected not in (None, name):
        notes.append(Note("wrong-extension", f"is a {name} file by its content"))
    if image.format != "MPO" and getattr(image, "is_animated", False):
        what = "has several pages" if name == "TIFF" else "is animated"
        notes.append(Note("animated", f"{what}: only the first is used"))
    if image.mode == "CMYK":
        notes.append(Note("cmyk", "is in CMYK (for print): converted to RGB, colours may shift"))
    if image.mode.startswith("I"):
        notes.append(Note("sixteen-bit", "has 16 bits per pixel: scaled to 8"))
    end = {"JPEG": b"\xff\xd9", "PNG": PNG_END}.get(str(image.format))
    if end and (at := data.rfind(end)) >= 0 and data[at + len(end) :].strip(b"\0\r\n "):
        notes.append(
            Note(
                "trailing-bytes",
                f"has {len(data) - at - len(end):,} bytes behind the end of the picture",
            )
        )
    return notes


def _orientation(image: Image.Image, data: bytes) -> tuple[int, list[Note]]:
    """EXIF orientation 1..8, 1 where there is none or it cannot be read."""
    if image.format == "PNG" and b"eXIf" not in data and not _TEXT_EXIF & image.info.keys():
        return 1, []  # Pillow would decode the whole picture to look for it
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = image.getexif()
            value = exif.get(ORIENTATION, 1)
    except Exception:  # a hostile EXIF block fails anywhere in the parser; the pixels may be good
        return 1, [Note("exif-damaged", "has EXIF data that cannot be read: not rotated")]
    if not exif and len(image.info.get("exif", b"")) > EXIF_EMPTY:
        return 1, [Note("exif-damaged", "has EXIF data that cannot be read: not rotated")]
    turn = value if isinstance(value, int) and 1 <= value <= 8 else 1
    return turn, [Note("exif-rotated", "is rotated as its EXIF data says")] * (turn > 1)


def _upright(image: Image.Image, name: str, data: bytes) -> Image.Image:
    turn = 1 if name == "TIFF" else _orientation(image, data)[0]
    return image.transpose(TRANSPOSE[turn]) if turn in TRANSPOSE else image
