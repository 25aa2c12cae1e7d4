"""Thirty kinds of bad folder, each with its finding and exit code; the `folder` fixture checks that originals stay."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from emotrain.cli.app import main
from emotrain.runs.lint import lint_folder


def lint(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit code and the JSON answer of `emotrain lint ROOT --json`."""
    code = main(["lint", str(root), "--json"])
    return code, json.loads(capsys.readouterr().out)


def codes(report: dict[str, Any], severity: str | None = None) -> set[str]:
    found = [finding for finding in report["findings"] if severity in (None, finding["severity"])]
    return {finding["code"] for finding in found}


def picture(width: int = 160, height: int = 128, seed: int = 0, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST).convert(mode)


Case = Callable[[Any], dict[str, bytes | str]]


def of(content: Callable[[Any], bytes], name: str = "bad.jpg") -> Case:
    return lambda make: {name: content(make), str(Path(name).with_suffix(".txt")): "a caption"}


def cut(make: Any, share: float | int) -> bytes:
    data: bytes = make.encode(picture(), "JPEG")
    return data[: int(len(data) * share)] if share < 1 else data[: -int(share)]


def text_bomb(make: Any) -> bytes:
    data: bytes = make.encode(picture())
    body = zlib.compress(b"\0" * 20_000_000)
    return data[:33] + make.png_chunk(b"zTXt", b"comment\0\0" + body) + data[33:]


def sixteen_bit(make: Any) -> bytes:
    ramp = np.linspace(0, 65535, 160 * 128).reshape(128, 160).astype(np.uint16)
    data: bytes = make.encode(Image.fromarray(ramp))
    return data


def transparent_palette(make: Any) -> bytes:
    data: bytes = make.encode(picture().quantize(16), transparency=3)
    return data


def with_alpha(make: Any, alpha: int) -> bytes:
    image = picture(mode="RGBA")
    image.putalpha(alpha)
    data: bytes = make.encode(image)
    return data


def animated(make: Any, kind: str) -> bytes:
    data: bytes = make.encode(picture(), kind, save_all=True, append_images=[picture(seed=1)])
    return data


