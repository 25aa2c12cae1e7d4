"""Folders by share: repeats that come near what was asked for, and what `check`, `plan` and `lint` say of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.config.schema import Folder
from emotrain.dataset.balance import balanced, folder_shares
from emotrain.dataset.examples import Example
from emotrain.errors import ConfigError
from emotrain.runs.data import read_pictures


def pictures(*counts: int, repeats: int = 1) -> tuple[Example, ...]:
    return tuple(
        Example(f"f{folder}/{k}.png", Path(), 64, 64, ("x",), str(k), 0, repeats=repeats, folder=folder)
        for folder, count in enumerate(counts)
        for k in range(count)
    )


def folders(count: int, repeats: int = 1) -> tuple[Folder, ...]:
    return tuple(Folder(path=f"/data/f{k}", repeats=repeats) for k in range(count))


@pytest.mark.parametrize(
    ("counts", "balance", "repeats"),
    [
        ((24, 31), {"f0": 0.7, "f1": 0.3}, (3, 1)),
        ((20, 60), "equal", (3, 1)),
        ((20, 30), "equal", (3, 2)),
        ((10, 10), {"f0": 7, "f1": 3}, (5, 2)),  # shares need not add up to 1
        ((5, 5, 50), "equal", (10, 10, 1)),
        ((30, 10), "repeats", (1, 1)),
    ],
)
def test_the_smallest_repeats_that_come_near(
    counts: tuple[int, ...], balance: object, repeats: tuple[int, ...]
) -> None:
    found = balanced(pictures(*counts), folders(len(counts)), balance)  # type: ignore[arg-type]
    assert tuple(next(one.repeats for one in found if one.folder == k) for k in range(len(counts))) == repeats


@pytest.mark.parametrize("counts", [(7, 13), (100, 3), (1, 50), (17, 23, 31)])
def test_every_share_is_within_two_hundredths(counts: tuple[int, ...]) -> None:
    own = folders(len(counts))
    shares = folder_shares(balanced(pictures(*counts), own, "equal"), own)
    assert all(abs(one.share - 1 / len(counts)) <= 0.02 for one in shares)
    assert sum(one.share for one in shares) == pytest.approx(1.0)


def test_repeats_of_a_folder_do_not_count_and_those_of_its_subfolders_do() -> None:
    many = pictures(10, 10, repeats=5)
    assert {one.repeats for one in balanced(many, folders(2, repeats=5), "equal")} == {1}
    twice = (*pictures(10), *(Example(f"f1/2_x/{k}.png", Path(), 64, 64, ("x",), "", 0, 2, folder=1) for k in range(5)))
    found = balanced(twice, folders(2), "equal")
    assert [one.repeats for one in found] == [1] * 10 + [2] * 5


def test_shares_that_would_take_thousands_of_repeats_are_refused() -> None:
    with pytest.raises(ConfigError, match="1,000,000 times as often as one of f1"):
        balanced(pictures(10, 10), folders(2), {"f0": 1_000_000, "f1": 1})


def write(folder: Path, count: int, shade: int) -> None:
    folder.mkdir()
    for k in range(count):
        Image.effect_noise((64, 64), 40 + shade + k).convert("RGB").save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"thing {shade} {k}", encoding="utf-8")


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    write(tmp_path / "mika", 4, 0)
    write(tmp_path / "girls", 9, 50)
    path = tmp_path / "p.yaml"
    path.write_text(
        "model: builtin:tiny-sd\ndataset:\n  resolution: 64\n  buckets: {step: 8, min: 64, max: 64}\n"
        "  folders: [{path: ./mika}, {path: ./girls, prior: 0.5}]\n  balance: {mika: 0.7, girls: 0.3}\n",
        encoding="utf-8",
    )
    return path


def test_check_plan_and_lint_show_the_shares(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "mika 69 % (4 pictures x 5), girls 31 % (9 pictures x 1)"
    assert main(["check", str(preset)]) == 0
    assert words in capsys.readouterr().out
    assert main(["plan", str(preset)]) == 0
    assert words in capsys.readouterr().out
    assert main(["plan", str(preset), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["data"]["folders"]
    assert [(one["name"], one["repeats"], one["share"]) for one in told] == [("mika", 5, 0.6897), ("girls", 1, 0.3103)]
    assert main(["lint", str(preset)]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[:4] for line in shown.splitlines() if line.startswith(("mika", "girls"))] == [
        ["girls", "9", "9", "31%"],
        ["mika", "4", "20", "69%"],
    ]


def test_held_out_pictures_do_not_count(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_preset(preset, ["validate.fraction=0.5"])
    found = read_pictures(loaded)
    assert len(found.held_out) == 2
    assert {(one.folder, one.repeats) for one in found.train} == {(0, 10), (1, 1)}
    assert main(["lint", str(preset)]) == 0


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("balance: {mka: 1, girls: 1}", ":6: dataset.balance names `mka`, which is none of the folders", "`mika`"),
        ("balance: {mika: 1}", ":6: dataset.balance has no share for girls", "every folder needs one"),
        (
            "balance: equall",
            "dataset.balance is `equall`, but must be one of `repeats`, `equal`",
            "did you mean `equal`?",
        ),
        ("balance: {mika: 0, girls: 1}", "dataset.balance", ""),
        ("balance: 0.5", "dataset.balance is `0.5`, but must be", ""),
    ],
)
def test_bad_shares_are_refused_in_one_line(
    preset: Path, capsys: pytest.CaptureFixture[str], line: str, message: str, hint: str
) -> None:
    text = preset.read_text(encoding="utf-8").replace("balance: {mika: 0.7, girls: 0.3}", line)
    preset.write_text(text, encoding="utf-8")
    assert main(["check", str(preset)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert hint in said


def test_repeats_beside_shares_are_noted(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = preset.read_text(encoding="utf-8").replace("{path: ./mika}", "{path: ./mika, repeats: 4}")
    preset.write_text(text, encoding="utf-8")
    assert main(["check", str(preset)]) == 0
    printed = capsys.readouterr()
    assert "repeats has no effect beside dataset.balance" in printed.out + printed.err
    assert "mika 69 % (4 pictures x 5)" in printed.out
