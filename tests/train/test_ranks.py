"""Several processes that train one adapter: the numbers of one process, the same decisions, errors told once."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_run import FakeData, Recorder, limits, make_parts
from processes import together

import emotrain
from emotrain import ranks as ranks_module
from emotrain.errors import ConfigError, DatasetError, ResourceError
from emotrain.ranks import (
    ALONE,
    JoinedRanks,
    LostRankError,
    Ranks,
    _token,
    is_launched,
    refuse_others,
    version,
)  # fmt: skip
from emotrain.train.events import StepEnd, ValidationEnd
from emotrain.train.loop import fit
from emotrain.train.state import TrainState


def trained(
    ranks: Ranks, *, act: Any = None, interrupted: Callable[[], bool] = lambda: False, **changes: Any
) -> dict[str, Any]:
    """All that a run of the tiny model says, on these ranks; `act` may change its parts' family."""
    recorder = Recorder()
    parts = make_parts(recorder, data=FakeData(7, 2), ranks=ranks, interrupted=interrupted)
    parts.validation.ranks = ranks
    if act is not None:
        act(ranks, parts.family)
    state = TrainState()
    outcome = fit(parts, limits(**{"gradient_accumulation_steps": 4, **changes}), state)
    return {
        "outcome": outcome.sentence,
        "steps": [(e.step, e.loss, e.grad_norm) for e in recorder.of(StepEnd)],
        "validations": [(e.loss, e.drift) for e in recorder.of(ValidationEnd)],
        "saves": recorder.saves,
        "weights": parts.adapter.layer.weight.flatten().tolist(),
        "samples": [[(one.id, one.position, one.loss) for one in event.samples] for event in recorder.of(StepEnd)],
        "state": (state.micro_step, state.samples_seen, state.guard.skipped),
    }  # fmt: skip


def flat(rows: list[tuple[float, ...]]) -> list[float]:
    return [number for row in rows for number in row]


@pytest.mark.parametrize("world", [2, 3])
def test_many_processes_give_the_numbers_of_one(world: int) -> None:
    """Four micro-batches a step, some of them smaller: three processes do not share them evenly."""
    alone, *others = trained(ALONE), *together(lambda ranks: trained(ranks), world)
    for other in others:
        assert other["state"] == alone["state"]
        assert other["saves"] == alone["saves"]
        assert other["weights"] == pytest.approx(alone["weights"], abs=1e-7)
        assert flat(other["steps"]) == pytest.approx(flat(alone["steps"]))
        assert flat(other["validations"]) == pytest.approx(flat(alone["validations"]), abs=1e-9)
        for mine, theirs in zip(other["samples"], alone["samples"], strict=True):
            assert [row[0] for row in mine] == [row[0] for row in theirs]
            assert [row[1] for row in mine] == [row[1] for row in theirs]
            assert [row[2] for row in mine] == pytest.approx([row[2] for row in theirs])
    assert all(other["weights"] == others[0]["weights"] for other in others)  # to the last bit


def test_another_version_on_another_machine_is_refused_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "version", lambda: f"0.2.0 (source {os.environ.get('RANK')})")
    errors = together(lambda ranks: None)
    words = "rank 1 is emotrain 0.2.0 (source 1), and rank 0 is 0.2.0 (source 0)"
    assert errors == [("ConfigError", 2, [words], False), ("ConfigError", 2, [words], True)]


def test_the_version_tells_sources_apart() -> None:
    assert version() == version()
    assert re.fullmatch(rf"{re.escape(emotrain.__version__)} \(source [0-9a-f]{{8}}\)", version())


def test_processes_with_and_without_a_gpu_do_not_train_together() -> None:
    same = ["0.2.0 (source 0)"] * 3
    refuse_others(same, ["GPU"] * 3)
    refuse_others(same, ["CPU"] * 3)
    with pytest.raises(ResourceError, match="no GPU on the machine of rank 1, and rank 0 has one"):
        refuse_others(same, ["GPU", "CPU", "GPU"])


