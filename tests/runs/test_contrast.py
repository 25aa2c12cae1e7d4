"""After a run the captions are compared, within a tenth of its work; those that suit no better are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.observers.console import JsonEvents
from emotrain.runs import contrast, start
from emotrain.runs.contrast import SAMPLE, Plan, plan_contrast
from emotrain.train.events import Notice


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("pictures", [8, 12, 29, 64, 300, 5000])
@pytest.mark.parametrize("samples", [16, 100, 400, 1600, 12_000, 10**6])
def test_a_plan_costs_a_tenth_of_the_run_at_most(pictures, samples):
    plan = plan_contrast(pictures, samples)
    if plan is None:
        assert 0.1 * SAMPLE * samples < 8 * 3
        return
    assert plan.pictures * (1 + plan.others) * plan.draws <= 0.1 * SAMPLE * samples
    assert plan.others < plan.pictures <= pictures
    assert plan.pictures == pictures or (plan.others, plan.draws) == (2, 1)


def test_plans_of_usual_runs():
    assert plan_contrast(29, 400) == Plan(29, 2, 1)
    assert plan_contrast(30, 3000) == Plan(30, 7, 2)
    assert plan_contrast(300, 1000) == Plan(83, 2, 1)
    assert plan_contrast(7, 10**6) is None  # too few to tell which one stands out
    assert plan_contrast(29, 20) is None


class Listener:
    def __init__(self):
        self.events = []

    def handle(self, event):
        self.events.append(event)

    def close(self):
        pass


def run(tmp_path: Path, name: str, *extra: str, observers=()):
    words = (
        "sample.every=0",
        "log.tensorboard=false",
        "validate.every=99",
        "train.loss.baseline=raw",
        "train.max_steps=2",
        "network.targets=[mid_block.*to_q]",
        *extra,
    )
    return start.run(load_preset("quickstart", words, name), runs_dir=tmp_path / "runs", observers=observers)


def test_a_run_compares_captions_after_its_lora_is_written_and_images_reads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contrast, "SHARE", 4.5)
    observed_loss = Listener()
    written = []
    whole = contrast.contrastive_losses

    def spy(*args, **words):
        written.append(run_dir.joinpath("lora.safetensors").is_file())
        return whole(*args, **words)

    run_dir = tmp_path / "runs" / "one"
    monkeypatch.setattr(contrast, "contrastive_losses", spy)
    result = run(tmp_path, "one", observers=[observed_loss])
    assert written == [True]
    rows = [json.loads(line) for line in (run_dir / "picture_contrast.jsonl").read_text().splitlines()]
    assert len(rows) == 32 - len(result.folder.info()["held_out"])
    assert {(len(row["own"]), len(row["others"])) for row in rows} == {(1, 2)}
    capsys.readouterr()
    assert main(["images", str(result.folder.path), "--json"]) == 0
    pictures = json.loads(capsys.readouterr().out)["pictures"]
    assert all(picture["z_contrast"] is not None for picture in pictures)
    doubted = [p["id"] for p in pictures if p["verdict"] == "suspicious"]
    lines = [
        event.message
        for event in observed_loss.events
        if isinstance(event, Notice) and event.message.startswith("captions")
    ]
    assert len(lines) == bool(doubted)
    assert all(name in lines[0] for name in doubted[:5])


def test_a_short_run_is_not_charged_and_an_interrupted_one_not_kept_waiting(tmp_path, monkeypatch):
    short = run(tmp_path, "short", "train.max_steps=1")
    assert not (short.folder.path / "picture_contrast.jsonl").exists()
    monkeypatch.setattr(contrast, "SHARE", 4)
    stops = iter([False, False])
    monkeypatch.setattr(contrast, "COMPARED", 2)
    session_stop = contrast.contrastive_losses

    def stopping(*args, **words):
        return session_stop(*args, **{**words, "stop": lambda: next(stops, True)})

    monkeypatch.setattr(contrast, "contrastive_losses", stopping)
    stopped = run(tmp_path, "stopped")
    assert stopped.exit_code == 0
    assert len((stopped.folder.path / "picture_contrast.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_full_disk_costs_the_comparison_and_not_the_run(tmp_path, monkeypatch):
    import io

    monkeypatch.setattr(contrast, "SHARE", 4)
    monkeypatch.setattr(contrast, "CONTRASTS", "no/such/folder.jsonl")
    out = io.StringIO()
    result = run(tmp_path, "full", observers=[JsonEvents(out)])
    assert result.exit_code == 0
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert events[-1]["event"] == "run_end"
    assert any("comparison is lost" in event.get("message", "") for event in events)


def test_images_names_what_stands_out_alone_or_says_that_nothing_does(tmp_path, capsys, monkeypatch):
    from emotrain.dataset.ranking import PictureScore
    from emotrain.runs import pictures
    from emotrain.runs.folder import create_run

    folder = create_run(tmp_path / "runs", "x", {"name": "x"})
    fields = dict.fromkeys(PictureScore.__dataclass_fields__)
    scores = [
        PictureScore(**{**fields, "id": f"a/{i}.png", "verdict": "normal", "z_early": 0.1, "z_late": 0.2, "visits": 3})
        for i in range(3)
    ]
    monkeypatch.setattr(pictures, "rank_pictures", lambda run: scores)
    words = ["images", "x", "--runs-dir", str(tmp_path / "runs")]
    assert folder.name == "x"
    assert main(words) == 0
    assert capsys.readouterr().out == "nothing stands out among 3 pictures (`--all` shows them)\n"
    assert main([*words, "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    odd = PictureScore(**{**fields, "id": "a/odd.png", "verdict": "suspicious", "visits": 3})
    monkeypatch.setattr(pictures, "rank_pictures", lambda run: [odd, *scores])
    assert main(words) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert "a/odd.png" in line
    assert "caption may be wrong" in line
