"""Caption files are changed where they are asked to be, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotrain.dataset.captions import split_tags
from emotrain.dataset.edit_captions import BOMS, Edits, edit_bytes, edit_text, text_of
from emotrain.dataset.textfile import FileProblem

HERE = Path("a.txt")


@pytest.mark.parametrize(
    ("before", "edits", "after"),
    [
        ("smile, red hair, 1girl\n", Edits(remove=["red hair"]), "smile, 1girl\n"),
        ("smile, red hair, 1girl\n", Edits(remove=["Smile"]), "red hair, 1girl\n"),
        ("smile, red hair, 1girl", Edits(remove=["1girl"]), "smile, red hair"),
        ("smile,red  hair,1girl", Edits(remove=["red hair"]), "smile,1girl"),
        ("smile", Edits(remove=["smile"]), ""),
        ("a, smile, smile, b", Edits(remove=["smile"]), "a, b"),
        ("mika, smile ||| b, c", Edits(remove=["smile"]), "mika ||| b, c"),
        ("mika ||| smile, c", Edits(remove=["smile"]), "mika ||| c"),
        ("smiles, a smile", Edits(remove=["smile"]), "smiles, a smile"),
        ("1,000 birds, sky", Edits(remove=["1"]), "1,000 birds, sky"),
        ("a, b\n", Edits(add=["c"]), "a, b, c\n"),
        ("a, c, b", Edits(add=["C"]), "a, c, b"),
        ("A woman in a park.", Edits(add=["soft light"]), "A woman in a park. soft light"),
        ("", Edits(add=["a", "b"]), "a, b"),
        ("\n", Edits(add=["a"]), "a\n"),
        ("a, b, c", Edits(move=[("c", 1)]), "c, a, b"),
        ("a, b, c", Edits(move=[("a", -1)]), "b, c, a"),
        ("a, b, c", Edits(move=[("a", 2)]), "b, a, c"),
        ("a, b, c", Edits(move=[("a", 99), ("x", 1)]), "b, c, a"),
        ("a, b", Edits(trigger="mika"), "mika, a, b"),
        ("a, Mika, b", Edits(trigger="mika"), "Mika, a, b"),
        ("mika standing, b", Edits(trigger="mika"), "mika standing, b"),
        ("mikado, b", Edits(trigger="mika"), "mika, mikado, b"),
        ("a photo of [trigger]", Edits(trigger="mika"), "a photo of [trigger]"),
        ("brown hair, brown eyes", Edits(replace=[("brown", "red"), ("red eyes", "blue eyes")]), "red hair, blue eyes"),
        ("a, b", Edits(replace=[("b", "watermark")], remove=["watermark"]), "a"),
        ("a\n%%%\nb\n", Edits(trigger="m"), "m, a\n%%%\nm, b\n"),
        ("a\r\n%%%\r\nb, c\r\n", Edits(remove=["b"], add=["d"]), "a, d\r\n%%%\r\nc, d\r\n"),
        ("a,\nb\nc", Edits(remove=["b"]), "a\nc"),
        ("%%%\na", Edits(trigger="m"), "%%%\nm, a"),
        ("été, 猫 耳", Edits(remove=["ÉTÉ"], add=["🎈"]), "猫 耳, 🎈"),
    ],
)
def test_an_edit_does_what_it_says(before: str, edits: Edits, after: str) -> None:
    assert edit_text(before, edits) == after
    assert edit_text(after, edits) == after  # once is enough


@given(st.text(alphabet=st.sampled_from("ab ,|%\n\r\t.1é🎈"), max_size=40))
def test_what_is_not_asked_for_stays_to_the_letter(text: str) -> None:
    assert edit_text(text, Edits()) == text
    assert edit_text(text, Edits(remove=["zzz"], move=[("zzz", 1)], replace=[("zzz", "y")])) == text


@given(
    st.lists(st.sampled_from(["a", "b c", "1,000", "d"]), min_size=1, max_size=5), st.sampled_from(["a", "b c", "x"])
)
def test_adding_and_removing_are_each_others_reverse_in_the_tags(tags: list[str], tag: str) -> None:
    text = ", ".join(tags)
    added = split_tags(edit_text(text, Edits(add=[tag])))
    assert added == (tuple(tags) if tag in tags else (*tags, tag))
    assert split_tags(edit_text(text, Edits(remove=[tag]))) == tuple(one for one in tags if one != tag)


@pytest.mark.parametrize(("bom", "encoding"), [*BOMS, (b"", "utf-8")])
def test_encoding_and_byte_order_mark_stay(bom: bytes, encoding: str) -> None:
    data = bom + "café, watermark\r\n".encode(encoding)
    after = edit_bytes(data, Edits(remove=["watermark"]), HERE)
    assert after == bom + "café\r\n".encode(encoding)
    assert text_of(after) == "café\r\n"


def test_a_file_that_is_not_text_is_named() -> None:
    with pytest.raises(FileProblem, match="is not UTF-8: byte 1 is 0xff"):
        edit_bytes(b"a\xff", Edits(add=["b"]), HERE)
