from __future__ import annotations

import pytest
from rich.cells import cell_len

from emotrain.observers.lines import crop, join, pad, spread, width_of, wrap
from emotrain.observers.text import (
    ascii_only,
    clean,
    duration,
    fit,
    fit_path,
    middle,
    number,
    speed,
)

HOSTILE = [
    "\x1b[2J\x1b[31mred\x07",
    "a\u202eb\u2066c\u200b\ufeffd",
    "日本語の名前" * 20,
    "line\nbreak\ttab\r\x0bx\u2028y\x85z",
    "a" + "\u0301" * 50,
    "[bold]markup[/bold] [/]",
    "👩\u200d👩\u200d👧 ✌\ufe0f " * 10,
    "\ud800 lone surrogate",
    "\x9b31m C1 control",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_clean_leaves_no_character_that_moves_the_cursor(text: str) -> None:
    shown = clean(text)
    forbidden = "\x1b\x07\x9b\n\r\t\u202e\u2066\u200b\ufeff\u200d\u2028\x85\ud800"
    assert not set(shown) & set(forbidden)
    assert all(char.isprintable() for char in shown)


def test_clean_keeps_at_most_two_marks_on_a_character_and_leaves_words_alone() -> None:
    assert len(clean("x" + "\u0334" * 50)) == 3
    assert clean("naïve Ünïcode 日本 שלום [b]") == "naïve Ünïcode 日本 שלום [b]"
    assert clean("a\nb\tc") == "a b c"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("width", [0, 1, 2, 3, 7, 40])
def test_cut_text_never_takes_more_cells_than_asked(text: str, width: int) -> None:
    shown = clean(text)
    assert cell_len(fit(shown, width)) <= width
    assert cell_len(fit_path(shown, width)) <= width
    assert width_of(crop([(shown, ""), (shown, "bar")], width)) <= width
    assert width_of(pad([(shown, "")], width)) == width
    assert all(cell_len(line) <= max(width, 2) for line in wrap(shown, width))


def test_a_path_is_cut_at_its_start_and_text_at_its_end() -> None:
    assert fit_path("/a/very/long/folder/sheet.png", 12) == "…r/sheet.png"
    assert fit("a long sentence", 8) == "a long …"


def test_wrapped_text_loses_no_word() -> None:
    text = "the validation loss has not fallen for three validations"
    assert " ".join(wrap(text, 12)) == text
    assert "".join(wrap("x" * 30, 7)) == "x" * 30


def test_lines_are_spread_and_joined_within_their_width() -> None:
    assert width_of(spread([("left", "")], [("right", "")], 20)) == 20
    assert spread([("left", "")], [("right", "")], 8) == [("left", "")]
    line = join([[("aaaa", "")], [("bbbbbbbb", "")], [("cc", "")]], 9)
    assert "".join(text for text, _ in line) == "aaaa  cc"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (754, "12:34"), (3723, "1:02:03"), (273900, "3d 04:05")],
)
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_figures_have_a_form_for_every_float() -> None:
    assert number(0.12345) == "0.1235"
    assert number(0.2, signed=True) == "+0.2000"
    assert number(2.5e-6) == "2.50e-06"
    assert number(float("nan")) == "nan"
    assert number(float("-inf")) == "-inf"
    assert number(None) == "-"
    assert duration(float("inf")) == "-"


def test_speed_turns_round_below_one_step_a_second() -> None:
    assert speed(0.2) == "5.00 it/s"
    assert speed(3.0) == "3.00 s/it"
    assert speed(0.0) == speed(None) == speed(float("nan")) == "- it/s"


def test_the_median_ignores_one_slow_step() -> None:
    assert middle([0.2, 0.2, 50.0]) == 0.2
    assert middle([1.0, 3.0]) == 2.0
    assert middle([]) is None


def test_ascii_text_keeps_the_meaning_of_dashes() -> None:
    assert ascii_only("0:10–0:20 …") == "0:10-0:20 ~"
    assert ascii_only("日本").isascii()
