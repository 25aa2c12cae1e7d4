from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from emotrain.observers.sheet import (
    BACKGROUND,
    GAP,
    HEADER,
    LABEL_WIDTH,
    MAX_CELL,
    MISSING,
    choose_steps,
    make_sheet,
    save_sheet,
)

COLOURS = {0: ("red", "lime"), 50: ("blue", "yellow"), 100: ("cyan", "magenta")}


def picture(path: Path, colour: str, size: tuple[int, int] = (64, 64)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def columns(tmp_path: Path) -> dict[int, list[Path]]:
    return {
        step: [picture(tmp_path / f"{step}-{row}.png", colour) for row, colour in enumerate(pair)]
        for step, pair in COLOURS.items()
    }


def box(column: int, row: int, cell: int = 128) -> tuple[int, int, int, int]:
    left = LABEL_WIDTH + GAP + column * (cell + GAP)
    top = HEADER + row * (cell + GAP)
    return left, top, left + cell, top + cell


def ink(sheet: Image.Image, area: tuple[int, int, int, int]) -> int:
    """Pixels that are no background."""
    part = sheet.crop(area)
    plain = Image.new("RGB", part.size, BACKGROUND)
    mask = ImageChops.difference(part, plain).convert("L").point(lambda v: 255 if v else 0)
    return mask.histogram()[255]


def test_columns_are_steps_and_rows_are_prompts(columns: dict[int, list[Path]]) -> None:
    sheet = make_sheet(columns, ["a fox", "a ship"])
    assert sheet.size == (LABEL_WIDTH + 3 * (128 + GAP) + GAP, HEADER + 2 * (128 + GAP) + GAP)
    for column, step in enumerate(sorted(COLOURS)):
        for row, colour in enumerate(COLOURS[step]):
            part = sheet.crop(box(column, row))
            assert part.getcolors() == [(128 * 128, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))]


def test_the_lora_file_is_the_last_column_whatever_the_number_of_steps(
    columns: dict[int, list[Path]], tmp_path: Path
) -> None:
    lora = [picture(tmp_path / f"lora-{row}.png", colour) for row, colour in enumerate(("white", "black"))]
    sheet = make_sheet(columns, ["a fox", "a ship"], lora=lora, max_columns=2)
    assert sheet.size[0] == LABEL_WIDTH + 3 * (128 + GAP) + GAP
    assert [sheet.getpixel(box(2, row)[:2]) for row in (0, 1)] == [(255, 255, 255), (0, 0, 0)]
    assert make_sheet({}, ["a fox", "a ship"], lora=lora).size[0] == LABEL_WIDTH + 128 + 2 * GAP


def test_steps_and_prompts_are_written_beside_the_pictures(
    columns: dict[int, list[Path]],
) -> None:
    sheet = make_sheet(columns, ["a fox", ""], best_step=50)
    for column in range(3):
        left, _, right, _ = box(column, 0)
        assert ink(sheet, (left, 0, right, HEADER)) > 60
    for row in range(2):
        _, top, _, bottom = box(0, row)
        assert ink(sheet, (0, top, LABEL_WIDTH, bottom)) > 60
    green = sheet.crop((*box(1, 0)[:1], 0, box(1, 0)[2], HEADER)).getcolors(10_000)
    assert any(g > r + 60 and g > b + 30 for _, (r, g, b) in green)


@pytest.mark.parametrize("prompt", ["word " * 200, "x" * 900, "日本語 " * 50, "\x1b[2J\n\u202e" * 9])
def test_a_long_or_hostile_prompt_stays_in_its_place(tmp_path: Path, prompt: str) -> None:
    columns = {0: [picture(tmp_path / "a.png", "red"), picture(tmp_path / "b.png", "lime")]}
    quiet = make_sheet(columns, ["a", "b"])
    loud = make_sheet(columns, [prompt, "b"])
    assert loud.size == quiet.size
    changed = ImageChops.difference(quiet, loud).getbbox()
    assert changed is not None
    assert changed[2] <= LABEL_WIDTH
    assert changed[3] <= HEADER + 128 + GAP


def test_tiny_pictures_are_enlarged_without_smoothing_and_large_ones_reduced(
    tmp_path: Path,
) -> None:
    dots = Image.new("RGB", (64, 64), "black")
    dots.putpixel((3, 5), (255, 255, 255))
    dots.save(tmp_path / "dots.png")
    sheet = make_sheet({0: [tmp_path / "dots.png"]}, ["x"]).crop(box(0, 0))
    assert sorted(sheet.getcolors()) == [(4, (255, 255, 255)), (128 * 128 - 4, (0, 0, 0))]
    big = make_sheet({0: [picture(tmp_path / "big.png", "red", (1024, 512))]}, ["x"])
    assert big.size == (LABEL_WIDTH + MAX_CELL + 2 * GAP, HEADER + MAX_CELL // 2 + 2 * GAP)
    wide = make_sheet(
        {0: [picture(tmp_path / "a.png", "red")], 5: [picture(tmp_path / "w.png", "lime", (96, 32))]},
        ["x"],
    )
    assert wide.crop(box(1, 0)).getbbox() is not None


def test_pictures_that_are_missing_or_broken_leave_a_grey_cell(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    columns = {0: [broken, picture(tmp_path / "a.png", "red")], 5: [tmp_path / "gone.png"]}
    sheet = make_sheet(columns, ["x", "y"])
    for column, row in ((0, 0), (1, 0), (1, 1)):
        assert sheet.getpixel(box(column, row)[:2]) == MISSING
    assert sheet.getpixel(box(0, 1)[:2]) == (255, 0, 0)


def test_long_runs_show_evenly_spaced_steps_with_first_last_and_best() -> None:
    steps = list(range(0, 20_001, 50))
    chosen = choose_steps(steps, 24, best_step=4_150)
    assert len(chosen) == 24
    assert chosen[0] == 0
    assert chosen[-1] == 20_000
    assert 4_150 in chosen
    assert chosen == sorted(set(chosen))
    assert choose_steps([0, 5], 24) == [0, 5]
    assert choose_steps(steps, 24, best_step=7) == choose_steps(steps, 24)
    with pytest.raises(ValueError, match="at least 2"):
        choose_steps(steps, 1)


def test_a_sheet_is_saved_in_one_move(tmp_path: Path, columns: dict[int, list[Path]]) -> None:
    path = tmp_path / "samples" / "sheet.png"
    save_sheet(path, columns, ["a", "b"])
    assert save_sheet(path, columns, ["a", "c"]) == path
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="at least one step"):
        save_sheet(path, {}, ["a"])