def rotated(make: Any, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data: bytes = make.encode(picture(), "JPEG", exif=exif.tobytes())
    return data


def broken_exif(make: Any) -> bytes:
    body = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 20
    data: bytes = make.encode(picture(), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def bad_checksum(make: Any) -> bytes:
    data: bytes = make.encode(picture())
    at = data.index(b"IDAT") + 8
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def print_colours(make: Any) -> bytes:
    data: bytes = make.encode(picture(mode="CMYK"), "JPEG")
    return data


# name: (files besides a good picture, exit code, finding, its severity; None: no finding about this at all)
TOO_MANY = "too-many-pixels"
SMALL = {("below-resolution", "warning"), ("heavy-crop", "warning")}
CASES: dict[str, tuple[Case, int, str | None, str]] = {
    "1 truncated JPEG": (of(lambda make: cut(make, 0.5)), 3, "damaged", "error"),
    "2 JPEG without its last two bytes": (of(lambda make: cut(make, 2)), 3, "damaged", "error"),
    "3 bytes behind the end": (of(lambda m: m.encode(picture(), "JPEG") + b"junk" * 9), 0, "trailing-bytes", "warning"),
    "4 empty file": (of(lambda make: b""), 3, "empty", "error"),
    "5 a web page named .jpg": (of(lambda make: b"<!doctype html><p>404"), 3, "not-a-picture", "error"),
    "6 CMYK": (of(print_colours), 0, "cmyk", "warning"),
    "7 grey": (of(lambda m: m.encode(picture(mode="L")), "bad.png"), 0, None, ""),
    "7 grey with alpha": (of(lambda m: m.encode(picture(mode="LA")), "bad.png"), 0, None, ""),
    "7 one bit": (of(lambda m: m.encode(picture(mode="1")), "bad.png"), 0, None, ""),
    "8 sixteen bits": (of(sixteen_bit, "bad.png"), 0, "sixteen-bit", "info"),
    "9 float TIFF": (of(lambda m: m.encode(picture(mode="F"), "TIFF"), "bad.tif"), 3, "unsupported-depth", "error"),
    "10 palette with transparency": (of(transparent_palette, "bad.png"), 0, "transparent", "info"),
    "11 all transparent": (of(lambda make: with_alpha(make, 0), "bad.png"), 0, "invisible", "warning"),
    "11 half transparent": (of(lambda make: with_alpha(make, 128), "bad.png"), 0, "transparent", "info"),
    "12 animated WebP": (of(lambda make: animated(make, "WEBP"), "bad.webp"), 0, "animated", "warning"),
    "12 animated GIF": (of(lambda make: animated(make, "GIF"), "bad.gif"), 0, "animated", "warning"),
    "12 animated PNG": (of(lambda make: animated(make, "PNG"), "bad.png"), 0, "animated", "warning"),
    "13 TIFF of two pages": (of(lambda make: animated(make, "TIFF"), "bad.tif"), 0, "animated", "warning"),
    **{
        f"14 EXIF rotation {turn}": (of(lambda make, turn=turn: rotated(make, turn)), 0, "exif-rotated", "info")
        for turn in range(2, 9)
    },
    "15 broken EXIF": (of(broken_exif), 0, "exif-damaged", "warning"),
    "16 claims 12,000 x 12,000": (of(lambda m: m.png_claiming(12_000, 12_000), "bad.png"), 3, TOO_MANY, "error"),
    "16 claims 20,000 x 20,000": (of(lambda m: m.png_claiming(20_000, 20_000), "bad.png"), 3, TOO_MANY, "error"),
    "16 claims 2^31 - 1": (of(lambda m: m.png_claiming(2**31 - 1, 2**31 - 1), "bad.png"), 3, TOO_MANY, "error"),
    "17 text bomb": (of(text_bomb, "bad.png"), 3, "damaged", "error"),
    "18 one pixel": (of(lambda m: m.encode(Image.new("RGB", (1, 1))), "bad.png"), 3, "too-small", "error"),
    "18 a line": (of(lambda m: m.encode(Image.new("RGB", (8, 20_000))), "bad.png"), 3, "odd-shape", "error"),
    "18 a thin line": (of(lambda m: m.encode(Image.new("RGB", (1, 20_000))), "bad.png"), 3, "too-small", "error"),
    "19 no pixels": (of(lambda m: m.png_claiming(0, 0), "bad.png"), 3, "not-a-picture", "error"),
    "19 wrong checksum": (of(bad_checksum, "bad.png"), 3, "damaged", "error"),
    "20 PNG named .jpg": (of(lambda m: m.encode(picture())), 0, "wrong-extension", "warning"),
    "20 upper case": (of(lambda m: m.encode(picture(), "JPEG"), "BAD.JPG"), 0, None, ""),
    "20 upper case, long": (of(lambda m: m.encode(picture(), "JPEG"), "BAD.JPEG"), 0, None, ""),
    "20 a text that is no caption": (lambda make: {"notes.md": "to do"}, 0, "other-file", "info"),
    "20 two extensions": (of(lambda m: m.encode(picture()), "bad.jpg.png"), 0, None, ""),
    "20 a program": (lambda make: {"setup.exe": b"MZ"}, 0, "other-file", "info"),
    "24 two pictures share a caption": (
        lambda m: {"a.jpg": m.encode(picture(), "JPEG"), "a.png": m.encode(picture(seed=4)), "a.txt": "a cat"},
        3, "ambiguous-caption", "error",
    ),
    "26 missing caption": (lambda m: {"bad.png": m.encode(picture())}, 0, "caption-missing", "warning"),
    "26 empty caption": (lambda m: {"bad.png": m.encode(picture()), "bad.txt": ""}, 0, "caption-empty", "warning"),
    "26 white space": (lambda m: {"bad.png": m.encode(picture()), "bad.txt": " \n\t"}, 0, "caption-empty", "warning"),
    "26 UTF-8 with BOM": (lambda m: {"bad.png": m.encode(picture()), "bad.txt": b"\xef\xbb\xbfcat"}, 0, None, ""),
    **{
        f"26 {kind}": (
            lambda m, kind=kind: {"bad.png": m.encode(picture()), "bad.txt": "\ufeffa cat".encode(kind)},
            0, "caption-utf16", "info",
        )
        for kind in ("utf-16-le", "utf-16-be")
    },
    "26 latin-1": (
        lambda m: {"bad.png": m.encode(picture()), "bad.txt": "caf\u00e9 cat".encode("latin-1")},
        3, "caption-encoding", "error",
    ),
    "26 NUL": (lambda m: {"bad.png": m.encode(picture()), "bad.txt": "a\0cat"}, 3, "caption-encoding", "error"),
    "26 a megabyte": (
        lambda m: {"bad.png": m.encode(picture()), "bad.txt": "cat, " * 200_000}, 3, "caption-too-large", "error",
    ),
    "26 too long": (
        lambda m: {"bad.png": m.encode(picture()), "bad.txt": "red hat, " * 60}, 0, "caption-truncated", "warning",
    ),
    "26 CRLF": (lambda m: {"bad.png": m.encode(picture()), "bad.txt": "cat\r\ndog\r\n"}, 0, "caption-lines", "info"),
    "26 markup": (lambda m: {"bad.png": m.encode(picture()), "bad.txt": "<b>cat</b>"}, 0, "caption-markup", "info"),
    "26 rich markup": (lambda m: {"bad.png": m.encode(picture()), "bad.txt": "[b]cat[/]"}, 0, "caption-markup", "info"),
    "26 escapes": (lambda m: {"bad.png": m.encode(picture()), "bad.txt": "cat\x1b"}, 0, "caption-control", "warning"),
    "26 mojibake": (
        lambda m: {"bad.png": m.encode(picture()), "bad.txt": "caf\u00c3\u00a9"}, 0, "caption-mojibake", "warning",
    ),
    "27 hidden files": (
        lambda m: {"Thumbs.db": b"x", ".DS_Store": b"x", "__MACOSX/._x.jpg": b"x", "._y.jpg": b"x"}, 0, None, "",
    ),
    "27 a Mac's twin of a picture": (lambda m: {"._ok.png": b"\0\5\x16\7", "desktop.ini": b"x"}, 0, None, ""),
    "28 nested": (of(lambda m: m.encode(picture()), "a/b/c/bad.png"), 0, None, ""),
    "30 ICC profile": (
        of(lambda m: m.encode(picture(), "JPEG", icc_profile=m.swapped_profile())), 0, "icc", "info",
    ),
    "30 orphan caption": (lambda make: {"gone.txt": "a cat"}, 0, "orphan-caption", "warning"),
    "30 HEIC": (lambda make: {"phone.heic": b"\0\0\0\x18ftypheic"}, 0, "unsupported", "warning"),
}  # fmt: skip


def test_the_size_that_was_assumed_is_said_with_its_reason(folder: Any, make: Any) -> None:
    for sides, words in (((600, 700, 90), "512 px, the largest of"), ((90, 80, 700), "512 px, which more than half")):
        root = folder({f"{side}.png": make.encode(picture(side, side)) for side in sides})
        assert words in lint_folder(str(root)).assumed


@pytest.mark.parametrize("name", CASES)
def test_a_bad_folder_gets_its_finding_and_exit_code(
    name: str, folder: Any, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    files, exit_code, code, severity = CASES[name]
    ok = {"ok.png": make.encode(picture(seed=9)), "ok.txt": "two birds"}
    root = folder({**ok, **files(make)})
    start = time.perf_counter()
    found_code, report = lint(root, capsys)
    assert time.perf_counter() - start < 5
    about = {(finding["code"], finding["severity"]) for finding in report["findings"]}
    assert found_code == exit_code, about
    about -= SMALL  # a bare folder of these pictures is held against 512 px
    if code is None:
        assert not about
    else:
        assert (code, severity) in about
        assert all(finding["severity"] != "error" for finding in report["findings"]) == (exit_code == 0)
    files_said, used = report["totals"].split(" files: ")
    assert int(files_said) >= 2
    assert not used.startswith("0 ")


def test_a_rotated_picture_goes_into_the_bucket_of_its_turned_size(
    folder: Any, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder({f"{turn}.jpg": rotated(make, turn) for turn in range(1, 9)})
    _, report = lint(root, capsys)
    sizes = {row["id"][5]: (row["width"], row["height"]) for row in report["pictures"]}
    assert sizes == {str(turn): (160, 128) if turn < 5 else (128, 160) for turn in range(1, 9)}


def test_a_caption_in_another_encoding_names_the_byte(
    folder: Any, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder({"a.png": make.encode(picture()), "a.txt": b"caf\xe9 cat"})
    code, report = lint(root, capsys)
    assert code == 3
    (message,) = (finding["message"] for finding in report["findings"] if finding["code"] == "caption-encoding")
    assert "byte 3" in message


def test_a_caption_that_is_a_link_out_of_the_folder_is_not_read(
    folder: Any, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.txt").write_text("a password", encoding="utf-8")
    root = folder({"a.png": make.encode(picture()), "b.png": make.encode(picture(seed=1)), "b.txt": "two birds"})
    (root / "a.txt").symlink_to(tmp_path / "secret.txt")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "self.png").symlink_to(root / "self.png")
    start = time.perf_counter()
    code, report = lint(root, capsys)
    assert time.perf_counter() - start < 2
    for name in ("a.txt", "zero.png", "self.png"):
        (root / name).unlink()
    assert code == 3
    found = {finding["file"]: finding["code"] for finding in report["findings"] if finding["severity"] == "error"}
    assert found["data/a.png"] == "caption-link"
    assert found["data/zero.png"] == "not-a-file"
    assert found["data/self.png"] in ("broken-link", "unreadable")
    assert "password" not in json.dumps(report)


def test_empty_folders_and_deep_ones_are_no_reason_to_fail(
    folder: Any, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder({"/".join("abcdefghij") + "/ok.png": make.encode(picture()), "a/ok.txt": "no picture of this name"})
    (root / "empty" / "emptier").mkdir(parents=True)
    code, report = lint(root, capsys)
    assert code == 0
    assert [row["id"] for row in report["pictures"]] == ["data/a/b/c/d/e/f/g/h/i/j/ok.png"]


@pytest.mark.slow
def test_ten_thousand_files_take_less_than_a_minute(folder: Any, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, bytes | str] = {}
    for k in range(5000):
        files[f"{k % 50}/{k}.png"] = make.encode(picture(64, 64, seed=k))
        files[f"{k % 50}/{k}.txt"] = f"thing {k}"
    root = folder(files)
    start = time.perf_counter()
    code, report = lint(root, capsys)
    assert time.perf_counter() - start < 60
    assert code == 0
    assert len(report["pictures"]) == 5000


def test_a_folder_without_a_usable_picture_is_an_error(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = lint(folder({"a.jpg": b"", "notes.md": "x"}), capsys)
    assert code == 3
    assert codes(report, "error") == {"empty", "no-pictures"}


def test_links_and_pipes_are_named_and_never_waited_for(
    folder: Any, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder({"ok.png": make.encode(picture()), "ok.txt": "a cat"})
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as plug:
        here = Path.cwd()
        os.chdir(root)  # the path of a socket must be short
        plug.bind("plug")
        os.chdir(here)
        start = time.perf_counter()
        code, report = lint(root, capsys)
    assert time.perf_counter() - start < 2
    for name in ("loop", "gone.png", "pipe.png", "plug"):
        (root / name).unlink()
    assert code == 3
    assert {"linked-folder", "broken-link", "not-a-file"} <= codes(report)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_an_error(folder: Any, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder({"ok.png": make.encode(picture()), "no.png": make.encode(picture(seed=1))})
    (root / "no.png").chmod(0)
    code, report = lint(root, capsys)
    (root / "no.png").chmod(0o600)
    assert code == 3
    assert "unreadable" in codes(report, "error")


def test_copies_are_found_to_the_byte_and_nearly(folder: Any, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    image = picture(320, 256)
    near = image.crop((8, 6, 314, 250)).resize((240, 190), Image.Resampling.LANCZOS)
    files = {
        "a.png": make.encode(image), "a.txt": "a cat", "b.png": make.encode(image), "b.txt": "a cat",
        "c.jpg": make.encode(near, "JPEG", quality=70), "c.txt": "a dog",
        "d.png": make.encode(picture(320, 256, seed=5)), "d.txt": "a bird",
    }  # fmt: skip
    code, report = lint(folder(files), capsys)
    assert code == 0
    found = {finding["code"]: finding for finding in report["findings"]}
    assert found["duplicate"]["file"] == "data/a.png"
    assert found["duplicate"]["others"] == ["data/b.png"]
    assert found["near-duplicate"]["others"] == ["data/c.jpg"]
    assert found["near-duplicate"]["message"].endswith("with other captions")


@pytest.mark.parametrize(
    "name",
    [
        b"x" * 251 + b".png", "\U0001f600.png".encode(), "\u05e9\u05dc\u202e.png".encode(), b"new\nline.png",
        b"-rf.png", b"bytes\xff\xfe.png", b"[red]x[link=].png", b"<script>.png",
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", [[], ["--json"], ["--html"]])
def test_names_of_any_kind_are_printed(
    tmp_path: Path, make: Any, name: bytes, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (Path(os.fsdecode(os.fsencode(root) + b"/" + name))).write_bytes(make.encode(picture())[:-9])
    page = tmp_path / "page.html"
    assert main(["lint", str(root), *how, *([str(page)] if how == ["--html"] else [])]) == 3
    out = capsys.readouterr().out
    assert "damaged" in out
    assert not set(out) & set("\x1b\u202e\udcff")
    if how == ["--html"]:
        assert "damaged" in page.read_text("utf-8")


def test_names_that_meet_on_other_systems_are_named(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for seed, name in enumerate(("A.png", "a.png", "e\u0301.png", "\u00e9.png")):
        (root / name).write_bytes(make.encode(picture(seed=seed)))
    if len(list(root.iterdir())) < 4:
        pytest.skip("this file system folds names")
    code, report = lint(root, capsys)
    assert code == 0
    assert len([finding for finding in report["findings"] if finding["code"] == "name-twins"]) == 2


def test_a_picture_that_goes_while_lint_runs_is_an_error(
    folder: Any, make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from emotrain.dataset import lint as module

    root = folder({"ok.png": make.encode(picture()), "ok.txt": "a cat"})
    other = root / "gone.png"
    other.write_bytes(make.encode(picture(seed=2)))
    whole = module.measure_all

    def after_deleting(*args: Any, **kwargs: Any) -> Any:
        other.unlink()
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, "measure_all", after_deleting)
    code, report = lint(root, capsys)
    assert code == 3
    assert "missing" in codes(report, "error")


def test_a_huge_text_in_a_png_is_no_reason_to_hang(folder: Any, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "cat " * 20_000, zip=True)
    code, report = lint(folder({"a.png": make.encode(picture(), pnginfo=info), "a.txt": "a cat"}), capsys)
    assert code == 0
    assert {(finding["code"], finding["severity"]) for finding in report["findings"]} <= SMALL
