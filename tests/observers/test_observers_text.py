from __future__ import annotations

import pytest

from emotrain.observers.text import (
    clean,
    duration,
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
