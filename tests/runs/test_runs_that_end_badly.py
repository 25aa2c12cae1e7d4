"""A run that goes wrong hands over what it has, says what happened, and ends with the right code."""

from __future__ import annotations

import errno
import shlex
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emotrain.config.load import load_preset
from emotrain.errors import ExitCode
from emotrain.lora.adapter import Adapter
from emotrain.observers.metrics_log import MetricsLog
from emotrain.pulse.stopping import StopRule
from emotrain.ranks import Ranks
from emotrain.runs import finish, start
from emotrain.train.events import Event, Notice, RunEnd, StepEnd
from emotrain.train.loop import StopReason
from emotrain.train.state import TrainState

SHORT = (
    "train.loss.baseline=raw",
    "train.max_steps=4",
    "network.targets=[mid_block.*to_q]",
    "sample.every=0",
    "sample.at_start=false",
    "validate.every=2",
    "stop.mode=off",
)


class Watch:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    def said(self) -> str:
        return "\n".join(event.message for event in self.events if isinstance(event, Notice))


def train(tmp_path: Path, *overrides: str, name: str = "run") -> tuple[start.Result, Watch]:
    watch = Watch()
    words = (
        *SHORT,
        *overrides,
    )
    preset = load_preset("quickstart", words, name=name)
    return start.run(preset, runs_dir=tmp_path / "my runs", observers=[watch]), watch


def spoil_last(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """The weights that are live at the end are not those of the best step."""
    real = finish.hand_over

    def spoiled(loaded: Any, state: Any, *rest: Any) -> Any:
        adapter: Adapter = loaded.model.adapter
        state.best_step, state.best_adapter = 2, {k: v * 0 + 0.01 for k, v in adapter.state().items()}
        with torch.no_grad():
            for average in loaded.optimizer._average:
                average.fill_(value)
            for parameter in adapter.parameters():
                parameter.fill_(value)
        return real(loaded, state, *rest)

    monkeypatch.setattr(finish, "hand_over", spoiled)


@pytest.mark.parametrize("value", [float("nan"), 1e30], ids=["not finite", "too large for fp16"])
def test_weights_that_no_file_can_hold_are_a_divergence_and_the_best_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    spoil_last(monkeypatch, value)
    result, watch = train(tmp_path)
    assert result.exit_code == ExitCode.DIVERGED
    assert result.end.stop_reason == "diverged"
    assert result.folder.lora_path.is_file()
    assert not result.folder.lora_last_path.exists()
    assert "lora-last.safetensors is not written" in watch.said()


def test_a_file_is_checked_unless_it_has_the_weights_and_the_bytes_of_one_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(finish, "self_check", lambda path, *_: looked.append(path.name))
    monkeypatch.setattr(finish, "save_lora", lambda path, weights, *, metadata, **_: path.write_text(metadata["text"]))
    save = SimpleNamespace(format="auto", dtype="fp32")
    model = SimpleNamespace(adapter=SimpleNamespace(alphas=dict), family=SimpleNamespace(name="sd15"))
    loaded: Any = SimpleNamespace(preset=SimpleNamespace(save=save), model=model)
    ones, twos = {"a": torch.ones(2)}, {"a": torch.full((2,), 2.0)}
    first = tmp_path / "first"
    finish.write_lora(loaded, first, ones, {"text": "1"})
    for name, weights, text in (("same", ones, "1"), ("not its weights", twos, "1"), ("other words", ones, "2")):
        finish.write_lora(loaded, tmp_path / name, dict(weights), {"text": text}, (first, ones))
    assert looked == ["first", "not its weights", "other words"]


def test_a_log_on_a_full_disk_loses_lines_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: MetricsLog, event: Event) -> None:
        if isinstance(event, StepEnd):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsLog, "handle", full)
    result, watch = train(tmp_path)
    assert result.exit_code == ExitCode.OK
    assert watch.said().count("MetricsLog loses lines") == 1
    assert "No space left" in watch.said()


def test_tensorboard_that_is_deleted_while_training_does_not_end_the_run(tmp_path: Path) -> None:
    import shutil

    class Delete(Watch):
        def handle(self, event: Event) -> None:
            super().handle(event)
            if isinstance(event, StepEnd) and event.step == 2:
                shutil.rmtree(tmp_path / "runs" / "run" / "tensorboard", ignore_errors=True)

    watch = Delete()
    result = start.run(load_preset("quickstart", SHORT, name="run"), runs_dir=tmp_path / "runs", observers=[watch])
    assert result.exit_code == ExitCode.OK


def test_a_run_that_moved_nothing_says_so(tmp_path: Path) -> None:
    words = ("train.lr=1e-4", "train.allow_small_lr=true")
    _, watch = train(tmp_path, *words)
    assert "learned next to nothing" in watch.said()


def test_printed_commands_can_be_pasted_whatever_the_names(tmp_path: Path) -> None:
    """A name may hold `;` and blanks."""
    result, watch = train(tmp_path, name="a; echo b")
    end = next(event for event in watch.events if isinstance(event, RunEnd))
    assert end.session_steps == 4
    preset, pictures = load_preset("quickstart", (), name="x"), SimpleNamespace(held_out=[1])
    made: Any = SimpleNamespace(preset=preset, pictures=pictures, stop_rule=StopRule(), ranks=Ranks())
    command = finish.all_command(made, TrainState(best_step=3), StopReason.SIGNAL, result.folder)
    assert command is not None
    words = shlex.split(command)
    assert words[:2] == ["emotrain", "run"]
    assert words[words.index("--name") + 1] == "a; echo b-all"


def test_a_finished_run_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from emotrain.cli.app import main

    result, _ = train(tmp_path)
    result.folder.update_info(stop_reason="signal")
    started = time.monotonic()
    assert main(["resume", str(result.folder.path), "--plain"]) == 5
    assert time.monotonic() - started < 1.0
    assert "stopped automatically" in capsys.readouterr().err
