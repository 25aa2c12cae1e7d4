"""`run A B C`: one after another; and `log.notify`, which is told how each run ended."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from emotrain.cli import run as run_module
from emotrain.cli.app import main
from emotrain.cli.training import tell_command
from emotrain.config.load import load
from emotrain.errors import ExitCode, ResourceError
from emotrain.ranks import Ranks
from emotrain.runs.folder import RunFolder, create_run

TINY = """
extends: quickstart
dataset: {{folders: [{{path: {data}}}], trigger: x}}
train: {{max_steps: 2, loss: {{baseline: raw}}}}
network: {{targets: [mid_block.*to_q]}}
validate: {{every: 100}}
sample: {{every: 0, at_start: false}}
log: {{tensorboard: false, notify: "{notify}"}}
{more}
"""


def preset(name: str, data: str = "./pictures", notify: str = "cat >> told.jsonl", more: str = "") -> str:
    Path(f"{name}.yaml").write_text(TINY.format(data=data, notify=notify, more=more))
    return f"{name}.yaml"


def told() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("told.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for index in range(4):
        Image.new("RGB", (64, 64), (60 * index, 90, 9)).save(f"pictures/{index}.png")
        Path(f"pictures/{index}.txt").write_text(f"x, a square, number {index}")
    return tmp_path


def test_a_failure_does_not_stop_the_next_and_gives_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", preset("a"), preset("b", data="./nowhere"), preset("c"), "--plain"]) == 3
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(Path("runs", name, "lora.safetensors")) for name in ("a", "c")]
    assert said.err.startswith("warning: b would be refused as things are")
    assert "run 2 of 3: b" in said.err
    assert "2 of 3 runs ended well" in said.err
    assert said.err.count("nothing of it is loaded again") == 1  # for c: b was refused before it had a model
    assert [(line["run"], line["stop_reason"], line["exit_code"]) for line in told()] == [
        ("a", "max_steps", 0),
        ("b", "failed", 3),
        ("c", "max_steps", 0),
    ]
    assert told()[0]["lora"] == str(Path("runs", "a", "lora.safetensors"))


def test_a_run_of_the_queue_is_the_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The second trains on the first one's base, which is not loaded again."""
    first, second = preset("a", more="save: {dtype: fp32}"), preset("b", more="save: {dtype: fp32}")
    assert main(["run", first, second, "--plain"]) == 0
    assert capsys.readouterr().err.count("nothing of it is loaded again") == 1
    assert main(["run", second, "--plain", "--runs-dir", "alone"]) == 0
    assert "nothing of it is loaded again" not in capsys.readouterr().err
    from safetensors.numpy import load_file

    queued, alone = load_file("runs/b/lora.safetensors"), load_file("alone/b/lora.safetensors")
    assert queued.keys() == alone.keys()
    assert all((queued[name] == alone[name]).all() for name in alone)


def test_a_run_that_fails_hands_no_base_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What broke it may have reached the weights that the next run would share."""
    from emotrain.families.kept import KeptBase
    from emotrain.runs import start

    endings = iter([ExitCode.OK, ExitCode.DIVERGED, ResourceError("full"), ExitCode.OK, ExitCode.OK])

    def load_only(*_: Any, kept: KeptBase, **__: Any) -> Any:
        kept.load(kept.next, [], dict)
        return SimpleNamespace(facts=dict)

    def train_and_finish(*_: Any) -> Any:
        ending = next(endings)
        if isinstance(ending, ResourceError):
            raise ending
        return SimpleNamespace(exit_code=ending)

    monkeypatch.setattr(start, "load", load_only)
    monkeypatch.setattr(start.out_of_memory, "try_largest", lambda *_: None)
    monkeypatch.setattr(start, "train_and_finish", train_and_finish)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 40, total=1 << 40))
    kept, reused = KeptBase(), []
    kept.next = ("the model of all",)
    for name in ("ends-well", "diverges", "fails", "ends-well-too", "last"):
        with contextlib.suppress(ResourceError):
            start.run(load(preset("a"), (), name).preset, runs_dir=Path("runs"), observers=[], kept=kept)
        reused.append(kept.reused)
    assert reused == [False, True, False, False, True]


def test_fail_fast_stops_at_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", preset("b", data="./nowhere"), preset("c"), "--fail-fast"]) == 3
    assert "0 of 2 runs ended well; not begun: c" in capsys.readouterr().err
    assert not Path("runs/c").exists()


def test_ctrl_c_stops_the_queue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emotrain.runs.start.run", interrupted)
    assert main(["run", preset("a"), preset("b")]) == 130
    assert "not begun: b" in capsys.readouterr().err


def test_what_one_of_several_processes_alone_fails_at_ends_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it in the first run, and would take what it says in the second for that."""
    ranks, begun = Ranks(), []
    ranks.world, ranks.lead = 2, 1
    shared, alone = ResourceError("full"), ResourceError("full")
    shared.of_rank = shared.is_silent = True
    failures = iter([shared, KeyError("a bug"), shared, alone])

    def fail(one: Any, *_: Any) -> None:
        begun.append(one.preset.name)
        raise next(failures)

    monkeypatch.setattr(run_module, "_one", fail)
    loaded = [load(preset(name), (), name) for name in ("a", "b", "c")]
    for kind in (KeyError, ResourceError):
        with pytest.raises(kind):
            run_module._queue(loaded, Path("runs"), True, False, False, ranks)
    assert begun == ["a", "b", "a", "b"]


