"""From captions to texts: the trigger first, everything drawn ahead, all by the seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotrain.dataset.captions import EMPTY, fill_trigger, pick, plain, split_tags, variants

TAGS = st.lists(st.sampled_from(["cat", "dog", "red car", "1,000 coins", "sky"]), max_size=6, unique=True)


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a, b", "mika, a, b"),
        ("mika, a, b", "mika, a, b"),
        ("a, mika, b", "mika, a, b"),
        ("mika standing in a park, b", "mika standing in a park, b"),
        ("mikado, b", "mika, mikado, b"),
        ("a photo of mika, b", "mika, a photo of mika, b"),
        ("a photo of [trigger], b", "a photo of mika, b"),
        ("[trigger]", "mika"),
        ("", "mika"),
        (" , ,", "mika"),
        ("A girl, smiling.  She waves", "mika, A girl, smiling. She waves"),
        ("1,000 coins", "mika, 1,000 coins"),
    ],
)
def test_the_trigger_comes_first_and_once(caption: str, text: str) -> None:
    assert plain(caption, trigger="mika") == text


def test_a_trigger_of_several_words_and_tags_is_not_put_twice() -> None:
    assert plain("mika ch, a", trigger="mika ch") == "mika ch, a"
    assert plain("mika, girl, a", trigger="mika, girl") == "mika, girl, a"
    assert plain("a", trigger="mika, girl") == "mika, girl, a"
    assert plain("(:), a", trigger="(:)") == "(:), a"


def test_without_a_trigger_the_caption_stays_and_its_placeholder_goes() -> None:
    assert plain("a, b") == "a, b"
    assert plain("[trigger], a") == "a"
    assert plain("photo of [trigger] there", trigger=None) == "photo of there"
    assert fill_trigger("[trigger], portrait", "mika") == "mika, portrait"
    assert fill_trigger("[trigger], portrait", None) == "portrait"
    assert fill_trigger("[trigger]", None) == ""


@pytest.mark.parametrize(
    ("caption", "prefix", "suffix", "text"),
    [
        ("a", "anime style,", ", best", "mika, anime style, a, best"),
        ("a", "a photo of", "at night", "mika, a photo of a at night"),
        ("", "anime style,", ", best", "mika, anime style, best"),
        ("mika waves", "anime,", "", "mika, anime, mika waves"),
        ("", "", "end", "mika, end"),
    ],
)
def test_prefix_and_suffix_stand_around_the_caption_behind_the_trigger(
    caption: str, prefix: str, suffix: str, text: str
) -> None:
    assert plain(caption, trigger="mika", prefix=prefix, suffix=suffix) == text


@given(TAGS, st.integers(0, 4), st.floats(0, 1), st.integers(0, 5))
def test_shuffle_and_tag_dropout_touch_free_tags_alone(
    tags: list[str], keep: int, tag_dropout: float, seed: int
) -> None:
    texts = variants(
        ", ".join(tags), trigger="mika", shuffle=True, keep_tokens=keep, tag_dropout=tag_dropout, seed=seed
    )
    assert texts[0] == ", ".join(["mika", *tags])
    for text in texts:
        found = split_tags(text)
        assert found[0] == "mika"
        assert found[1 : 1 + keep] == tuple(tags[:keep])
        assert set(found[1:]) <= set(tags)
        assert len(set(found)) == len(found)


def test_shuffle_keeps_every_tag_and_changes_their_order() -> None:
    texts = variants("a, b, c, d, e", trigger="mika", shuffle=True, count=16)
    assert len(texts) == 16
    assert len(set(texts)) > 10
    assert all(sorted(split_tags(text)) == ["a", "b", "c", "d", "e", "mika"] for text in texts)


def test_tag_dropout_leaves_out_its_share() -> None:
    tags = [f"t{i}" for i in range(20)]
    texts = variants(", ".join(tags), tag_dropout=0.3, count=200)
    share = sum(len(split_tags(text)) for text in texts[1:]) / (199 * 20)
    assert share == pytest.approx(0.7, abs=0.03)
    assert all(list(split_tags(t)) == sorted(split_tags(t), key=tags.index) for t in texts)
    assert variants("a, b", trigger="mika", tag_dropout=1.0, count=3) == ("mika, a, b", "mika", "mika")


def test_bars_keep_the_head_and_the_tail() -> None:
    for text in variants("h1, h2 ||| a, b, c, d ||| t1", trigger="mika", shuffle=True, tag_dropout=0.5, count=20):
        found = split_tags(text)
        assert found[:3] == ("mika", "h1", "h2")
        assert found[-1] == "t1"
        assert "|" not in text
    assert plain("h1 ||| a, b") == "h1, a, b"


def test_tags_that_hold_a_placed_trigger_are_never_dropped_or_shuffled() -> None:
    for text in variants("x, photo of [trigger], y", trigger="mika", shuffle=True, tag_dropout=0.9, count=20)[1:]:
        assert text.startswith("photo of mika")
    assert plain("x, photo of [trigger], y", trigger="mika") == "x, photo of mika, y"


def test_wildcards_take_one_word_each_and_all_words_come() -> None:
    texts = variants("a {red|green|blue} {car|{small|big} bus}", count=60)
    assert texts[0] == "a red car"
    assert len(set(texts)) == 9
    assert not any(mark in text for text in texts for mark in "{}|")
    assert variants("a {brace} and {} stay") == ("a {brace} and {} stay",)


def test_wildcards_may_hold_tags() -> None:
    assert set(variants("{a, b|c}", count=20)) == {"a, b", "c"}


def test_what_does_not_vary_is_one_text() -> None:
    assert variants("a, b", count=8) == ("a, b",)
    assert variants("only", trigger="mika", shuffle=True, count=8) == ("mika, only",)
    assert variants("a, b", shuffle=True, keep_tokens=1, count=8) == ("a, b",)
    assert variants(("one", "two")) == ("one", "two")
    assert variants(()) == ("",)


def test_several_captions_have_equal_shares_where_one_of_them_varies() -> None:
    texts = variants(("fixed", "{a|b|c} car"), count=6)
    assert len(texts) == 12
    assert Counter(text == "fixed" for text in texts) == {True: 6, False: 6}


def test_variants_depend_on_the_seed_and_the_caption_alone() -> None:
    options: dict[str, Any] = {"shuffle": True, "count": 8}
    caption = "a, b, c, d, e, f"
    assert variants(caption, seed=1, **options) == variants(caption, seed=1, **options)
    assert variants(caption, seed=1, **options) != variants(caption, seed=2, **options)
    assert variants(caption, seed=3, **options) == (
        "a, b, c, d, e, f", "b, c, d, a, f, e", "c, b, f, e, d, a", "c, e, f, a, b, d",
        "e, d, a, f, b, c", "f, a, e, b, d, c", "b, c, f, e, a, d", "b, c, e, d, f, a",
    )  # fmt: skip


def test_bad_numbers_are_refused() -> None:
    for options in ({"count": 0}, {"keep_tokens": -1}, {"tag_dropout": 1.5}):
        with pytest.raises(ValueError, match="bad count"):
            variants("a", **options)
    with pytest.raises(ValueError, match="n_variants"):
        pick(1, 0, "a", 0)


def test_pick_is_pure_and_shows_all_variants_equally_often() -> None:
    shown = [pick(42, epoch, "data/a.png", 5) for epoch in range(50)]
    assert shown == [pick(42, epoch, "data/a.png", 5) for epoch in range(50)]
    assert Counter(shown) == dict.fromkeys(range(5), 10)
    starts = Counter(pick(42, 0, f"data/{i}.png", 5) for i in range(1000))
    assert min(starts.values()) > 150
    assert [pick(42, epoch, "data/a.png", 5, 0.3) for epoch in range(6)] == [0, 1, EMPTY, 3, 4, EMPTY]


def test_dropout_takes_its_share_of_samples() -> None:
    chosen = [pick(1, visit, f"{name}.png", 3, 0.1) for visit in range(100) for name in range(50)]
    assert Counter(chosen)[EMPTY] / len(chosen) == pytest.approx(0.1, abs=0.015)
    assert all(pick(1, visit, "a", 3, 1.0) == EMPTY for visit in range(20))
    assert all(pick(1, visit, "a", 3, 0.0) != EMPTY for visit in range(20))
