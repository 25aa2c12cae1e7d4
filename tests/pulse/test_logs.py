"""Loss logs of other trainers are read, and what cannot be read is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emotrain.errors import ConfigError
from emotrain.pulse.logs import read_log, usual_gap
from emotrain.pulse.replay import replay


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"step": 3, "loss": 0.5}\n{"step": 6, "loss": 0.25}\n'),
        ("list.json", "[[3, 0.5], [6, 0.25]]"),
        ("objects.json", '[{"step": 3, "loss": 0.5}, {"step": 6, "loss": 0.25}]'),
        (
            "trainer_state.json",
            '{"log_history": [{"loss": 0.5, "step": 3}, {"eval": 1, "step": 4}, {"loss": 0.25, "step": 6}]}',
        ),
        ("tensorboard.json", "[[1700000000.5, 3, 0.5], [1700000001.5, 6, 0.25]]"),
        ("comma.csv", "epoch,Step,Loss\n0,3,0.5\n0,6,0.25\n"),
        ("semicolon.csv", "step;train_loss\n3;0.5\n6;0.25\n"),
        ("tab.tsv", "global_step\tloss/current\n3\t0.5\n6\t0.25\n"),
        ("tensorboard.csv", "Wall time,Step,Value\n1700000000,3,0.5\n1700000001,6,0.25\n"),
        ("headless.csv", "3,0.5\n6,0.25\n"),
        ("bom.csv", "\ufeffstep,loss\n3,0.5\n6,0.25\n"),
    ],
)
def test_a_log_of_any_usual_shape_gives_its_steps_and_losses(tmp_path: Path, name: str, text: str) -> None:
    log = read_log(write(tmp_path / name, text))
    assert (log.steps, log.losses) == ((3, 6), (0.5, 0.25))


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "[0.5, 0.25]"), ("a.csv", "0.5\n0.25\n"), ("b.csv", "loss\n0.5\n0.25")]
)
def test_losses_without_steps_are_counted_from_one(tmp_path: Path, name: str, text: str) -> None:
    log = read_log(write(tmp_path / name, text))
    assert (log.steps, log.losses) == ((1, 2), (0.5, 0.25))


def test_a_run_folder_is_read_through_its_metrics_and_what_the_emotion_heard(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 0.5, "observed_loss": 0.4}\n')
    log = read_log(tmp_path)
    assert (log.column, log.losses) == ("observed_loss", (0.4,))
    assert read_log(tmp_path, "loss").losses == (0.5,)


def test_a_run_s_gains_on_the_step_length_are_read_and_replayed(tmp_path: Path) -> None:
    rows = ['"gain": 3.0', '"gain": 1.0', '"gain": null', '"gain": [1]']
    text = "".join(f'{{"step": {step}, "loss": 0.5, {row}}}\n' for step, row in enumerate(rows, 1))
    log = read_log(write(tmp_path / "metrics.jsonl", text))
    assert log.gains == (3.0, 1.0, 1.0, 1.0)
    plain, scaled = (replay(log.steps, log.losses, gains=gains).readings for gains in ((), log.gains))
    ratios = [one.pulse / other.pulse for one, other in zip(scaled, plain, strict=True)]
    assert ratios == pytest.approx([3.0, 1.0, 1.0, 1.0])


def test_the_half_line_of_a_running_log_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_log(path).losses == (0.5,)


def test_losses_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    log = read_log(write(tmp_path / "a.csv", "step,loss\n1,0.5\n2,nan\n3,inf\n4,0.25\n"))
    assert (log.steps, log.left_out) == ((1, 4), 2)


def test_a_tensorboard_folder_is_read_and_a_tag_can_be_named(tmp_path: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboard.compat.proto.event_pb2")
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path / "logs" / "run"))
    for step in (1, 2, 3):
        values = [
            Summary.Value(tag="loss/average", simple_value=9.0),
            Summary.Value(tag="loss/current", simple_value=1.0 / step),
        ]
        writer.add_event(event_pb2.Event(wall_time=1.0, step=step, summary=Summary(value=values)))
    writer.close()
    log = read_log(tmp_path / "logs")
    assert (log.column, log.steps) == ("loss/current", (1, 2, 3))
    assert log.losses == pytest.approx((1.0, 0.5, 1 / 3))
    assert read_log(next((tmp_path / "logs").rglob("*tfevents*")), "loss/average").losses == (9.0, 9.0, 9.0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.csv", None, "there is no such log"),
        ("empty.csv", "", "no loss found"),
        ("words.csv", "step,loss\n1,abc\n", "`loss` holds no finite number"),
        ("other.csv", "step,accuracy\n1,0.5\n", "no loss found"),
        ("two.csv", "step,my_loss,your_loss\n1,0.5,0.6\n", "several losses to choose from"),
        ("bad.jsonl", "{\n{}\n", ":1: is not JSON"),
        ("bad.json", "[1,", ": is not JSON"),
    ],
)
def test_a_log_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    path = tmp_path / name
    if text is not None:
        write(path, text)
    with pytest.raises(ConfigError) as caught:
        read_log(path)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_binary_files_and_folders_without_logs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_log(tmp_path / "a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no metrics\.jsonl and no TensorBoard event file"):
        read_log(tmp_path / "empty")


def test_a_name_that_the_log_does_not_have_lists_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_log(write(tmp_path / "a.csv", "step,loss\n1,2\n"), "los")
    assert caught.value.hint == "it has: step, loss"


@pytest.mark.parametrize(("steps", "gap"), [([1, 2, 3], 1), ([10, 20, 30, 31], 10), ([5], 1), ([], 1)])
def test_the_usual_gap_of_a_thinned_log(steps: list[int], gap: int) -> None:
    assert usual_gap(steps) == gap


def test_json_of_losses_may_be_long(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps([1.0] * 10_000))
    assert len(read_log(path).losses) == 10_000