def test_a_picture_that_one_process_cannot_draw_ends_the_run_in_all() -> None:
    """The others wait for it, in place of taking the next step without it."""

    def work(ranks: Ranks) -> Any:
        parts = make_parts(Recorder(), data=FakeData(7, 2), ranks=ranks)
        parts.validation.ranks = ranks

        def draw(step: int) -> None:
            if ranks.first and step:
                raise DatasetError("no room for the picture")

        fit(replace(parts, sample=draw), limits(sample_every=1), TrainState())

    errors = together(work)
    assert [(one[0], one[2], one[3]) for one in errors] == [
        ("DatasetError", ["no room for the picture"], False),
        ("DatasetError", ["no room for the picture"], True),
    ]


def test_a_process_without_a_share_of_the_step_takes_part() -> None:
    alone = trained(ALONE, gradient_accumulation_steps=1)
    first, second = together(lambda ranks: trained(ranks, gradient_accumulation_steps=1))
    assert first["weights"] == second["weights"] == pytest.approx(alone["weights"])


def test_numbers_that_are_not_finite_in_one_process_leave_the_step_out_in_all() -> None:
    def poison(ranks: Ranks, family: Any) -> None:
        family.poison = {5} if ranks.rank == 1 else set()

    found = together(lambda ranks: trained(ranks, act=poison))
    assert found[0]["state"][2] == 1
    assert found[0] == found[1]


def test_a_process_that_was_told_to_stop_stops_all_after_the_same_step() -> None:
    def run(ranks: Ranks) -> Any:
        assert ranks.local_world == ranks.world == 2
        calls = iter(range(10**6))
        return trained(ranks, interrupted=lambda: ranks.rank == 1 and next(calls) > 1)

    first, second = together(run)
    assert first["outcome"].startswith("stopped by you after step")
    assert first == second
    assert 0 < len(first["steps"]) < 6


def test_no_memory_in_one_process_saves_once_and_ends_all() -> None:
    def starve(ranks: Ranks, family: Any) -> None:
        plain = family.predict

        def predict(*words: Any) -> Any:
            if ranks.rank == 1 and family.calls == 9:
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
            return plain(*words)

        family.predict = predict

    def run(ranks: Ranks) -> Any:
        with ranks.together():
            return trained(ranks, act=starve, save_every=100)

    first, second = together(run)
    assert first == ("OutOfMemory", 6, first[2], False)
    assert first[2][0].startswith("out of memory at step")
    assert "on rank 1: 2.00 GiB more were needed" in first[2][0]
    assert second[3]  # rank 0 tells it


def test_an_error_of_one_process_ends_all_and_is_told_once() -> None:
    def run(ranks: Ranks) -> Any:
        with ranks.together():
            if ranks.rank == 1:
                raise DatasetError("pictures do not exist", "look for them")
            return ranks.meet("here")

    assert together(run) == [
        ("DatasetError", 3, ["rank 1: pictures do not exist"], False),
        ("DatasetError", 3, ["rank 1: pictures do not exist"], True),
    ]


def test_of_two_errors_rank_0_s_is_told() -> None:
    def run(ranks: Ranks) -> Any:
        with ranks.together():
            raise ConfigError(f"mistake of {ranks.rank}")

    assert [error[2] for error in together(run)] == [["mistake of 0"]] * 2


def test_gradients_that_one_process_has_alone_reach_all_and_missing_ones_stay_missing() -> None:
    def run(ranks: Ranks) -> Any:
        parameters = [torch.zeros(2, 2, requires_grad=True) for _ in range(3)]
        parameters[0].grad = torch.full((2, 2), 1.0 + ranks.rank)
        if ranks.rank == 1:
            parameters[1].grad = torch.ones(2, 2)
        numbers = torch.tensor([float(ranks.rank), 1.0])
        ranks.sum_gradients(parameters, numbers, lambda: False)
        return [None if p.grad is None else p.grad.flatten().tolist() for p in parameters], numbers.tolist()

    gradients, numbers = [[3.0] * 4, [1.0] * 4, None], [1.0, 2.0]
    assert together(run) == [(gradients, numbers)] * 2


