"""Folders as people bring them from other trainers and systems: nothing is dropped or learned without a word."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emotrain.config.schema import Folder
from emotrain.dataset.captions import split_tags, variants
from emotrain.dataset.lint import lint
from emotrain.dataset.scan import Scan, require_pictures, scan
from emotrain.errors import DatasetError

WHITE = Image.new("L", (96, 64), 255)


def look(root: Path, **options: Any) -> Scan:
    return scan([Folder(path=str(root), **options)])


def captions(found: Scan) -> dict[str, tuple[str, ...]]:
    return {example.path.name: example.captions for example in found.examples}


def codes(found: Scan) -> set[str]:
    return {finding.code for finding in lint(found, workers=1).findings}


@pytest.fixture
def picture(make: Any) -> bytes:
    data: bytes = make.encode(make.noise())
    return data


def test_a_name_from_a_mac_finds_its_caption(folder: Any, picture: bytes) -> None:
    nfd, nfc = unicodedata.normalize("NFD", "caf\u00e9"), unicodedata.normalize("NFC", "caf\u00e9")
    found = look(folder({f"{nfd}.png": picture, f"{nfc}.txt": "a cup"}))
    assert list(captions(found).values()) == [("a cup",)]
    assert not found.skipped


def test_a_caption_named_after_the_whole_file_name_is_taken(folder: Any, picture: bytes) -> None:
    assert captions(look(folder({"a.png": picture, "a.png.txt": "a cup"}))) == {"a.png": ("a cup",)}


def test_capitals_do_not_part_a_picture_from_its_caption_unless_two_could_be_meant(folder: Any, picture: bytes) -> None:
    assert captions(look(folder({"IMG_1.PNG": picture, "img_1.txt": "a cup"}))) == {"IMG_1.PNG": ("a cup",)}


def test_a_table_of_captions_is_read(folder: Any, picture: bytes) -> None:
    table = 'file_name,text\na.png,"a cup, red"\nb.png,a plate\n'
    found = look(folder({"a.png": picture, "b.png": picture, "metadata.csv": table}))
    assert captions(found) == {"a.png": ("a cup, red",), "b.png": ("a plate",)}


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({"caption": "a cup"}, "a cup"),
        ({"tags": ["cup", "red"]}, "cup, red"),
        ({"tag_string": "red_cup table"}, "red_cup, table"),
    ],
)
def test_a_json_beside_a_picture_is_its_caption(folder: Any, picture: bytes, held: Any, expected: str) -> None:
    assert captions(look(folder({"a.png": picture, "a.json": json.dumps(held)}))) == {"a.png": (expected,)}


def test_a_listing_whose_key_is_not_known_is_an_error_that_names_it(folder: Any, picture: bytes) -> None:
    found = look(folder({"a.png": picture, "metadata.jsonl": '{"file_name": "a.png", "additional_feature": "a cup"}'}))
    [problem] = found.errors()
    assert "additional_feature" in problem.reason


def test_a_run_inside_the_data_is_no_data(folder: Any, picture: bytes) -> None:
    root = folder({"a.png": picture, "runs/x/run.json": "{}", "runs/x/samples/s.png": picture})
    found = look(root)
    assert len(found.examples) == 1
    assert [item.code for item in found.skipped] == ["run-folder"]


def test_a_folder_that_is_named_0_is_left_out_with_a_word(folder: Any, picture: bytes, tmp_path: Path) -> None:
    found = look(folder({"a.png": picture, "0_old/b.png": picture}))
    assert len(found.examples) == 1
    assert [item.code for item in found.skipped] == ["zero-repeats"]
    alone = tmp_path / "alone" / "0_old"
    alone.mkdir(parents=True)
    (alone / "b.png").write_bytes(picture)
    with pytest.raises(DatasetError, match="no usable picture"):
        require_pictures(look(alone.parent))


def test_regularisation_pictures_alone_are_refused(folder: Any, picture: bytes) -> None:
    with pytest.raises(DatasetError, match="regularisation pictures"):
        require_pictures(look(folder({"a.png": picture}), prior=0.5))


def test_a_mask_beside_its_picture_is_a_mask_and_no_picture(folder: Any, make: Any, picture: bytes) -> None:
    found = look(folder({"a.png": picture, "a-masklabel.png": make.encode(WHITE), "b.png": picture}))
    assert {example.path.name: bool(example.mask) for example in found.examples} == {"a.png": True, "b.png": False}
    assert "1 of 2 pictures have masks" in found.totals()


def test_a_picture_that_is_only_named_like_a_mask_stays_a_picture(folder: Any, picture: bytes) -> None:
    assert len(look(folder({"a-masklabel.png": picture})).examples) == 1


def test_the_picture_folder_as_mask_folder_is_refused(folder: Any, picture: bytes) -> None:
    root = folder({"a.png": picture})
    with pytest.raises(DatasetError, match="mask itself"):
        look(root, mask=str(root))


@pytest.mark.parametrize("name", ["a.png", "a_mask.png", "a-mask.png", "a-masklabel.png"])
def test_masks_are_found_by_the_endings_in_use_and_others_are_named(
    tmp_path: Path, make: Any, picture: bytes, name: str
) -> None:
    for part, files in (("data", {"a.jpg": make.encode(make.noise(), "JPEG")}), ("masks", {name: 0, "odd.png": 0})):
        (tmp_path / part).mkdir()
        for each, data in files.items():
            (tmp_path / part / each).write_bytes(data or make.encode(WHITE))
    found = look(tmp_path / "data", mask=str(tmp_path / "masks"))
    assert found.examples[0].mask == tmp_path / "masks" / name
    assert [(item.code, item.path.name) for item in found.skipped] == [("unused-mask", "odd.png")]


def test_black_and_damaged_masks_are_errors_and_one_drawn_in_transparency_is_read(
    tmp_path: Path, make: Any, picture: bytes
) -> None:
    drawn = Image.new("RGBA", (96, 64), (0, 0, 0, 0))
    drawn.paste((0, 0, 0, 255), (10, 10, 60, 50))
    masks = {
        "black": make.encode(Image.new("L", (96, 64), 0)), "cut": make.encode(make.noise())[:900],
        "drawn": make.encode(drawn), "good": make.encode(WHITE),
    }  # fmt: skip
    for part in ("data", "masks"):
        (tmp_path / part).mkdir()
    for name, data in masks.items():
        (tmp_path / "data" / f"{name}.png").write_bytes(make.encode(make.noise(seed=len(name))))
        (tmp_path / "masks" / f"{name}.png").write_bytes(data)
    report = lint(look(tmp_path / "data", mask=str(tmp_path / "masks")), workers=1)
    wrong = {finding.file: finding.code for finding in report.findings if finding.severity == "error"}
    assert wrong == {"data/black.png": "mask-black", "data/cut.png": "mask-damaged"}


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("score_9,1girl", ("score_9", "1girl")),
        ("1girl,2boys,3d", ("1girl", "2boys", "3d")),
        ("1,000 coins, gold", ("1,000 coins", "gold")),
        ("a wall of 12,345,678 bricks,red", ("a wall of 12,345,678 bricks", "red")),
        ("3,4", ("3", "4")),
    ],
)
def test_a_comma_parts_tags_and_not_thousands(text: str, tags: tuple[str, ...]) -> None:
    assert split_tags(text) == tags


@pytest.mark.parametrize("caption", ["1girl,mika2,3d", "Mika2, 1girl, 3d", "1girl, MIKA2, 3d"])
def test_the_trigger_is_never_doubled(caption: str) -> None:
    [text] = variants(caption, trigger="mika2")
    assert text == "mika2, 1girl, 3d"


def test_captions_made_to_be_slow_are_not() -> None:
    import time

    started = time.monotonic()
    for caption in ("{" + "|" * 60_000, "{a|b" * 12_000, "mika " * 7_000, ", " * 30_000, "1,000" * 10_000):
        variants(caption, trigger="mika", shuffle=True, tag_dropout=0.1, count=2)
    assert time.monotonic() - started < 5
