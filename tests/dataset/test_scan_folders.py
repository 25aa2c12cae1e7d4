"""Every file of a data folder is accounted for: used, or left out with a reason."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emotrain.dataset.scan import FolderSpec, Scan, require_pictures, resolve_folder, scan
from emotrain.errors import ConfigError, DatasetError

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX file kinds")


def look(*roots: Path, **options: Any) -> Scan:
    """A scan whose totals have been checked."""
    words = {name: options.pop(name) for name in ("caption_extension", "default_caption") if name in options}
    found = scan([FolderSpec(path=str(root), **options) for root in roots], **words)
    parts = (len(found.examples), len(found.skipped), found.captions, found.listings, found.hidden)
    assert found.files == sum(parts)
    assert found.totals().startswith(f"{found.files} files: {len(found.examples)} pictures used")
    return found


def reasons(found: Scan) -> dict[str, str]:
    return {item.path.name: item.code for item in found.skipped}


def by_id(found: Scan) -> dict[str, Any]:
    return {example.id: example for example in found.examples}


def test_the_example_of_the_package_is_found() -> None:
    found = scan([FolderSpec(path="builtin:example"), FolderSpec(path="builtin:example-heldout")])
    assert len(found.examples) >= 64
    assert found.skipped == ()
    assert all(example.caption_source == "file" for example in found.examples)
    assert found.examples[0].id.startswith("example/")


def test_an_unknown_builtin_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_folder("builtin:exmaple")
    assert caught.value.exit_code == 2
    assert "builtin:example" in str(caught.value.hint)


def test_folders_that_cannot_be_read_are_named_all_at_once(folder: Any, make: Any, tmp_path: Path) -> None:
    root = folder({"a.png": make.encode(make.noise())})
    specs = [str(tmp_path / "missing"), str(root / "a.png"), str(root), str(root)]
    with pytest.raises(DatasetError) as caught:
        scan([FolderSpec(path=path) for path in specs])
    messages = [problem.message for problem in caught.value.problems]
    assert [message.split()[-3:] for message in messages[:1]] == [["does", "not", "exist"]]
    assert "is not a folder" in messages[1]
    assert "is listed twice" in messages[2]
    assert caught.value.exit_code == 3


def test_a_folder_without_pictures_says_what_is_in_it(folder: Any) -> None:
    root = folder({"a.heic": b"x", "b.jpg": b"", "notes.md": "hello", ".hidden": "x"})
    with pytest.raises(DatasetError) as caught:
        require_pictures(look(root))
    assert "4 files: 0 pictures used" in caught.value.message
    assert "1 skipped: unsupported" in caught.value.message
    assert any("b.jpg is empty" in problem.message for problem in caught.value.problems)


def test_examples_carry_size_digest_and_caption(folder: Any, make: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = make.encode(make.noise(), "JPEG", exif=exif)
    found = look(folder({"a.JPG": data, "a.txt": "a red cat"}), repeats=3, flip=True, prior=0.5)
    (example,) = found.examples
    assert example.id == "data/a.JPG"
    assert (example.width, example.height) == (64, 96)
    assert example.captions == ("a red cat",)
    assert (example.repeats, example.flip, example.weight, example.prior) == (3, True, 0.5, True)
    assert len(example.sha256) == 64
    assert example.file_size == len(data)
    assert [note.code for note in example.notes] == ["exif-rotated"]


def test_subfolders_are_read_and_those_named_n_name_repeat(folder: Any, make: Any) -> None:
    picture = make.encode(make.noise())
    names = ["a.png", "10_mika/b.png", "10_mika/deep/c.png", "10_mika/2_best/d.png", "2024_trip/e.png"]
    found = look(folder(dict.fromkeys(names, picture)), repeats=2)
    repeats = {name.removeprefix("data/"): example.repeats for name, example in by_id(found).items()}
    assert repeats == {
        "a.png": 2,
        "10_mika/b.png": 20,
        "10_mika/deep/c.png": 20,
        "10_mika/2_best/d.png": 4,
        "2024_trip/e.png": 2,
    }


def test_a_folder_listed_by_itself_is_not_part_of_the_one_around_it(folder: Any, make: Any) -> None:
    picture = make.encode(make.noise())
    root = folder({"a.png": picture, "girls/b.png": picture, "masks/a.png": picture})
    specs = [
        FolderSpec(path=str(root), mask=str(root / "masks")),
        FolderSpec(path=str(root / "girls"), prior=0.5),
    ]
    found = scan(specs)
    assert [(e.id, e.weight) for e in found.examples] == [("data/a.png", 1.0), ("girls/b.png", 0.5)]
    assert found.examples[0].mask == root / "masks" / "a.png"
    assert found.examples[1].mask is None


def test_a_picture_without_its_mask_is_used_and_noted(folder: Any, make: Any, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    (masks / "sub").mkdir(parents=True)
    make.noise().convert("L").save(masks / "sub" / "a.webp")
    root = folder({"sub/a.png": make.encode(make.noise()), "b.png": make.encode(make.noise())})
    found = by_id(look(root, mask=str(masks)))
    assert found["data/sub/a.png"].mask == masks / "sub" / "a.webp"
    assert found["data/b.png"].mask is None
    assert [note.code for note in found["data/b.png"].notes] == ["caption-missing", "mask-missing"]
    assert look(root, mask="alpha").examples[0].mask == "alpha"


def test_folders_of_one_name_keep_their_ids_apart(make: Any, tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "img").mkdir(parents=True)
        make.noise().save(tmp_path / parent / "img" / "a.png")
    found = look(tmp_path / "one" / "img", tmp_path / "two" / "img")
    assert sorted(by_id(found)) == ["img#2/a.png", "img/a.png"]


def test_hidden_and_system_files_are_left_out_silently_and_counted(folder: Any, make: Any) -> None:
    names = [".DS_Store", "Thumbs.db", "desktop.ini", "._a.png", ".git/x.png", "__MACOSX/._a.png"]
    root = folder({"a.png": make.encode(make.noise()), **dict.fromkeys(names, b"junk")})
    found = look(root)
    assert found.hidden == 6
    assert found.skipped == ()
    assert len(found.examples) == 1


def test_every_kind_of_file_has_its_reason(folder: Any, make: Any) -> None:
    good = make.encode(make.noise())
    files = {
        "good.png": good,
        "double.jpg.png": good,
        "cut.jpg": b"\xff\xd8\xff\xe0",
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html>",
        "huge.png": make.png_claiming(20_000, 20_000),
        "dot.png": make.png_claiming(1, 1),
        "phone.HEIC": b"x",
        "tool.exe": good,
        "lonely.txt": "nobody",
        "good.caption": "second",
        "good.txt": "first",
    }
    found = look(folder(files))
    assert sorted(by_id(found)) == ["data/double.jpg.png", "data/good.png"]
    assert reasons(found) == {
        "cut.jpg": "not-a-picture",
        "empty.png": "empty",
        "page.jpg": "not-a-picture",
        "huge.png": "too-many-pixels",
        "dot.png": "too-small",
        "phone.HEIC": "unsupported",
        "tool.exe": "other-file",
        "lonely.txt": "orphan-caption",
        "good.caption": "second-caption",
    }
    assert {item.path.name for item in found.errors()} == {
        "cut.jpg", "empty.png", "page.jpg", "huge.png", "dot.png"
    }  # fmt: skip
    assert found.captions == 1


def test_two_pictures_cannot_share_a_caption(folder: Any, make: Any) -> None:
    good = make.encode(make.noise())
    root = folder({"a.jpg": good, "a.png": good, "a.txt": "cat", "b.png": good, "b.txt": "dog"})
    found = look(root)
    assert reasons(found) == {"a.jpg": "ambiguous-caption", "a.png": "ambiguous-caption"}
    assert all(item.severity == "error" for item in found.skipped)
    assert "shares the caption a.txt with a.png" in found.skipped[0].reason
    assert found.captions == 2
    (root / "a.txt").unlink()
    assert len(look(root).examples) == 3
    (root / "a.txt").write_text("cat")


@posix
def test_links_pipes_sockets_and_devices_are_never_waited_for(folder: Any, make: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "real.png").write_bytes(make.encode(make.noise()))
    (outside / "secret").write_text("private key")
    root = folder({"a.png": make.encode(make.noise(seed=1)), "sub/b.png": make.encode(make.noise())})
    (root / "loop").symlink_to(root)
    (root / "sub" / "up").symlink_to(root)
    (root / "gone.png").symlink_to(root / "nothing.png")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "linked.png").symlink_to(outside / "real.png")
    (root / "out").symlink_to(outside)
    (root / "a.txt").symlink_to(outside / "secret")
    (root / "null.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "sub" / "b.txt")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(root)  # socket paths are short
    server.bind("sock.jpg")
    os.chdir(here)
    started = time.perf_counter()
    found = look(root)
    assert time.perf_counter() - started < 2.0
    server.close()
    assert sorted(by_id(found)) == ["data/linked.png", "data/sub/b.png"]
    assert reasons(found) == {
        "a.png": "caption-link",
        "loop": "linked-folder",
        "up": "linked-folder",
        "out": "linked-folder",
        "gone.png": "broken-link",
        "self.png": "broken-link",
        "null.png": "not-a-file",
        "pipe.png": "not-a-file",
        "b.txt": "not-a-file",
        "sock.jpg": "not-a-file",
    }
    assert not any("private" in caption for e in found.examples for caption in e.captions)
    for name in ("pipe.png", "sub/b.txt", "sock.jpg"):
        (root / name).unlink()


@posix
def test_a_pipe_that_takes_a_pictures_place_does_not_hang(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from emotrain.dataset.images import open_picture\n"
        "os.mkfifo(sys.argv[1])\n"
        "try: open_picture(Path(sys.argv[1]))\n"
        "except Exception as error: print(error.code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p.png")], capture_output=True, text=True, timeout=20
    )
    assert run.stdout.strip() == "not-a-file", run.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_files_without_permission_are_skipped_as_errors(folder: Any, make: Any) -> None:
    root = folder({"a.png": make.encode(make.noise()), "b.png": make.encode(make.noise())})
    (root / "a.png").chmod(0)
    found = look(root)
    (root / "a.png").chmod(0o600)
    assert reasons(found) == {"a.png": "unreadable"}
    assert found.skipped[0].severity == "error"


@pytest.mark.parametrize(
    ("error", "code"), [(PermissionError(13, "denied"), "unreadable"), (FileNotFoundError(), "missing")]
)
def test_a_file_that_cannot_be_opened_any_more_is_skipped(
    folder: Any, make: Any, monkeypatch: pytest.MonkeyPatch, error: OSError, code: str
) -> None:
    def refuse(path: object, flags: int) -> int:
        raise error

    root = folder({"a.png": make.encode(make.noise())})
    monkeypatch.setattr("emotrain.files.os.open", refuse)
    assert reasons(look(root)) == {"a.png": code}


@posix
@pytest.mark.parametrize(
    "name",
    [
        "\U0001f642.png".encode(),
        "שלום.png".encode(),
        b"line\nbreak.png",
        b"-rf.png",
        b"caf\xe9.png",
        b"\xff\xfe\x80.png",
        b"red[red]\x1b[31m.png",
        b"x" * 251 + b".png",
        "e\u0301.png".encode(),
    ],
)
def test_weird_names_are_read_and_can_be_printed(tmp_path: Path, make: Any, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(make.encode(make.noise()))
    with open(os.path.splitext(path)[0] + b".txt", "wb") as file:
        file.write(b"hello")
    found = look(tmp_path)
    (example,) = found.examples
    assert example.captions == ("hello",)
    example.id.encode("utf-8")
    assert example.id.isprintable() or example.id.isascii() is False
    assert "\n" not in example.id
    assert "\x1b" not in example.id
    json.dumps(example.id, ensure_ascii=False).encode("utf-8")


@posix
def test_names_that_differ_in_case_or_composition_stay_apart(tmp_path: Path, make: Any) -> None:
    names = ["A.png", "a.png", "\u00e9.png", "e\u0301.png"]
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(make.encode(make.noise(seed=index)))
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {index}")
    if len(list(tmp_path.iterdir())) < 8:
        pytest.skip("this file system takes these names for one")
    found = look(tmp_path)
    assert len(by_id(found)) == 4
    captions = {example.path.name: example.captions[0] for example in found.examples}
    assert captions == {name: f"caption {index}" for index, name in enumerate(names)}


def test_the_order_of_examples_does_not_depend_on_the_file_system(
    folder: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = make.encode(make.noise())
    root = folder({f"{name}.png": picture for name in ("b", "a", "c", "sub/d")})
    first = [example.id for example in look(root).examples]
    real = os.scandir

    class Reversed:
        def __init__(self, path: Any) -> None:
            with real(path) as listing:
                self.items = sorted(listing, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Any:
            return iter(self.items)

        def __exit__(self, *args: object) -> None:
            pass

    monkeypatch.setattr("emotrain.dataset.walk.os.scandir", Reversed)
    assert [example.id for example in look(root).examples] == first
    assert first == ["data/a.png", "data/b.png", "data/c.png", "data/sub/d.png"]


def test_progress_is_told_of_every_picture(folder: Any, make: Any) -> None:
    root = folder({"a.png": make.encode(make.noise()), "b.png": b"", "c.txt": "x"})
    seen: list[tuple[int, int]] = []
    scan([FolderSpec(path=str(root))], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_thousands_of_files_are_listed_in_seconds(tmp_path: Path, make: Any) -> None:
    data = make.encode(Image.new("RGB", (16, 16)))
    for index in range(1_500):
        (tmp_path / f"{index}.png").write_bytes(data)
        (tmp_path / f"{index}.txt").write_bytes(b"x")
    started = time.perf_counter()
    found = look(tmp_path)
    assert len(found.examples) == 1_500
    assert time.perf_counter() - started < 20


def test_reading_folders_does_not_import_torch(folder: Any, make: Any) -> None:
    root = folder({"a.png": make.encode(make.noise())})
    code = (
        "import sys; from emotrain.dataset.scan import FolderSpec, scan\n"
        "import emotrain.dataset.settings, emotrain.dataset.split, emotrain.dataset.cachedir\n"
        "assert len(scan([FolderSpec(path=sys.argv[1])]).examples) == 1\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
