"""Each finding about sharpness, size, balance, copies and tags, where it belongs and not where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from emotrain.cli.app import main
from emotrain.config.schema import Folder
from emotrain.dataset.buckets import BucketRules
from emotrain.dataset.lint import LintSettings, lint
from emotrain.dataset.lint_types import Finding, Report
from emotrain.dataset.scan import scan


def picture(width: int = 256, height: int = 256, seed: int = 0, block: int = 10) -> Image.Image:
    """Coloured blocks with hard edges that hardly meet the 8-pixel grid of JPEG."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // block + 1, width // block + 1, 3), np.uint8)
    size = (blocks.shape[1] * block, blocks.shape[0] * block)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).crop((0, 0, width, height))


def write(root: Path, images: dict[str, Image.Image], caption: str = "a thing, {name}") -> Path:
    for name, image in images.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        path.with_suffix(".txt").write_text(caption.format(name=path.stem), encoding="utf-8")
    return root


def look(root: Path, resolution: int = 256, held_out: Path | None = None, **rules: Any) -> Report:
    settings = LintSettings(rules=BucketRules((resolution,), 64, **rules))
    held = None if held_out is None else scan((Folder(path=str(held_out)),))
    return lint(scan((Folder(path=str(root)),)), settings, held_out=held)


def of(report: Report, code: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.code == code]


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_blurred_picture_is_found_and_a_sharp_one_not(tmp_path: Path, kind: str) -> None:
    images = {
        f"sharp.{kind}": picture(),
        f"soft.{kind}": picture(seed=1, block=70).filter(ImageFilter.GaussianBlur(16)),
        f"antialiased.{kind}": picture(512, 512, 3).resize((256, 256), Image.Resampling.LANCZOS),
    }
    found = {finding.file for finding in of(look(write(tmp_path / "data", images)), "blurred")}
    assert found == {f"data/soft.{kind}"}


def test_a_picture_that_was_enlarged_many_times_is_found(tmp_path: Path) -> None:
    image = picture(32, 32, 2, 8).resize((1024, 1024), Image.Resampling.BICUBIC)
    (found,) = of(look(write(tmp_path / "data", {"a.png": image})), "blurred")
    assert found.message.startswith("is blurred, or was enlarged: its sharpest edges are about")


def test_a_sharp_subject_before_a_blurred_background_is_not_blurred(tmp_path: Path) -> None:
    image = picture().filter(ImageFilter.GaussianBlur(8))
    image.paste(picture(128, 128, 1), (64, 64))
    assert of(look(write(tmp_path / "data", {"a.png": image})), "blurred") == []


def test_a_large_picture_is_measured_at_its_own_pixels(tmp_path: Path) -> None:
    images = {
        "sharp.png": picture(1500, 1100),
        "soft.png": picture(1500, 1100, 1, 42).filter(ImageFilter.GaussianBlur(10)),
    }
    found = {finding.file for finding in of(look(write(tmp_path / "data", images)), "blurred")}
    assert found == {"data/soft.png"}


def test_a_nearly_blank_picture_is_found_and_a_drawing_on_white_not(tmp_path: Path) -> None:
    drawing, speck = Image.new("RGB", (256, 256), "white"), Image.new("RGB", (256, 256), "black")
    drawing.paste("black", (100, 100, 130, 130))
    speck.paste("white", (10, 10, 12, 12))
    report = look(write(tmp_path / "data", {"drawing.png": drawing, "speck.png": speck}))
    assert [(finding.file, finding.severity) for finding in of(report, "blank")] == [("data/speck.png", "warning")]


def test_a_heavy_crop_says_where_and_how_much(tmp_path: Path) -> None:
    images = {"wide.png": picture(800, 200), "square.png": picture(256, 256, 1)}
    report = look(write(tmp_path / "data", images), min_side=192, max_side=384)
    (found,) = of(report, "heavy-crop")
    assert (found.file, found.severity) == ("data/wide.png", "warning")
    assert "at left and right" in found.message
    (tall,) = of(
        look(write(tmp_path / "tall", {"tall.png": picture(200, 800)}), min_side=192, max_side=384), "heavy-crop"
    )
    assert "at top and bottom" in tall.message


def test_a_picture_below_the_resolution_says_what_becomes_of_it(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {"small.png": picture(170, 170), "enough.png": picture(200, 200, 1)})
    (kept,) = of(look(root), "below-resolution")
    assert kept.file == "data/small.png"
    assert kept.message.endswith("too small for 256: trained at 128 x 128")
    (enlarged,) = of(look(root, upscale=True), "below-resolution")
    assert enlarged.message.endswith("enlarged 1.5 times")


