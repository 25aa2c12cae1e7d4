"""No checkpoint is committed ahead of the logs and pictures that belong to its steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emotrain.config.load import load
from emotrain.errors import ExitCode
from emotrain.observers.metrics_log import MetricsLog
from emotrain.runs import start
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.events import Event, Notice

PRESET = """
model: builtin:tiny-sd
dataset: {folders: [{path: ./pictures}], resolution: 64, buckets: {step: 8, min: 64, max: 64}}
network: {rank: 2, alpha: 2, targets: [mid_block.*to_q]}
train: {max_steps: 4, loss: {baseline: raw}}
save: {every: 2, keep_last: 3}
validate: {every: 1, probe_images: 1}
sample: {every: 2, steps: 1, prompts: [a, b]}
stop: {mode: "off"}
log: {tensorboard: false}
"""
LOGS = ("metrics.jsonl", "validation.jsonl", "picture_losses.jsonl")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (90 * index, 90, 9)).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text("a square")
    (tmp_path / "p.yaml").write_text(PRESET)
    return tmp_path


def test_a_commit_finds_logs_and_samples_on_the_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[str, bytes] = {}
    folders: set[str] = set()
    at_commit: list[tuple[int, dict[str, bytes], set[str]]] = []
    plain_fsync, plain_save = os.fsync, CheckpointStore.save

    def fsync(descriptor: Any) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        plain_fsync(descriptor)
        if path.is_dir():
            folders.update(str(inner) for inner in path.iterdir())
        else:
            synced[str(path)] = path.read_bytes()

    def save(self: CheckpointStore, step: int, *args: Any, **words: Any) -> Path:
        at_commit.append((step, dict(synced), set(folders)))
        return plain_save(self, step, *args, **words)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(CheckpointStore, "save", save)
    run = start.run(load(str(place / "p.yaml"), (), "one").preset, runs_dir=place / "runs", observers=()).folder
    assert [step for step, _, _ in at_commit] == [2, 4]
    for step, files, names in at_commit:
        for log in LOGS:
            path = str(run.path / log)
            assert json.loads(files[path].splitlines()[-1])["step"] == step, log
            assert path in names, log
        for picture in ("sheet.png", *(f"step-{step:08d}-{number}.png" for number in (1, 2))):
            path = str(run.samples_dir / picture)
            assert path in files, picture
            assert path in names, picture


def test_a_log_that_the_disk_refuses_costs_a_notice_and_not_the_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: MetricsLog) -> None:
        raise OSError(5, "Input/output error")

    told: list[Event] = []
    watch = type("Watch", (), {"handle": lambda self, event: told.append(event), "close": lambda self: None})()
    monkeypatch.setattr(MetricsLog, "sync", refuse)
    words = ("sample.every=0", "train.max_steps=2")
    result = start.run(load(str(place / "p.yaml"), words, "one").preset, runs_dir=place, observers=(watch,))
    assert result.exit_code == ExitCode.OK
    assert CheckpointStore(result.folder.checkpoints_dir).steps() == (2,)
    line = "a log was not brought to the disk (Input/output error); a power cut may shorten it"
    assert line in [event.message for event in told if isinstance(event, Notice)]
