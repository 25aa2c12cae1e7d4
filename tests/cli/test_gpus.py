"""`--gpus 2` and torchrun as a user starts them: real processes, signals, kills, restarts, two rendezvous'd folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from emotrain.cli.launch import config, ended, leave_with, refuse_missing, stop_with
from emotrain.errors import ResourceError
from emotrain.ranks import LOST, Ranks
from emotrain.train.signals import StopSignals

PRESET = """
model: builtin:tiny-sd
dataset: {folders: [{path: "builtin:example"}], trigger: inkmoji, resolution: 64, buckets: {step: 8, min: 64, max: 64}}
network: {rank: 2, targets: [mid_block.*to_q]}
train: {max_steps: 8}
save: {every: 3}
validate: {every: 4}
sample: {every: 0}
stop: {mode: "off"}
log: {tensorboard: false}
"""
LIMIT_S = 400


def test_more_gpus_than_there_are_are_refused_in_one_line() -> None:
    refuse_missing(2, 0, False)  # no GPU: processes on the CPU
    refuse_missing(2, 2, False)
    with pytest.raises(ResourceError, match="--gpus is 4, and torch sees 2 here"):
        refuse_missing(4, 2, False)
    with pytest.raises(ResourceError, match="--gpus is 2, and torch sees 1 here"):
        refuse_missing(2, 0, True)  # a Mac's one


def test_the_launcher_s_words_are_those_of_torch(tmp_path: Path) -> None:
    made = config(3, str(tmp_path))
    assert (made.nproc_per_node, made.max_restarts, made.rdzv_backend) == (3, 0, "c10d")


@pytest.mark.parametrize("code", [-signal.SIGKILL, LOST])
def test_a_lost_process_is_told_by_the_launcher(code: int) -> None:
    with pytest.raises(ResourceError, match=r"rank 1 was (killed \(SIGKILL\)|lost), and with it the run") as told:
        ended(1, code, 2)
    hint = "`emotrain resume RUN --gpus 2` goes on from the newest checkpoint; where none is saved yet, start anew"
    assert hint in (told.value.hint or "")


def test_a_process_that_told_its_own_error_gives_its_exit_code() -> None:
    assert [ended(1, code, 2) for code in (3, 130, 1)] == [3, 130, 1]


@pytest.mark.parametrize(
    ("local", "world", "command"),
    [
        (1, 1, "emotrain resume runs/a"),
        (2, 2, "emotrain resume runs/a --gpus 2"),
        (1, 2, "torchrun ... -m emotrain resume runs/a"),  # one GPU on each of two machines
    ],
)
def test_the_command_to_go_on_begins_as_many_processes(local: int, world: int, command: str) -> None:
    ranks = Ranks()
    ranks.local_world, ranks.world = local, world
    assert ranks.command("resume runs/a") == command


@contextmanager
def launched(worker: Callable[[Any], None]) -> Iterator[tuple[Any, Any]]:
    """A process that has started another, which does `worker` with the other end of the pipe that comes with it."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)

    def launcher() -> None:
        fork.Process(target=worker, args=(theirs,)).start()
        time.sleep(60)

    process = fork.Process(target=launcher)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


def test_a_process_whose_launcher_was_killed_ends_when_its_work_is_done() -> None:
    """It would wait for its result to be read, with its part of the GPU's memory, for ever."""

    def worker(pipe: Any) -> None:
        threading.Thread(target=leave_with, args=(multiprocessing.parent_process(), 0), daemon=True).start()
        pipe.send("done")
        time.sleep(60)

    with launched(worker) as (launcher, said):
        assert said.recv() == "done"
        assert not said.poll(0.1)  # it waits for as long as there is a launcher
        launcher.kill()
        assert said.poll(10)
        with pytest.raises(EOFError):  # all that could write into the pipe are gone
            said.recv()


