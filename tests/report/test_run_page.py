"""The page of a run: whatever state its folder is in, hostile text stays text, and only comparable numbers meet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from html_reading import ALLOWED, HOSTILE, assert_harmless, read
from PIL import Image
from run_folders import STEPS, draw, lines, make_run

from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.dataset.lint_types import PictureRow
from emotrain.dataset.ranking import PictureScore
from emotrain.report.run_page import NARROW, compare_page, run_page, run_panels, smooth, thin
from emotrain.report.run_view import Curves, Gallery, LoraFacts, PromptRow, RunView, Settings
from emotrain.runs import report
from emotrain.runs.folder import RunFolder
from emotrain.train.events import Event, Notice

RUN_ELEMENTS = ALLOWED | {"script", "h3", "code", "label", "input", "output", "button", "svg", "rect", "path"}
RUN_ELEMENTS |= {"text", "polyline"}


def page(folder: RunFolder) -> str:
    return report.page_of(folder)


def test_the_page_of_a_finished_run_has_everything(tmp_path: Path) -> None:
    elements = read(page(make_run(tmp_path)))
    text = elements.words
    for part in (
        "mika stopped automatically: it got no better", "0.6000 best validation loss, step 20",
        "0.8000 without the LoRA (-25 %)",
        "30 steps", "0:15 training time", "training loss", "emoPulse", "best: step 20", "mika_ch, rocket",
        "seed 7000000001, 20 steps, 64 × 64", "step 20 (best)", "lora.safetensors", "What differs from quickstart:",
        "dataset.trigger mika_ch inkmoji", "example/rose.png", "inkmoji, rose",
    ):  # fmt: skip
        assert part in text, part
    assert sum(name == "img" for name, _ in elements.found) == 3 + 2  # samples, and the two ranked pictures
    assert sum(name == "figure" and attributes.get("class") == "own" for name, attributes in elements.found) == 1
    assert "Not on this page" not in text


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (
            {"stop_reason": None},
            "mika crashed: its process ended without handing over a LoRA; the last step in its log is 30",
        ),
        ({"stop_reason": "interrupted"}, "mika interrupted: saved, can be resumed"),
        ({"stop_reason": "diverged"}, "mika diverged: it got no better"),
        ({"stop_reason": "max_steps"}, "mika reached train.max_steps"),
    ],
)
def test_the_page_says_how_a_run_ended(tmp_path: Path, info: dict[str, Any], words: str) -> None:
    folder = make_run(tmp_path, **info)
    assert "Resume it" not in read(page(folder)).words  # it was not saved yet
    (folder.checkpoints_dir / "step-00000020").mkdir(parents=True)
    text = read(page(folder)).words
    assert words in text
    can_be_resumed = info["stop_reason"] in (None, "interrupted")
    assert (f"Resume it with emotrain resume {folder.path}" in text) == can_be_resumed
    assert ("The last picture of each prompt" in text) == (info["stop_reason"] == "max_steps")


def test_a_running_run_has_a_page_of_what_is_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path, stop_reason=None, best_step=None, best_loss=None, base_loss=None)
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 31, "lo')  # the line that is being written
    with folder.lock():
        text = read(page(folder)).words
    assert "mika running: the page shows what was written up to now; the last step in its log is 30" in text
    assert "0.6000 best validation loss, step 20" in text
    assert "Not on this page" not in text
    assert "now: step 30" in text


def test_whatever_is_missing_is_said_and_costs_nothing_else(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for name in ("metrics.jsonl", "validation.jsonl", "picture_losses.jsonl", "preset.yaml"):
        before = page(folder)
        (folder.path / name).unlink()
        after = read(page(folder)).text
        assert f"{name}" in after[after.index("Not on this page") :], name
        assert name not in read(before).text or name == "preset.yaml"
    for path in folder.samples_dir.iterdir():
        path.unlink()
    text = read(page(folder)).text
    assert "There are no samples." in text
    folder.samples_dir.rmdir()
    folder.info_path.write_text("{")
    assert "run.json is damaged" in read(page(folder)).text


def test_a_picture_that_is_gone_leaves_its_row(tmp_path: Path, pictures_dir: Path) -> None:
    folder = make_run(tmp_path)
    values = load_preset("quickstart", (f"dataset.folders=[{{path: {pictures_dir}}}]",), "mika").to_dict()
    folder.write_preset(values)
    (folder.path / "picture_losses.jsonl").write_text(
        lines(
            [
                {"step": step, "samples": [["pictures/red.png", 0.5, 0.1], ["pictures/gone.png", 0.5, 0.2]]}
                for step in range(9)
            ]
        )
    )
    text = read(page(folder)).text
    assert "pictures/gone.png" in text
    assert "a red square, 0" in text
    pictures_dir.rename(tmp_path / "elsewhere")
    text = read(page(folder)).text
    assert "Not on this page: the pictures themselves" in text
    assert "pictures/red.png" in text


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "null",
        '"x"',
        '{"step": "1"}',
        '{"step": true}',
        '{"step": 1e999}',
        '{"step": NaN}',
        "[" * 99_999,
        "\x00",
        "{",
    ],
)
def test_a_damaged_line_of_a_log_is_counted_and_left_out(tmp_path: Path, line: str) -> None:
    folder = make_run(tmp_path)
    rows = [*STEPS[:10], {**STEPS[10], "loss": "high", "scalar": None, "trust": [], "pulse": {}}, *STEPS[11:]]
    text = lines(rows)
    folder.metrics_path.write_text(line + "\n" + text)
    assert "1 lines of metrics.jsonl, which are damaged" in read(page(folder)).text
    assert len(report.view(folder).curves.loss) == 29


@pytest.mark.parametrize("value", ["x", [], {}, True, -1, 10**400, None, HOSTILE[1]])
def test_run_json_with_values_of_other_kinds_has_a_page(tmp_path: Path, value: Any) -> None:
    keys = (
        "stop_reason", "stop_sentence", "steps", "best_step", "best_loss", "base_loss", "seed", "device", "started",
        "emotrain", "family", "held_out", "base_sha256", "extends", "lora",
    )  # fmt: skip
    folder = make_run(tmp_path)
    folder.info_path.write_text(json.dumps(folder.info() | dict.fromkeys(keys, value)))
    assert_harmless(read(page(folder)), RUN_ELEMENTS)


def hostile_view() -> RunView:
    prompts = tuple(PromptRow(text, text, text, (b"\xff", b"")) for text in HOSTILE)
    scores = tuple(PictureScore(text, "suspicious", 9, 9, 0, 0, 1, 2, 3, 4.0) for text in HOSTILE)
    return RunView(
        name=HOSTILE[1], path=HOSTILE[0], status=HOSTILE[0], why=HOSTILE[1], command=HOSTILE[2],
        facts=tuple((text, text) for text in HOSTILE), last_step=9, best_step=3, best_loss=0.5, base_loss=0.7,
        same_validation="x", curves=Curves(((1.0, 0.5), (9.0, 0.4)), ((0.0, 0.7), (9.0, 0.5))),
        gallery=Gallery((HOSTILE[0], HOSTILE[1]), prompts, lora=True),
        settings=Settings(HOSTILE[0], tuple((t, t, t) for t in HOSTILE), tuple((t, t) for t in HOSTILE)),
        ranking=scores, pictures={t: PictureRow(t, 9, 9, (t,)) for t in HOSTILE},
        lora=LoraFacts(HOSTILE[1], tuple((t, t) for t in HOSTILE), HOSTILE[0]), missing=tuple(HOSTILE),
    )  # fmt: skip


def test_hostile_text_stays_text_on_every_page() -> None:
    run = hostile_view()
    pair, differences = [run, replace(run, name=HOSTILE[0])], [(text, (text, text)) for text in HOSTILE]
    for text in (run_page(run), compare_page(pair, differences, ("", "../a%22b/report.html"))):
        elements = read(text)
        assert_harmless(elements, RUN_ELEMENTS)
        for hostile in HOSTILE[:6]:
            assert elements.text.count(hostile) >= 4, hostile
        assert text.encode("utf-8")
    assert run_page(run).count("<script>") == 1
    assert "<script>" not in compare_page([run, run], [], ("", ""))


def test_nothing_is_read_through_a_link(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    secret = tmp_path / "secret.png"
    draw(secret, 99, "a secret prompt")
    (folder.samples_dir / "step-00000020-1.png").unlink()
    (folder.samples_dir / "step-00000020-1.png").symlink_to(secret)
    (folder.path / "validation.jsonl").unlink()
    (folder.path / "validation.jsonl").symlink_to(folder.metrics_path)
    view = report.view(folder)
    assert view.gallery.columns == ("step 0", "lora.safetensors")
    assert view.curves.validation == ()
    assert "a secret prompt" not in page(folder)


def test_many_steps_and_large_pictures_keep_the_page_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_SAMPLES", 24)
    folder = make_run(tmp_path)
    noise = Image.effect_noise((700, 700), 90).convert("RGB")
    noise.save(folder.samples_dir / "step-00000000-1.png")
    (folder.samples_dir / "step-00000020-1.png").unlink()
    for step in range(1, 40):
        (folder.samples_dir / f"step-{step:08d}-1.png").hardlink_to(folder.samples_dir / "step-00000000-1.png")
    view = report.view(folder)
    assert len(view.gallery.columns) == report.MOST_SAMPLES
    assert view.gallery.columns[0] == "step 0"
    assert view.gallery.columns[-2:] == ("step 39", "lora.safetensors")
    assert "step 20 (best)" in view.gallery.columns
    assert max(len(picture) for row in view.gallery.rows for picture in row.pictures) < 80_000


def test_every_picture_is_ranked_and_the_first_have_previews() -> None:
    scores = tuple(PictureScore(f"p{k}", "normal", 9, 9, 0, 0, 1, 2, 3) for k in range(100))
    pictures = {one.id: PictureRow(one.id, 9, 9, (), preview=b"\xff") for one in scores}
    elements = read(run_page(RunView("mika", "runs/mika", "signal", ranking=scores, pictures=pictures)))
    assert sum(name == "img" for name, _ in elements.found) == 60
    assert "40 more (further down)" in elements.words
    assert "p99" in elements.words


def test_the_names_of_the_curves_have_room_beside_their_title(tmp_path: Path) -> None:
    folder = make_run(tmp_path, likeness={"base": 0.41, "pictures": 0.78, "last": 0.69, "lora": 0.7})
    rows = [{"step": step, "likeness": 0.5, "base_likeness": 0.41, "among_pictures": 0.78} for step in (0, 20)]
    (folder.path / "likeness.jsonl").write_text(lines([*rows, {"step": 25, "likeness": None}]))
    panels = run_panels(report.view(folder))
    names = {panel.title: [name for name, curve in panel.curves if curve] for panel in panels}
    assert names["likeness"] == ["samples"]  # the last row says nothing of the others
    (folder.path / "likeness.jsonl").write_text(lines(rows))
    names = {panel.title: [name for name, curve in panel.curves if curve] for panel in run_panels(report.view(folder))}
    assert names["likeness"] == ["samples", "without", "pictures"]
    for title, own in names.items():  # as `svg` sets them: 7 px a letter, and 18 px between
        assert 7 * len(title) + sum(7 * len(name) + 18 for name in own) <= NARROW - 80, title
    assert "likeness of the LoRA 0.700 (without: 0.410)" in read(page(folder)).words


def test_a_long_series_is_thinned_and_keeps_its_extremes() -> None:
    points = tuple((float(k), float(k % 97)) for k in range(10_000))
    few = thin(points)
    assert len(few) <= 400
    assert few[0] == points[0]
    assert few[-1] == points[-1]
    assert {0.0, 96.0} <= {y for _, y in few}
    assert list(few) == sorted(few)
    assert thin(points[:9]) == points[:9]
    flat = smooth(tuple((float(k), 2.0) for k in range(100)))
    assert [y for _, y in flat] == pytest.approx([2.0] * 100)


def test_only_runs_validated_alike_stand_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", best_loss=0.55)
    make_run(tmp_path, "other", base_loss=0.9)
    make_run(tmp_path, "another-base", base_sha256="c" * 64)
    target = tmp_path / "side.html"
    assert main(["report", "a", "b", "--runs-dir", str(tmp_path), "--html", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert "comparable only within a group" not in target.read_text("utf-8")
    assert main(["report", str(tmp_path), "--html", str(target)]) == 0
    text = read(target.read_text("utf-8")).words
    assert "4 runs side by side" in text
    assert "comparable only within a group" in text
    assert "Group 1: a, b" in text
    for alone in ("other", "another-base"):
        assert f": {alone} run best loss" in text
    assert text.count("mika_ch, rocket seed 7000000001") == 1  # one row, a picture of each run


def test_prompts_that_were_drawn_otherwise_are_not_set_side_by_side(tmp_path: Path) -> None:
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two")
    for path in two.samples_dir.iterdir():
        draw(path, 9, seed=8)
    text = read(report.page_of_several([one, two], tmp_path)).text
    assert "The runs have no prompt in common" in text
    assert "rocket" not in text.replace('"[trigger], rocket"', "")


def test_report_writes_into_the_runs_folder_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path)
    assert main(["report", str(folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder.path / "report.html")
    assert (folder.path / "report.html").read_text("utf-8").startswith("<!doctype html>")
    photo = folder.samples_dir / "lora-1.png"
    before = photo.read_bytes()
    for words, code, message in (
        (["report", "mica", "--runs-dir", str(tmp_path)], 5, "did you mean `mika`?"),
        (["report", str(folder.path), "--html", str(photo)], 2, "exists and is not a page"),
        (
            ["report", str(folder.path), "--html", str(tmp_path / "no" / "a.html")],
            2,
            "is not a file that can be written",
        ),
        (["report"], 2, "missing argument"),
    ):
        assert main(words) == code
        assert message in capsys.readouterr().err.lower()
    assert photo.read_bytes() == before


def test_a_page_that_fails_at_a_runs_end_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Event] = []
    folder = make_run(tmp_path)
    assert report.write_at_end(folder, (), told.append) == folder.path / "report.html"

    def fail(*_: object) -> str:
        raise ZeroDivisionError("of a decoder\nwith more lines")

    monkeypatch.setattr(report, "page_of", fail)
    report.write_at_end(folder, (), told.append)
    assert told[-2] == Notice("report.html was not written: ZeroDivisionError: of a decoder")


def test_a_folder_of_many_runs_is_an_overview(tmp_path: Path) -> None:
    folders = [make_run(tmp_path, f"run {k}", best_step=k) for k in range(7)]
    (folders[3].path / "report.html").write_text("<!doctype html>")
    page = report.page_of_several(folders, tmp_path / "beside")
    text = read(page).words
    assert "7 runs Overview" in text
    assert page.count('href="./../run%203/report.html"') == page.count("report.html") == 1  # the one that has a page
    assert "run 6 it got no better stopped automatically 6 30 0:15 builtin:tiny-sd" in text
    assert "Settings that differ" not in text
    assert "emotrain report A B" in text
    few = read(report.page_of_several(folders[:2], tmp_path)).words
    assert "2 runs side by side Overview" in few
    assert "Settings that differ" in few


def test_previews_are_kept_and_wait_where_their_time_is_used_up(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    none = report.Previews(seconds=0.0)
    assert all(not one for row in report.view(folder, (), previews=none).gallery.rows for one in row.pictures)
    kept = report.Previews()
    before = report.view(folder, (), previews=kept).gallery.rows[0].pictures
    assert all(before)
    kept._seconds = 0.0
    draw(folder.samples_dir / "step-00000025-1.png", 99, "mika_ch, another prompt")
    assert report.view(folder, (), previews=kept).gallery.rows[0].pictures == (*before[:2], b"", before[2])
