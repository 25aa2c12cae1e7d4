"""Pictures come out as a person sees them, or are refused with a reason."""

from __future__ import annotations

import random
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emotrain.dataset.images import decode_picture, open_picture, parse_background, read_header
from emotrain.dataset.textfile import FileProblem
from emotrain.errors import ConfigError, DatasetError

LOSSLESS = ("PNG", "BMP", "TIFF")
LOSSY = ("JPEG", "WEBP", "AVIF", "GIF")


def codes(picture: Any) -> list[str]:
    return [note.code for note in picture.notes]


def refusal(data: bytes, path: str = "x.png") -> FileProblem:
    with pytest.raises(FileProblem) as caught:
        decode_picture(data, path=path)
    return caught.value


@pytest.mark.parametrize("kind", LOSSLESS + LOSSY)
def test_every_whitelisted_format_is_read(make: Any, kind: str) -> None:
    picture = decode_picture(make.encode(make.noise(), kind), path=f"x.{kind.lower()}")
    assert picture.image.mode == "RGB"
    assert picture.image.size == (96, 64)
    assert picture.header.format == kind
    assert codes(picture) == []
    if kind in LOSSLESS:
        assert picture.image.tobytes() == make.noise().tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_a_file_cut_in_half_is_refused(make: Any, kind: str) -> None:
    data = make.encode(make.noise(), kind)
    problem = refusal(data[: len(data) // 2], f"x.{kind.lower()}")
    assert problem.code in ("damaged", "not-a-picture")
    assert isinstance(problem, DatasetError)
    assert problem.exit_code == 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_file_without_its_last_two_bytes_is_refused(make: Any, kind: str) -> None:
    assert refusal(make.encode(make.noise(), kind)[:-2], f"x.{kind.lower()}").code == "damaged"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bytes_behind_the_end_are_noted(make: Any, kind: str) -> None:
    data = make.encode(make.noise(), kind) + b"junk junk"
    picture = decode_picture(data, path=f"x.{kind.lower()}")
    assert codes(picture) == ["trailing-bytes"]
    assert "9 bytes" in picture.notes[0].message


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "empty", "is empty (0 bytes)"),
        (b"<!DOCTYPE html><html>", "not-a-picture", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not-a-picture", "Git LFS pointer"),
        (b"hello", "not-a-picture", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-a-picture", "not a picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not-a-picture", "HEIC"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_content(data: bytes, code: str, words: str) -> None:
    problem = refusal(data, "a.jpg")
    assert problem.code == code
    assert words in problem.message
    assert problem.message.startswith("a.jpg ")


@pytest.mark.parametrize("size", [(12_000, 12_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_claims_to_be_huge_is_refused_at_once(make: Any, size: tuple[int, int]) -> None:
    started = time.perf_counter()
    assert refusal(make.png_claiming(*size)).code == "too-many-pixels"
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("size", "code"),
    [((1, 1), "too-small"), ((1, 20_000), "too-small"), ((64, 20_000), "odd-shape")],
)
def test_pictures_too_small_or_too_thin_are_refused(make: Any, size: tuple[int, int], code: str) -> None:
    assert refusal(make.png_claiming(*size)).code == code


def test_a_header_without_pixels_and_one_with_a_wrong_checksum_are_refused(make: Any) -> None:
    assert refusal(make.png_claiming(0, 0)).code in ("damaged", "not-a-picture")
    data = bytearray(make.encode(make.noise()))
    data[29] ^= 0xFF  # checksum of IHDR
    assert refusal(bytes(data)).code in ("damaged", "not-a-picture")


@pytest.mark.parametrize("at_end", [False, True])
def test_a_text_bomb_in_a_png_is_refused(make: Any, at_end: bool) -> None:
    good = make.encode(make.noise())
    bomb = make.png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 20_000_000))
    at = good.rfind(b"IEND") - 4 if at_end else 33
    assert refusal(good[:at] + bomb + good[at:]).code == "damaged"


def test_cmyk_is_converted_and_noted(make: Any) -> None:
    red = make.encode(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG")
    picture = decode_picture(red, path="x.jpg")
    assert codes(picture) == ["cmyk"]
    r, g, b = picture.image.getpixel((5, 5))
    assert r > 200
    assert max(g, b) < 80


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P"])
def test_gray_and_palette_modes_become_rgb(make: Any, mode: str) -> None:
    picture = decode_picture(make.encode(make.noise().convert(mode)), path="x.png")
    expected = make.noise().convert(mode).convert("RGB")
    assert picture.image.tobytes() == expected.tobytes()
    assert picture.alpha is None


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_and_not_clipped(make: Any, kind: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    picture = decode_picture(make.encode(Image.fromarray(ramp), kind), path=f"x.{kind.lower()}")
    values = np.asarray(picture.image)[..., 0]
    assert np.array_equal(values, np.rint(ramp / 257.0).astype(np.uint8))
    assert abs(float(values.mean()) - 127.5) < 0.5
    assert codes(picture) == ["sixteen-bit"]


def test_32_bit_numbers_are_refused(make: Any) -> None:
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64).astype(np.float32)
    assert refusal(make.encode(Image.fromarray(ramp), "TIFF"), "x.tif").code == "unsupported-depth"


def test_a_transparent_palette_shows_the_background_and_not_its_hidden_colour(make: Any) -> None:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 255, 0, 255, 10, 20, 30])
    image.paste(2, (32, 0, 64, 64))
    data = make.encode(image, transparency=1)
    picture = decode_picture(data, background="#00ff00", path="x.png")
    assert picture.image.getpixel((0, 0)) == (0, 255, 0)
    assert picture.image.getpixel((40, 0)) == (10, 20, 30)
    assert picture.alpha is not None
    assert picture.alpha.getpixel((0, 0)) == 0
    assert codes(picture) == ["transparent"]


@pytest.mark.parametrize(("alpha", "expected"), [(0, (255, 255, 255)), (255, (10, 20, 30))])
def test_rgba_is_laid_on_the_background(make: Any, alpha: int, expected: tuple[int, int, int]) -> None:
    data = make.encode(Image.new("RGBA", (64, 64), (10, 20, 30, alpha)))
    assert decode_picture(data, path="x.png").image.getpixel((3, 3)) == expected


def test_half_transparent_pixels_are_mixed(make: Any) -> None:
    data = make.encode(Image.new("RGBA", (64, 64), (200, 100, 0, 128)))
    pixel = decode_picture(data, background="black", path="x.png").image.getpixel((3, 3))
    assert pixel == pytest.approx((100, 50, 0), abs=1)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_several_frames_the_first_is_used_with_a_note(make: Any, kind: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    data = make.encode(frames[0], kind, save_all=True, append_images=frames[1:])
    picture = decode_picture(data, path=f"x.{kind.lower()}")
    assert picture.image.getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=3)
    assert codes(picture) == ["animated"]


def test_a_jpeg_with_further_views_is_an_ordinary_jpeg(make: Any) -> None:
    views = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    data = make.encode(views[0], "MPO", save_all=True, append_images=views[1:])
    picture = decode_picture(data, path="x.jpg")
    assert picture.header.format == "JPEG"
    assert codes(picture) == []


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_and_the_header_says_the_turned_size(make: Any, kind: str, orientation: int) -> None:
    image = Image.new("RGB", (96, 64), "black")
    image.paste("white", (0, 0, 16, 16))  # a bright corner shows the turn
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = make.encode(image, kind, exif=exif)
    picture = decode_picture(data, path=f"x.{kind.lower()}")
    swap = orientation >= 5
    assert picture.image.size == ((64, 96) if swap else (96, 64))
    header = read_header(data, path=f"x.{kind.lower()}")
    assert (header.width, header.height) == picture.image.size
    right = orientation in (2, 3, 6, 7)  # where the first row and column are (TIFF 6.0, tag 274)
    bottom = orientation in (3, 4, 7, 8)
    width, height = picture.image.size
    corner = (width - 4 if right else 4, height - 4 if bottom else 4)
    assert sum(picture.image.getpixel(corner)) > 600
    opposite = (width - 1 - corner[0], height - 1 - corner[1])
    assert sum(picture.image.getpixel(opposite)) < 100
    assert codes(picture) == (["exif-rotated"] if orientation > 1 else [])


def test_damaged_exif_data_is_noted_and_the_picture_is_used(make: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = make.encode(make.noise(), "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 6
    picture = decode_picture(data[:at] + b"\xff" * 26 + data[at + 26 :], path="x.jpg")
    assert picture.image.size == (96, 64)
    assert codes(picture) == ["exif-damaged"]


def test_a_colour_profile_is_converted_to_srgb(make: Any) -> None:
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    data = make.encode(image, "PNG", icc_profile=make.swapped_profile())
    picture = decode_picture(data, path="x.png")
    assert picture.image.getpixel((1, 1)) == pytest.approx((0, 0, 255), abs=6)
    assert codes(picture) == ["icc"]
    assert "swapped" in picture.notes[0].message


def test_a_damaged_colour_profile_is_noted_and_left_out(make: Any) -> None:
    data = make.encode(make.noise(), "PNG", icc_profile=b"no profile at all" * 20)
    picture = decode_picture(data, path="x.png")
    assert picture.image.tobytes() == make.noise().tobytes()
    assert codes(picture) == ["icc-damaged"]


def test_a_png_named_jpg_is_read_and_noted(make: Any, folder: Any) -> None:
    root = folder({"a.jpg": make.encode(make.noise(), "PNG")})
    assert open_picture(root / "a.jpg").tobytes() == make.noise().tobytes()
    assert codes(decode_picture((root / "a.jpg").read_bytes(), path="a.jpg")) == ["wrong-extension"]


def test_reading_a_header_decodes_no_pixels(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Image.Image) -> None:
        raise AssertionError("decoded")

    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [make.encode(make.noise(), kind) for kind in ("PNG", "JPEG", "BMP")]
    pictures.append(make.encode(make.noise(), "PNG", exif=exif))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
    for data in pictures:
        assert sorted((read_header(data, path="x").width, read_header(data, path="x").height)) == [
            64,
            96,
        ]


def test_a_background_that_is_no_colour_is_a_preset_error() -> None:
    assert parse_background("#102030") == (16, 32, 48)
    with pytest.raises(ConfigError, match="`blurple`, which is not a colour"):
        parse_background("blurple")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_random_damage_ends_in_a_picture_or_a_refusal_and_nothing_else(make: Any, kind: str) -> None:
    options = {} if kind in ("BMP", "GIF", "AVIF") else {"icc_profile": make.swapped_profile()}
    data = make.encode(make.noise(48, 32), kind, **options)
    rng = random.Random(kind)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 3, 20))):
            damaged[rng.randrange(min(len(data), rng.choice((60, 700, len(data)))))] = rng.randrange(256)
        try:
            header = read_header(bytes(damaged), path="x")
            picture = decode_picture(bytes(damaged), path="x")
        except FileProblem:
            refused += 1
        else:
            assert picture.image.mode == "RGB"
            assert picture.image.size == (header.width, header.height)
    assert refused > 0