def test_a_leak_is_found_to_the_byte_and_nearly(tmp_path: Path) -> None:
    train = write(tmp_path / "train", {"a.png": picture(), "b.png": picture(seed=1), "c.png": picture(seed=2)})
    held = write(tmp_path / "held", {"same.png": picture(), "other.png": picture(seed=3)})
    picture(seed=1).crop((4, 4, 250, 252)).resize((200, 200)).convert("RGB").save(held / "near.jpg", quality=80)
    found = {finding.file: finding for finding in of(look(train, held_out=held), "leak")}
    assert {name: finding.others for name, finding in found.items()} == {
        "train/a.png": ("held/same.png",), "train/b.png": ("held/near.jpg",),
    }  # fmt: skip
    assert {finding.severity for finding in found.values()} == {"warning"}


def test_a_damaged_held_out_picture_is_an_error(tmp_path: Path) -> None:
    train = write(tmp_path / "train", {"a.png": picture()})
    held = write(tmp_path / "held", {"b.png": picture(seed=1), "c.jpg": picture(seed=2)})
    (held / "c.jpg").write_bytes((held / "c.jpg").read_bytes()[:-900])
    report = look(train, held_out=held)
    assert [(f.file, f.severity) for f in of(report, "damaged")] == [("held/c.jpg", "error")]


def folders(*specs: tuple[Path, dict[str, Any]]) -> Report:
    found = scan(tuple(Folder(path=str(path), **words) for path, words in specs))
    return lint(found, LintSettings(rules=BucketRules((64,), 8)))


def test_unbalanced_folders_are_named_with_the_repeats_that_mend_it(tmp_path: Path) -> None:
    many = write(tmp_path / "many", {f"{k}.png": picture(64, 64, k) for k in range(12)})
    few = write(tmp_path / "few", {f"{k}.png": picture(64, 64, 50 + k) for k in range(2)})
    (found,) = of(folders((many, {}), (few, {})), "folders-unbalanced")
    assert found.message == "shows many 12 times an epoch and few 2 times: the first will rule"
    assert found.hint == "if all folders matter alike, write `dataset.balance: equal`"
    assert of(folders((many, {}), (few, {"repeats": 6})), "folders-unbalanced") == []
    assert of(folders((many, {"prior": 1.0}), (few, {})), "folders-unbalanced") == []


def test_n_name_subfolders_are_balanced_by_their_repeats(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {f"1_many/{k}.png": picture(64, 64, k) for k in range(12)})
    write(root, {f"6_few/{k}.png": picture(64, 64, 50 + k) for k in range(2)})
    assert of(folders((root, {})), "folders-unbalanced") == []


@pytest.fixture
def with_regularisation(tmp_path: Path) -> Path:
    """A preset with 6 pictures that have the trigger and 6 regularisation pictures that must not have it."""
    write(tmp_path / "own", {f"{k}.png": picture(64, 64, k) for k in range(6)}, "mika_ch, red hat, {name}")
    write(tmp_path / "reg", {f"{k}.png": picture(64, 64, 50 + k) for k in range(6)}, "a girl, {name}")
    path = tmp_path / "p.yaml"
    path.write_text(
        "model: builtin:tiny-sd\n"
        "dataset: {trigger: mika_ch, resolution: 64, folders: [./own, {path: ./reg, prior: 1.0}]}\n"
    )
    return path


def test_regularisation_pictures_need_no_trigger_and_dilute_no_share(
    with_regularisation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lint", str(with_regularisation), "--json"]) == 0
    findings = {finding["code"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert "trigger-missing" not in findings
    assert findings["tag-fuses"]["message"] == "has `red hat` in 6 of 6 captions: it may be absorbed by the trigger"


def test_a_regularisation_caption_is_measured_without_the_trigger(tmp_path: Path) -> None:
    from emotrain.dataset.examples import Example
    from emotrain.dataset.lint_captions import caption_findings
    from emotrain.dataset.lint_tokens import TokenCounter

    by_word = TokenCounter(lambda text: len(text.split()), 3, exact=True)
    own, prior = (
        Example(f"{k}.png", Path(f"{k}.png"), 64, 64, (f"one two {k}",), str(k), 1, prior=k == 1) for k in range(2)
    )
    found = caption_findings([own, prior], trigger="mika", tokens=by_word)
    assert [(finding.file, finding.code) for finding in found if finding.file] == [("0.png", "caption-truncated")]
