"""The page of `lint --html`: hostile text stays text, nothing is fetched, every section is there."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
from html_reading import ALLOWED, HOSTILE, assert_harmless, read
from PIL import Image

from emotrain.cli.app import main
from emotrain.dataset.lint_pictures import preview_of
from emotrain.dataset.lint_types import BucketRow, Finding, FolderRow, PictureRow, Report, TagRow
from emotrain.dataset.ranking import PictureScore
from emotrain.report.lint_page import lint_page
from emotrain.report.pages import environment, render, shown


def hostile_report() -> Report:
    pictures = tuple(
        PictureRow(text, 64, 48, (text, text), (64, 48), 0.1, 0.5, preview_of(Image.new("RGB", (64, 48)), 32))
        for text in HOSTILE
    )
    findings = tuple(Finding(text, "error", text, text, text, (text,)) for text in HOSTILE)
    return Report(
        findings, pictures, (BucketRow(64, 48, 9, 0.1, 0.2),), tuple(TagRow(text, 1, 0.5) for text in HOSTILE),
        (FolderRow(HOSTILE[0], 1, 1), FolderRow(HOSTILE[1], 1, 1)), HOSTILE[0], (64,), HOSTILE[1],
    )  # fmt: skip


def scores() -> list[PictureScore]:
    return [PictureScore(text, "suspicious", 9, 9, 0, 0, 1, 2, 3, 4.0) for text in HOSTILE]


def test_hostile_text_stays_text() -> None:
    elements = read(lint_page(hostile_report(), scores(), title=HOSTILE[1]))
    assert_harmless(elements, ALLOWED)
    for text in HOSTILE[:6]:
        assert elements.text.count(text) >= 4, text


def test_the_page_forbids_everything_but_its_own_pictures_and_style() -> None:
    text = lint_page(hostile_report(), scores())
    policy = next(a["content"] for n, a in read(text).found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert text.encode("utf-8")


def test_one_long_caption_does_not_fill_the_page() -> None:
    assert len(str(shown("x" * 100_000))) < 4100
    rows = (PictureRow("a", 9, 9, ("x" * 100_000,)),)
    assert "x" * 4001 not in lint_page(Report((), rows))


def test_attributes_in_templates_are_quoted_and_none_can_run_or_fetch() -> None:
    """What is escaped for a quoted attribute is not safe in one without quotes, or in one that runs."""
    for name in environment().list_templates(extensions=["html"]):
        source = environment().loader.get_source(environment(), name)[0]  # type: ignore[union-attr]
        assert not re.search(r"=\s*\{\{", source), f"{name} has an attribute without quotes"
        assert not re.search(r"""\son\w+\s*=|\sstyle\s*=|javascript:|\|\s*safe\b""", source), name
        for link in re.findall(r"""\b(?:href|src)="([^"]*)""", source):
            assert link.startswith(("#", "./")) or link.endswith("|data_url }}"), f"{name} links to {link}"


def test_sections_without_content_are_left_out() -> None:
    text = read(lint_page(Report((), totals="3 files"))).text
    assert "Nothing to fix." in text
    for heading in ("Buckets", "Tags", "Folders", "What a run could not learn"):
        assert heading not in text


def test_pictures_with_findings_come_first_and_copies_point_at_each_other() -> None:
    rows = tuple(PictureRow(name, 9, 9, ("",)) for name in ("a", "b", "c"))
    text = read(
        lint_page(Report((Finding("duplicate", "warning", "b", "is the same file as c", None, ("c",)),), rows))
    ).text
    assert text.index("see b: it is the same file as c") < text.rindex("\na\n")


def test_lint_writes_a_page_with_thumbnails_and_never_over_another_file(
    pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report.html"
    for _ in range(2):  # its own page may be written over
        assert main(["lint", str(pictures_dir), "--html", str(target)]) == 0
    elements = read(target.read_text("utf-8"))
    assert sum(name == "img" for name, _ in elements.found) == 3
    assert "a red square, 0" in elements.text
    photo = pictures_dir / "red.png"
    before = photo.read_bytes()
    assert main(["lint", str(pictures_dir), "--html", str(photo)]) == 2
    assert photo.read_bytes() == before
    assert main(["lint", str(pictures_dir), "--html", str(tmp_path / "no" / "a.html")]) == 2
    assert "is not a file that can be written" in capsys.readouterr().err


def test_thumbnails_hold_nothing_of_the_file_but_pixels() -> None:
    image = Image.new("RGB", (900, 300), "red")
    image.info = {"comment": b"secret", "exif": b"secret"}
    small = preview_of(image, 160)
    assert b"secret" not in small
    assert len(small) < 2000


def test_a_page_is_one_document_even_where_lint_found_nothing() -> None:
    text = lint_page(Report(()), title="a < b")
    assert text.startswith("<!doctype html>")
    assert "<title>lint: a &lt; b</title>" in text
    assert text.count("<html") == text.count("</html>") == 1


def test_the_policy_lets_no_script_run_but_the_named_one() -> None:
    text = render("base.html", title="x", script="page.css")
    policy = next(a["content"] for n, a in read(text).found if a.get("http-equiv") == "Content-Security-Policy")
    code = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert str(policy).endswith(f"; script-src 'sha256-{digest}'")
    assert "script-src" not in render("base.html", title="x")
