"""The page of a run while it runs: what it shows, and that it keeps within its share of the time."""

from __future__ import annotations

from pathlib import Path

import pytest

from emotrain.config.load import load_preset
from emotrain.files import strict_json
from emotrain.runs import live_page, report
from emotrain.runs.folder import RunFolder
from emotrain.runs.live_page import SHARE, LivePage
from emotrain.runs.start import run
from emotrain.train.events import Event, Notice, Phase, RunStart, SamplesDrawn, ValidationEnd


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def begin(folder: Path) -> RunStart:
    return RunStart("mika", folder, 0, 100, 10.0, "emosens", 10, 1, 1, "cpu")


def validated(step: int) -> ValidationEnd:
    return ValidationEnd(step, 0.5, 0.0, 0.6, None, step, 0.5)


def test_a_page_is_written_where_its_share_of_the_time_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, written, cost = Clock(), list[float](), 3.0

    def page(*_: object) -> str:
        clock.now += cost
        written.append(clock.now)
        return "<!doctype html>"

    monkeypatch.setattr(report, "page_of", page)
    watch = LivePage(RunFolder(tmp_path), (), [].append, clock)
    watch.handle(begin(tmp_path))
    for step in range(1, 2000):
        clock.now += 1.0
        watch.handle(Phase("validating", 1, 2))
        watch.handle(validated(step) if step % 2 else SamplesDrawn(step, (), (), tmp_path))
    assert written[0] == pytest.approx(23.0)  # as soon as the 0.2 s that are expected are 1 %
    assert len(written) == 6
    assert cost * len(written) <= SHARE * clock.now
    assert (tmp_path / "report.html").read_text() == "<!doctype html>"


def test_a_page_that_fails_is_said_once_and_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ZeroDivisionError("of a decoder\nwith more lines")

    told: list[Event] = []
    clock = Clock()
    monkeypatch.setattr(report, "page_of", fail)
    watch = LivePage(RunFolder(tmp_path), (), told.append, clock)
    watch.handle(begin(tmp_path))
    for step in range(1, 4):
        clock.now += 1000.0
        watch.handle(validated(step))
    assert told == [Notice("report.html is not kept up to date: ZeroDivisionError: of a decoder")]


def test_a_run_has_a_page_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page, "FIRST_S", 0.0)
    monkeypatch.setattr(live_page, "SHARE", 1e6)
    seen: list[str] = []

    class Reader:
        def handle(self, event: Event) -> None:
            page = tmp_path / "mika" / "report.html"
            if isinstance(event, Phase) and event.name == "saving" and event.done == 0 and page.is_file():
                seen.append(page.read_text("utf-8"))

        def close(self) -> None: ...

    words = ("train.max_steps=3", "save.every=3", "validate.every=1", "sample.every=0", "log.tensorboard=false",
             "network.targets=[mid_block.*to_q]", "train.loss.baseline=raw")  # fmt: skip
    done = run(load_preset("quickstart", words, "mika"), runs_dir=tmp_path, observers=[Reader()])
    assert len(seen) == 1
    assert ">running</b>: the page shows what was written up to now; the last step in its log is 3<" in seen[0]
    assert 'data-refresh="30"' in seen[0]
    page = (done.folder.path / "report.html").read_text("utf-8")
    assert "data-refresh" not in page
    assert strict_json((done.folder.path / "run.json").read_text("utf-8"))["stop_reason"] == "max_steps"
