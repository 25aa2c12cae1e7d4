"""Where captions come from, and what is refused."""

from __future__ import annotations

import codecs
import json
from typing import Any

import pytest

from emotrain.dataset.scan import FolderSpec, Scan, scan


def look(root: Any, **options: Any) -> Scan:
    words = {name: options.pop(name) for name in ("caption_extension", "default_caption") if name in options}
    found = scan([FolderSpec(path=str(root), **options)], **words)
    parts = (len(found.examples), len(found.skipped), found.captions, found.listings, found.hidden)
    assert found.files == sum(parts)
    return found


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (b"a cat", ("a cat",)),
        (b"a cat\r\n", ("a cat",)),
        (b"\xef\xbb\xbfa cat", ("a cat",)),
        (codecs.BOM_UTF16_LE + "a kätzchen".encode("utf-16-le"), ("a kätzchen",)),
        (codecs.BOM_UTF16_BE + "a kätzchen".encode("utf-16-be"), ("a kätzchen",)),
        (b"one\ntwo\r\n\r\n  three  \n", ("one, two, three",)),
        (b"A cat sits.\nIt is red.\n\nThe light is soft.", ("A cat sits. It is red. The light is soft.",)),
        (b"a cat\nit is red\n%%%\na red cat", ("a cat, it is red", "a red cat")),
        (b"<b>[red]\x1b[31m x</b>", ("<b>[red][31m x</b>",)),
        ("日本語, 猫".encode(), ("日本語, 猫",)),
    ],
)
def test_a_caption_file_is_read(folder: Any, make: Any, content: bytes, captions: tuple[str, ...]) -> None:
    found = look(folder({"a.png": make.encode(make.noise()), "a.txt": content}))
    assert found.examples[0].captions == captions
    assert found.examples[0].caption_source == "file"


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf"])
def test_an_empty_caption_file_is_an_empty_caption_with_a_note(folder: Any, make: Any, content: bytes) -> None:
    found = look(folder({"a.png": make.encode(make.noise()), "a.txt": content}), default_caption="x")
    assert found.examples[0].captions == ("",)
    assert [note.code for note in found.examples[0].notes] == ["caption-empty"]


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("a café".encode("latin-1"), "caption-encoding", "is not UTF-8: byte 5 is 0xe9"),
        (b"a\0b", "caption-encoding", "NUL at character 1"),
        ("a cat".encode("utf-16-le"), "caption-encoding", "NUL"),
        (codecs.BOM_UTF16_LE + b"a", "caption-encoding", "is not UTF-16"),
        (b"x" * 1_000_000, "caption-too-large", "larger than 65,536 bytes"),
    ],
)
def test_a_caption_that_cannot_be_used_is_an_error_that_says_where(
    folder: Any, make: Any, content: bytes, code: str, words: str
) -> None:
    root = folder({"a.png": make.encode(make.noise()), "a.txt": content})
    (item,) = look(root).skipped
    assert (item.code, item.severity) == (code, "error")
    assert item.path.name == "a.png"
    assert "a.txt" in item.reason
    assert words in item.reason


def test_captions_are_looked_for_in_order(folder: Any, make: Any) -> None:
    picture = make.encode(make.noise())
    listing = "\n".join(json.dumps({"file_name": f"{name}.png", "text": f"listed {name}"}) for name in "abc")
    files = {
        "a.png": picture, "a.txt": "from txt", "a.caption": "from caption",
        "b.png": picture, "b.caption": "from caption",
        "c.png": picture, "red_car-02 (1).png": picture,
        "metadata.jsonl": listing,
    }  # fmt: skip
    root = folder(files)
    found = look(root, caption="for all")
    assert [(e.captions[0], e.caption_source) for e in found.examples] == [
        ("from txt", "file"), ("from caption", "file"), ("listed c", "metadata"), ("for all", "folder"),
    ]  # fmt: skip
    assert found.listings == 1
    last = look(root, default_caption="a picture of a [name]").examples[-1]
    assert (last.captions, last.caption_source) == (("a picture of a red car",), "default")
    last = look(root).examples[-1]
    assert (last.captions, last.caption_source) == (("",), "none")
    assert [note.code for note in last.notes] == ["caption-missing"]


def test_another_caption_extension_is_the_only_one_then(folder: Any, make: Any) -> None:
    picture = make.encode(make.noise())
    root = folder({"a.png": picture, "a.tags": "tags", "a.txt": "text", "b.png": picture, "b.TAGS": "B"})
    found = look(root, caption_extension="tags")
    assert [example.captions for example in found.examples] == [("tags",), ("B",)]
    assert {item.path.name: item.code for item in found.skipped} == {"a.txt": "other-file"}


def test_a_listing_reaches_subfolders_and_names_what_is_missing(folder: Any, make: Any) -> None:
    picture = make.encode(make.noise())
    lines = [
        {"file_name": "train/a.png", "text": ["one", "two"], "extra": 1},
        {"file_name": "train\\b.png", "caption": "three\nlines"},
        {"file_name": "../../etc/passwd", "text": "x"},
        {"file_name": "train/gone.png", "text": "x"},
        {"file_name": "train/c.png"},
    ]
    text = "\n\n".join(json.dumps(line) for line in lines)
    root = folder({f"train/{name}.png": picture for name in "abc"} | {"metadata.jsonl": text})
    found = look(root)
    assert [example.captions for example in found.examples] == [("one", "two"), ("three lines",), ("",)]
    assert [path.name for path in found.listed_missing] == ["passwd", "gone.png"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "is not JSON in line 2"),
        ('["a"]', "has no `file_name` in line 2"),
        ('{"file_name": 3}', "has no `file_name` in line 2"),
        ('{"file_name": "a.png", "text": 7}', "`text` in line 2"),
        ('{"file_name": "a.png", "text": "a\\u0000b"}', "NUL in line 2"),
        ("[" * 100_000, "is not JSON in line 2"),
    ],
)
def test_a_bad_listing_is_refused_by_line(folder: Any, make: Any, line: str, words: str) -> None:
    text = '{"file_name": "b.png", "text": "x"}\n' + line
    found = look(folder({"a.png": make.encode(make.noise()), "metadata.jsonl": text}))
    (item,) = found.skipped
    assert (item.code, item.severity) == ("metadata", "error")
    assert words in item.reason