def test_a_launcher_that_is_killed_stops_its_processes_where_sigint_is_ignored() -> None:
    """They trained to their end: of a killed launcher the system tells by SIGINT alone."""

    def worker(pipe: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopSignals() as signals:
            threading.Thread(target=stop_with, args=(os.getppid(),), daemon=True).start()
            pipe.send(signals.name)
            until = time.monotonic() + 20
            while not signals and time.monotonic() < until:
                time.sleep(0.05)
            pipe.send(signals.name)

    with launched(worker) as (launcher, said):
        assert said.recv() is None
        launcher.kill()
        assert said.poll(10)
        assert said.recv() == "SIGTERM"


class Started:
    """A command of several processes."""

    def __init__(self, words: Sequence[str], where: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
        )  # fmt: skip

    def at(self, step: int, act: Callable[[], None]) -> Started:
        """Do something once a step has been told."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event.get("event") == "step" and event["step"] == step:
                act()
                return self
        raise AssertionError(self.process.stderr.read() if self.process.stderr else "")

    def end(self) -> tuple[int, list[dict[str, Any]], str]:
        """Exit code, the events that are left, and stderr."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, [json.loads(line) for line in out.splitlines()], err

    def ranks(self) -> list[int]:
        """The training processes, rank 0's first."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                above = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (entry / "cmdline").read_bytes()
            except (OSError, ValueError, IndexError):
                continue
            if above == self.process.pid and (b"spawn_main" in words or b"emotrain" in words):
                found.append(int(entry.name))
        assert len(found) == 2
        return sorted(found)


def emotrain(where: Path, *words: str) -> Started:
    return Started(["emotrain", *words, "--json"], where)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "p.yaml").write_text(PRESET)
    return tmp_path


def weights(run: Path, step: int = 8) -> dict[str, Any]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "adapter.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert all(mine[key].equal(theirs[key]) for key in theirs)


@pytest.mark.slow
def test_a_run_on_two_is_stopped_killed_and_goes_on(place: Path) -> None:
    straight = emotrain(place, "run", "p.yaml", "--gpus", "2", "--name", "straight").end()
    assert straight[0] == 0
    assert "2 processes share this machine's CPU" in straight[2]

    run = emotrain(place, "run", "p.yaml", "--gpus", "2", "--name", "stopped")
    code, events, err = run.at(2, lambda: run.process.send_signal(signal.SIGINT)).end()
    assert (code, events[-1]["stop_reason"]) == (130, "interrupted")
    assert events[-1]["resume_command"] == "emotrain resume runs/stopped --gpus 2"
    assert err.count("stopping after this step") == 1

    run = emotrain(place, "resume", "stopped", "--gpus", "2")
    code, events, err = run.at(5, lambda: os.kill(run.ranks()[1], signal.SIGKILL)).end()
    assert (code, events[-1]["error"]["message"]) == (6, "rank 1 was killed (SIGKILL), and with it the run")
    assert err.count("error:") == 1
    assert "Traceback" not in err

    run = emotrain(place, "resume", "stopped", "--gpus", "2")
    code, events, err = run.at(7, lambda: os.kill(run.ranks()[0], signal.SIGKILL)).end()
    assert (code, events[-1]["error"]["message"]) == (6, "rank 0 was killed (SIGKILL), and with it the run")

    assert emotrain(place, "resume", "stopped", "--gpus", "2").end()[0] == 0
    assert_equal(place / "runs" / "stopped", place / "runs" / "straight")


@pytest.mark.slow
def test_a_refusal_is_told_once_with_its_exit_code(place: Path) -> None:
    (place / "bad.yaml").write_text(PRESET.replace("builtin:example", "./nowhere"))
    code, events, err = emotrain(place, "run", "bad.yaml", "--gpus", "2").end()
    assert (code, len(events), err.count("error:")) == (3, 1, 1)
    assert not (place / "runs").exists()


@pytest.mark.slow
def test_torchrun_starts_again_from_the_last_checkpoint(place: Path) -> None:
    assert emotrain(place, "run", "p.yaml", "--gpus", "2", "--name", "straight").end()[0] == 0
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    run = Started([*words, "-m", "emotrain", "run", "p.yaml", "--name", "again", "--json"], place)
    code, events, said = run.at(5, lambda: os.kill(run.ranks()[1], signal.SIGKILL)).end()
    assert code == 0, said
    start = next(event["start_step"] for event in events if event.get("event") == "run_start")
    assert start in (3, 6)  # 6 where the run was a step ahead of the kill
    assert_equal(place / "runs" / "again", place / "runs" / "straight")


@pytest.mark.slow
def test_two_machines_find_each_other_and_train_in_step(place: Path, tmp_path: Path) -> None:
    """Two agents with folders and caches of their own; the run's folder is where rank 0 is, for its resume too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [tmp_path / "a", tmp_path / "b"]
    for machine in machines:
        machine.mkdir()
        (machine / "p.yaml").write_text(PRESET)

    def start(*words: str) -> list[tuple[int, list[dict[str, Any]], str]]:
        agent = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        agent += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "mika", "--local-addr", "localhost"]
        started = [
            Started([*agent, "-m", "emotrain", *words, "--json"], machine, EMOTRAIN_CACHE=str(machine / "cache"))
            for machine in machines
        ]
        return [one.end() for one in started]

    ended = start("run", "p.yaml", "--name", "both", "--set", "train.max_steps=6")
    assert [code for code, *_ in ended] == [0, 0]
    having = [machine for machine in machines if (machine / "runs").exists()]
    assert len(having) == 1  # rank 0's
    ended = start("resume", "both", "--set", "train.max_steps=8")  # rank 0 may be the other machine now
    assert [code for code, *_ in ended] == [0, 0]
    assert [machine for machine in machines if (machine / "runs").exists()] == having
    assert emotrain(place, "run", "p.yaml", "--gpus", "2", "--name", "straight").end()[0] == 0
    assert_equal(having[0] / "runs" / "both", place / "runs" / "straight")
