"""What lint says of captions: the trigger, tags that it will absorb, length, repetition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emotrain.dataset.examples import Example
from emotrain.dataset.lint_captions import caption_findings, tag_table
from emotrain.dataset.lint_tokens import TokenCounter, estimate_tokens, estimator, tokenizer_in
from emotrain.dataset.lint_types import Finding

BY_WORD = TokenCounter(lambda text: len(text.split()), 6, exact=True)


def examples(captions: list[str], *, prior: bool = False) -> list[Example]:
    return [
        Example(
            f"data/{k}.png", Path(f"{k}.png"), 64, 64, (text,), str(k), 1,
            prior=prior, caption_source="file" if text else "none",
        )
        for k, text in enumerate(captions)
    ]  # fmt: skip


def findings(captions: list[str], trigger: str | None = None, tokens: TokenCounter | None = None) -> list[Finding]:
    return caption_findings(examples(captions), trigger=trigger, tokens=tokens or estimator())


def codes(found: list[Finding]) -> set[str]:
    return {finding.code for finding in found}


def test_a_trigger_missing_in_some_captions_is_named_with_the_files() -> None:
    texts = ["mika_ch, a hat", "a dog", "Mika_ch on a bike", "mika_cheese", "[trigger] asleep"]
    (found,) = findings(texts, "mika_ch")
    assert (found.code, found.severity) == ("trigger-missing", "info")
    assert found.message == "has the trigger `mika_ch` in 3 of 5 captions"
    assert found.others == ("data/1.png", "data/3.png")


@pytest.mark.parametrize("texts", [["a", "b", "c", "d", "e"], ["mika_ch, a", "mika_ch, b"]])
def test_a_trigger_in_all_captions_or_in_none_is_as_it_should_be(texts: list[str]) -> None:
    assert findings(texts, "mika_ch") == []


def test_a_first_tag_of_nearly_all_captions_is_taken_for_a_forgotten_trigger() -> None:
    (found,) = findings(["ohwx, hat", "ohwx, dog", "ohwx, cat", "ohwx, sun", "moon"])
    assert (found.code, found.severity, found.others) == ("trigger-missing", "warning", ("data/4.png",))
    assert findings(["ohwx, hat", "ohwx, dog", "sun", "moon", "star"]) == []


def test_a_tag_in_nearly_every_caption_fuses_with_the_trigger() -> None:
    texts = [f"mika_ch, white background, {word}" for word in ("hat", "dog", "sun", "cup")] + ["mika_ch, tree"]
    (found,) = findings(texts, "mika_ch")
    assert found.code == "tag-fuses"
    assert found.message == "has `white background` in 4 of 5 captions: it may be absorbed by the trigger"
    assert findings([*texts, "mika_ch, car"], "mika_ch") == []  # 4 of 6 are less than 80 %


def test_words_are_counted_where_captions_are_sentences() -> None:
    texts = [
        f"a photograph that shows mika standing in front of a {word} at the window"
        for word in ("cat", "dog", "sun", "cup", "hat")
    ]
    fused = {finding.message.split("`")[1] for finding in findings(texts, "mika")}
    assert fused == {"photograph", "standing", "front", "window"}


def test_regularisation_captions_do_not_count_for_the_shares() -> None:
    own = examples(["mika_ch, hat", "mika_ch, dog"])
    prior = examples([f"a girl, blue sky, {k}" for k in range(9)], prior=True)
    assert caption_findings([*own, *prior], trigger="mika_ch", tokens=estimator()) == []


def test_a_caption_that_is_too_long_says_what_is_not_read() -> None:
    (found,) = findings(["one two three four five six seven eight"], tokens=BY_WORD)
    assert found.message == "has a caption of 8 tokens, and 6 fit"
    assert found.hint == "this end of it is not read: `seven eight`"
    (with_trigger,) = findings(["one two three four five six"], "t", BY_WORD)
    assert with_trigger.hint == "this end of it is not read: `six`"
    assert findings(["one two three four five six"], tokens=BY_WORD) == []


def test_one_caption_on_most_pictures_is_noted() -> None:
    (found,) = findings(["a cat"] * 5 + ["a dog", "a sun"])
    assert (found.code, found.severity, len(found.others)) == ("caption-repeated", "info", 5)
    assert codes(findings(["mika_ch"] * 6, "mika_ch")) == set()


def test_hostile_captions_lose_their_control_characters_in_messages() -> None:
    found = findings(["\u202e<b>\x1b[31m</b>", "caf\u00c3\u00a9\u202e"])
    assert codes(found) == {"caption-markup", "caption-mojibake"}
    assert all(text.isprintable() for finding in found for text in (finding.message, finding.hint or ""))


def test_the_tag_table_counts_pictures_and_not_mentions() -> None:
    rows = tag_table(examples(["Hat, hat, ||| dog", "hat, cat", ""]))
    assert [(row.tag, row.count, row.share) for row in rows] == [("hat", 2, 1.0), ("cat", 1, 0.5), ("dog", 1, 0.5)]


@pytest.mark.parametrize(
    ("text", "exact"),  # counted with CLIP's own vocabulary
    [
        ("masterpiece, best quality, 1girl, solo, long hair, blue eyes, smile, looking at viewer, hatsune miku", 23),
        ("inkmoji, auto rickshaw, black ink on white, flat icon", 15),
        ("(best quality:1.2), [blurry], <lora:foo:0.8>, 8k uhd, 35mm f/1.8, hdr", 37),
        (
            "\u043a\u0440\u0430\u0441\u0438\u0432\u044b\u0439 \u043a\u043e\u0442",
            12,
        ),
    ],
)
def test_the_estimate_is_near_the_count(text: str, exact: int) -> None:
    assert estimate_tokens(text) == pytest.approx(exact, rel=0.2)


def test_a_tokenizer_folder_is_counted_with(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 32}', encoding="utf-8")
    counter = tokenizer_in(tmp_path)
    assert counter is not None
    assert (counter.exact, counter.room) == (True, 30)
    assert [counter.count(text) for text in ("cat", "CAT cat", "cats", "dog", "cat, 12", "")] == [1, 2, 3, 3, 4, 0]


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"model": {"merges": [1]}}', '{"model": null}'])
def test_a_tokenizer_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert tokenizer_in(tmp_path) is None
    assert tokenizer_in(tmp_path / "nothing") is None


def test_the_builtin_models_tokenizer_counts_as_transformers_does() -> None:
    from emotrain.families.table import ASSETS

    folder = ASSETS / "tiny-sd" / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the built-in model is not there")
    tokenizers = pytest.importorskip("tokenizers")
    oracle, counter = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), tokenizer_in(folder)
    assert counter is not None
    model_length = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["model_max_length"]
    assert counter.room == model_length - 2
    for text in (
        "inkmoji, auto rickshaw",
        "Hatsune_Miku (vocaloid), 8k don't",
        "caf\u00e9 \u732b \U0001f600",
        "a  b\tc",
    ):
        assert counter.count(text) == len(oracle.encode(text, add_special_tokens=False).ids), text
