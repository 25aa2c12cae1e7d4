from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from emotrain.errors import ResourceError
from emotrain.observers import metrics_log
from emotrain.observers.console import JsonEvents, LineWriter
from emotrain.observers.metrics_log import MetricsLog, truncate_log
from emotrain.train.events import (
    Notice,
    Phase,
    RunEnd,
    RunStart,
    SamplesDrawn,
    Saved,
    StepEnd,
    ValidationEnd,
)

MakeStep = Callable[..., StepEnd]
MakeStart = Callable[..., RunStart]
NEEDED = {"step", "loss", "scalar", "trust", "pulse", "grad_norm", "observed_loss", "ready", "epoch"}


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def end(lora: Path | None = Path("runs/mika/lora.safetensors")) -> RunEnd:
    return RunEnd(9, "signal", "the scalar stayed below zero", lora, 7, 0.5, 12.5)


def test_metrics_have_a_line_a_step_and_validations_their_own_file(
    tmp_path: Path, make_step: MakeStep, make_start: MakeStart
) -> None:
    log = MetricsLog(tmp_path)
    log.handle(make_start())
    for step in range(1, 6):
        log.handle(make_step(step))
        lines = rows(tmp_path / "metrics.jsonl")  # flushed: readable at once
        assert lines[-1]["step"] == step
    log.handle(ValidationEnd(5, 0.6, -0.1, 1.5, None, 5, 0.6))
    log.close()
    lines = rows(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(set(line) >= NEEDED for line in lines)
    assert rows(tmp_path / "validation.jsonl") == [
        {
            "step": 5,
            "loss": 0.6,
            "scalar": -0.1,
            "base_loss": 1.5,
            "drift": None,
            "best_step": 5,
            "best_loss": 0.6,
            "forecast": "",
            "compared_step": None,
            "difference": None,
            "difference_error": None,
            "improvement_chance": None,
            "comparison": "",
        }
    ]


@pytest.mark.parametrize("tail", [b"", b'{"step": 9, "lo', b"\x00\x00\x00\n", b"[]\n"])
def test_a_resumed_log_has_every_step_once(
    tmp_path: Path, make_step: MakeStep, make_start: MakeStart, tail: bytes
) -> None:
    log = MetricsLog(tmp_path)
    log.handle(make_start())
    for step in range(1, 9):
        log.handle(make_step(step))
    for step in (2, 6):
        log.handle(ValidationEnd(step, 0.6, 0.1, 1.5, 0.0, step, 0.6))
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)

    log = MetricsLog(tmp_path)
    log.handle(make_start(start_step=5))
    for step in range(6, 11):
        log.handle(make_step(step, loss=9.0))
    log.close()
    lines = rows(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] == 9.0 for line in lines] == [False] * 5 + [True] * 5
    assert [line["step"] for line in rows(tmp_path / "validation.jsonl")] == [2]


def test_a_log_that_ends_before_the_resumed_step_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    assert truncate_log(path, 5) == 0
    assert truncate_log(path, 1) == 12
    assert path.read_bytes() == b'{"step": 1}\n'
    assert truncate_log(tmp_path / "missing.jsonl", 3) == 0


def test_lines_wait_while_the_disk_is_full_and_are_not_lost(
    tmp_path: Path, make_step: MakeStep, make_start: MakeStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path / "run")
    log.handle(make_start())
    log.handle(make_step(1))
    log.close()
    (tmp_path / "run").rename(tmp_path / "away")
    log.handle(make_step(2))
    log.handle(make_step(3))
    (tmp_path / "away").rename(tmp_path / "run")
    log.handle(make_step(4))
    log.close()
    assert [line["step"] for line in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]

    monkeypatch.setattr(metrics_log, "MAX_WAITING", 3)
    (tmp_path / "run").rename(tmp_path / "away")
    log.handle(make_step(5))
    log.handle(make_step(6))
    with pytest.raises(ResourceError, match="cannot be written"):
        log.handle(make_step(7))


def test_numbers_that_json_cannot_say_become_null(make_step: MakeStep) -> None:
    line = make_step(1, loss=float("nan"), grad_norm=float("inf")).line()
    assert json.loads(line)["loss"] is None
    assert "NaN" not in line
    assert "Infinity" not in line


def test_json_events_are_one_object_a_line_and_end_with_the_lora(make_step: MakeStep, make_start: MakeStart) -> None:
    stream = io.StringIO()
    observer = JsonEvents(stream)
    events = [
        make_start(name="\x1b[31m\n日本\ud800"),
        Phase("cache latents", 1, 4),
        make_step(1),
        ValidationEnd(1, 0.6, 0.1, 1.5, 0.0, 1, 0.6),
        SamplesDrawn(1, (Path("a.png"),), ("a fox\n",), Path("sheet.png")),
        Saved(1, Path("checkpoints/step-00000001")),
        Notice("careful"),
        end(),
    ]
    for event in events:
        observer.handle(event)
    observer.close()
    text = stream.getvalue()
    assert text.isascii()
    assert "\x1b" not in text
    parsed = [json.loads(line) for line in text.splitlines()]
    assert [row["event"] for row in parsed] == [
        "run_start",
        "phase",
        "step",
        "validation",
        "samples",
        "saved",
        "notice",
        "run_end",
    ]
    assert parsed[-1]["stop_reason"] == "signal"
    assert parsed[-1]["lora"] == str(Path("runs/mika/lora.safetensors"))
    assert parsed[0]["schema_version"] == 1


def test_a_json_step_has_the_fields_of_metrics_jsonl(make_step: MakeStep) -> None:
    event = make_step(3)
    row = json.loads(event.line(with_kind=True))
    assert row.pop("event") == "step"
    assert row == json.loads(event.line())
    assert end(lora=None).row()["lora"] is None


def test_a_row_has_every_field_of_its_event_and_the_numbers_of_the_reading(make_step: MakeStep) -> None:
    event = make_step(2, expected_end=(5, 9), ready=True)
    row = json.loads(event.line())
    for owner in (event, event.reading):
        for each in fields(owner):
            if each.name not in ("reading", "samples"):
                value = getattr(owner, each.name)
                assert row[each.name] == (list(value) if isinstance(value, tuple) else value)
    assert not {"reading", "samples"} & row.keys()  # the pictures' losses have a file of their own


def test_a_reader_that_goes_away_ends_nothing() -> None:
    code = (
        "import sys\n"
        "from emotrain.observers.console import ConsoleLines, JsonEvents\n"
        "from emotrain.train.events import Notice\n"
        "for observer in (JsonEvents(), ConsoleLines(stream=sys.stdout)):\n"
        "    for i in range(20000):\n"
        "        observer.handle(Notice(f'line {i}'))\n"
        "    observer.close()\n"
        "print('the path of the LoRA', flush=True)\n"
        "sys.stderr.write('went on')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b'{"event": "notice"')
    process.stdout.close()
    complaint = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 0
    assert complaint == b"went on"


def test_a_closed_stream_is_left_alone() -> None:
    stream = io.StringIO()
    stream.close()
    writer = LineWriter(stream)
    writer.write("x\n")
    assert writer.closed


def test_characters_that_the_stream_cannot_encode_become_question_marks(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        LineWriter(stream).write("日本\n")
    assert (tmp_path / "out").read_bytes().replace(os.linesep.encode(), b"\n") == b"??\n"