def test_a_run_that_had_ended_before_a_restart_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun starts a whole queue again: what is done is left, and what is not goes on."""
    ranks, went_on = Ranks(), []
    ranks.restarts, ranks.launch = 1, ("this one",)
    monkeypatch.setattr(run_module, "go_on", lambda ranks, run, *_, **__: went_on.append(run))
    loaded = [load(preset(name), (), name) for name in ("a", "b")]
    for one in loaded:
        run = create_run(Path("runs"), one.preset.name, one.preset.to_dict(), launch=["this one"])
        (run.checkpoints_dir / "step-00000002").mkdir(parents=True)
    done = RunFolder(Path("runs/a"))
    done.lora_path.touch()
    done.update_info(finished="now", stop_reason="max_steps", steps=2)
    assert run_module._queue(loaded, Path("runs"), True, False, False, ranks) == [0, 0]
    assert went_on == [str(Path("runs/b"))]
    assert "run `a` is done: it reached train.max_steps after step 2" in capsys.readouterr().err


def test_a_run_may_go_on_from_the_one_before_it() -> None:
    more = "start_from: {continue: runs/a/lora.safetensors}"
    assert main(["run", preset("a"), preset("b", more=more), "--plain"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a.yaml", "a.yaml"], "2 of the runs would be named `a`"),
        (["a.yaml", "b.yaml", "--name", "x"], "--name is one name"),
        (["a.yaml", "wrong.yaml", "nowhere.yaml"], "`wrong` is not a key"),
        (["a.yaml", "wrong.yaml", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_what_is_wrong_with_any_preset_is_told_before_the_first_run(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    preset("a"), preset("b"), preset("wrong", more="wrong: 1")
    assert main(["run", *words]) == 2
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_command_that_fails_or_hangs_costs_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tell_command("cat > said.json", '{"a": 1}') is None
    assert json.loads(Path("said.json").read_text()) == {"a": 1}
    assert tell_command("echo no such phone; exit 3", "") == "failed with exit code 3: no such phone"
    assert tell_command("true", "x" * 10**6) is None  # it reads nothing
    monkeypatch.setattr("emotrain.cli.training.NOTIFY_S", 0.2)
    begun = time.monotonic()
    assert "took longer" in str(tell_command("sleep 20", ""))
    assert time.monotonic() - begun < 10


def test_the_command_is_shown_by_check_and_stays_out_of_what_is_given_away(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "cat > told.jsonl; echo s3cret"
    assert main(["check", preset("a", notify=secret)]) == 0
    assert f"runs `{secret}`" in capsys.readouterr().out
    assert main(["run", "a.yaml", "--plain"]) == 0
    assert "s3cret" not in Path("runs/a/report.html").read_text()
    assert b"s3cret" not in Path("runs/a/lora.safetensors").read_bytes()
    kept = yaml.safe_load(Path("runs/a/preset.yaml").read_text())  # noqa: TID251  what any reader sees
    assert kept["log"]["notify"] == secret  # `resume` needs it