def test_a_process_that_dies_is_noticed_by_the_other() -> None:
    def run(ranks: JoinedRanks) -> Any:
        if ranks.rank == 1:
            ranks_module._open.clear()
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(LostRankError) as lost:
            ranks.sum_gradients([torch.zeros(2, requires_grad=True)], torch.zeros(1), lambda: False)
        raise lost.value

    first, second = together(run, dead=1)
    assert first[:2] == ("LostRankError", 6)
    assert not first[3]
    assert second is None


def test_one_that_was_told_to_stop_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "WAIT_S", 0.2)

    def run(ranks: Ranks) -> Any:
        if ranks.rank == 1:
            time.sleep(1.0)
            return None
        ranks.sum_gradients([torch.zeros(2, requires_grad=True)], torch.zeros(1), lambda: True)
        return None

    assert together(run, dead=1)[0][:2] == ("LostRankError", 6)


def test_values_of_any_length_and_numbers_arrive_as_they_are() -> None:
    value = [1 / 3, math.pi * 1e-300, "ü" * 1000]

    def run(ranks: Ranks) -> Any:
        sent = ranks.send(b"x" * 100_000 if ranks.first else None)
        return ranks.meet(value if ranks.rank else None), len(sent)

    assert together(run) == [([None, value], 100_000)] * 2


def test_what_a_meeting_sent_is_there_until_the_next_one() -> None:
    """gloo's thread must not be the last to let go of it: it would wait for Python's lock."""

    def run(ranks: Ranks) -> Any:
        sent: list[weakref.ref[torch.Tensor]] = []
        gather = torch.distributed.all_gather

        def noted(rows: list[torch.Tensor], own: torch.Tensor) -> None:
            sent.extend(map(weakref.ref, (*rows, own)))
            gather(rows, own)

        torch.distributed.all_gather = noted
        ranks.meet("a")
        first = [one() is not None for one in sent]
        ranks.meet("b")
        return first, sum(one() is not None for one in sent)

    assert together(run) == [([True] * 6, 6)] * 2


def test_a_start_reads_nothing_of_what_an_earlier_one_left_in_the_store() -> None:
    store = torch.distributed.HashStore()
    tokens = []
    for late in (0.0, 0.1, 0.1):  # rank 0 first finds the question of the start before
        with ThreadPoolExecutor(3) as threads:
            first = threads.submit(_token, store, 0, 3)
            time.sleep(late)
            others = [threads.submit(_token, store, rank, 3) for rank in (1, 2)]
            (token,) = {each.result(20) for each in (first, *others)}
        tokens.append(token)
    assert len(set(tokens)) == 3


def test_one_process_is_alone_whatever_its_shell_says() -> None:
    several = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert is_launched(several)
    assert not is_launched({**several, "WORLD_SIZE": "1"})
    assert not is_launched({"WORLD_SIZE": "8"})


def test_one_by_one_each_process_works_alone_and_an_error_ends_all(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def work(ranks: Ranks) -> Any:
        def act() -> int:
            with log.open("a") as file:
                file.write(f"begin {ranks.rank}\n")
                file.flush()
                file.write(f"end {ranks.rank}\n")
            return ranks.rank * 10

        found = ranks.one_by_one(act)
        with ranks.together():
            ranks.one_by_one(lambda: broken() if ranks.rank else found)
        return found

    def broken() -> int:
        raise DatasetError("it is broken")

    ends = together(work)
    assert log.read_text().split("\n")[:4] == ["begin 0", "end 0", "begin 1", "end 1"]
    assert [end[:3] for end in ends] == [("DatasetError", 3, ["rank 1: it is broken"])] * 2
