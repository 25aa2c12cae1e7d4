"""SIGKILL at every stage of a save and prune: nothing is lost, the end is the same to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from emotrain.errors import CheckpointError
from emotrain.files import no_stage
from emotrain.train import rng
from emotrain.train.checkpoint import CheckpointStore

STEPS = 5


def train(folder: Path, stage: Callable[[str], None]) -> tuple[torch.Tensor, list[float]]:
    """A toy run that resumes from what it finds: weights, history and three random generators."""
    store = CheckpointStore(folder, 2, stage=stage)
    step, weights, history = 0, torch.zeros(4), []
    torch.manual_seed(5)
    try:
        found, _ = store.load()
    except CheckpointError:
        pass
    else:
        step, weights, history = (
            found.step,
            found.tensors["adapter"]["w"],
            found.documents["state"]["history"],
        )
        rng.restore(found.tensors["rng"], found.documents["rng"])
    while step < STEPS:
        step += 1
        weights = weights * 0.9 + torch.randn(4)
        history.append(float(weights.sum()))
        states, document = rng.capture()
        store.save(
            step,
            {"adapter": {"w": weights}, "rng": states},
            {"state": {"history": history}, "rng": document},
            best=step == 1,
        )
    return weights, history


def die_at(number: int) -> Callable[[str], None]:
    count = 0

    def stage(name: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return stage


def in_child(folder: Path, number: int) -> int:
    """Run `train` in a forked child that is killed at that stage; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            train(folder, die_at(number))
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_run_killed_at_any_stage_ends_with_the_same_bits(tmp_path: Path) -> None:
    stages: list[str] = []
    straight = train(tmp_path / "straight", stages.append)
    starts = [n for n, name in enumerate(stages, 1) if name == "made temporary folder"]
    numbers = range(starts[-2], starts[-1] + 1)  # a save with a prune, and into the next
    assert {"renamed", "pruning step-00000002"} <= {stages[n - 1] for n in numbers}
    for number in (1, starts[1] - 1, *numbers):
        folder = tmp_path / str(number)
        assert os.WTERMSIG(in_child(folder, number)) == signal.SIGKILL, stages[number - 1]
        committed = stages[:number].count("renamed")
        assert max(CheckpointStore(folder, 2).steps(), default=0) == committed, stages[number - 1]
        if committed:
            assert CheckpointStore(folder, 2).load()[1] == []
        weights, history = train(folder, no_stage)
        assert torch.equal(weights, straight[0])
        assert history == straight[1]
        left = {path.name for path in folder.iterdir()}
        assert {"step-00000001", f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}"} <= left
        assert not any(name.startswith(".") for name in left), stages[number - 1]


def test_the_kill_test_sees_a_state_that_is_left_out(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", no_stage)
    folder = tmp_path / "killed"
    in_child(folder, 40)
    torch_restore, rng.restore = rng.restore, lambda tensors, document: ()
    try:
        resumed = train(folder, no_stage)
    finally:
        rng.restore = torch_restore
    assert not torch.equal(resumed[0], straight[0])
