"""Recorded passes: which are recorded, what they are given, and that nothing depends on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from emotrain.train.graphs import MOST, Graphs


class Recorder(Graphs):
    """Stands for CUDA: a recorded pass runs again on the tensors that it was recorded with."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.captures = 0
        self.gradient = torch.zeros(2)
        super().__init__(torch.device("cpu"), lambda: [self.gradient], self.lines.append)

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """As CUDA: nothing is computed while recording."""
        self.captures += 1
        result = torch.zeros(2)

        def replay() -> None:
            result.copy_(work())

        return replay, result


def double(there: Sequence[Tensor]) -> Tensor:
    """Some work."""
    return there[0] * 2 + there[1]


def inputs(number: float, size: int = 2) -> list[Tensor]:
    """Two tensors of different kinds."""
    return [torch.full((size,), number), torch.full((2,), int(number))]


def test_a_shape_is_recorded_when_it_comes_again_and_gives_the_same() -> None:
    graphs = Recorder()
    for number in range(1, 6):
        assert graphs.run("key", inputs(number), double).tolist() == [number * 3.0] * 2
    assert graphs.captures == 1


def test_results_do_not_change_when_the_next_pass_is_run() -> None:
    graphs = Recorder()
    found = [graphs.run("key", inputs(number), double) for number in range(1, 5)]
    assert [one[0].item() for one in found] == [3.0, 6.0, 9.0, 12.0]


def test_another_key_is_another_recording() -> None:
    graphs = Recorder()
    for key in ("a", "b", "a", "b", "a"):
        assert (
            graphs.run(key, inputs(1), lambda there, key=key: double(there) + (key == "b")).tolist()
            == [3.0 + (key == "b")] * 2
        )
    assert graphs.captures == 2


def test_another_shape_is_another_recording() -> None:
    graphs = Recorder()
    for size in (1, 2, 1, 2):
        graphs.run("key", inputs(1, size), double)
    assert graphs.captures == 2


def test_dropped_ones_are_recorded_again_at_once() -> None:
    graphs = Recorder()
    for _ in range(2):
        graphs.run("key", inputs(1), double)
    graphs.drop()
    assert graphs.run("key", inputs(4), double).tolist() == [12.0] * 2
    assert graphs.captures == 2


def test_no_more_are_kept_than_there_may_be() -> None:
    graphs = Recorder()
    for key in range(MOST + 3):
        for _ in range(2):
            assert graphs.run(key, inputs(1), double).tolist() == [3.0] * 2
    assert graphs.captures == MOST


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nwhen recording"), torch.OutOfMemoryError("no room")]
)
def test_where_recording_fails_the_run_goes_on_without(error: Exception) -> None:
    graphs = Recorder()

    def fail(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise error

    graphs.capture = fail  # type: ignore[method-assign]
    for number in range(1, 5):
        assert graphs.run("key", inputs(number), double).tolist() == [number * 3.0] * 2
    assert len(graphs.lines) == 1
    assert "\n" not in graphs.lines[0]


@pytest.mark.parametrize("error", [RuntimeError("illegal"), torch.OutOfMemoryError("no room")])
def test_where_the_first_replay_fails_the_run_goes_on_with_its_own_numbers(error: Exception) -> None:
    graphs = Recorder()

    def work(there: Sequence[Tensor]) -> Tensor:
        graphs.gradient += there[0]
        return double(there)

    def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        def replay() -> None:
            graphs.gradient += 100.0  # half of a pass
            raise error

        return replay, torch.zeros(2)

    graphs.capture = capture  # type: ignore[method-assign]
    for number in range(1, 5):
        graphs.gradient.zero_()
        assert graphs.run("key", inputs(number), work).tolist() == [number * 3.0] * 2
        assert graphs.gradient.tolist() == [float(number)] * 2
    assert len(graphs.lines) == 1


def test_a_pass_is_done_and_its_memory_free_before_it_is_recorded() -> None:
    graphs = Recorder()
    acts: list[str] = []

    def work(there: Sequence[Tensor]) -> Tensor:
        acts.append("pass")
        return double(there)

    def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        acts.append("capture")
        result = torch.zeros(2)

        def replay() -> None:
            result.copy_(double(inputs(1)))

        return replay, result

    graphs.capture = capture  # type: ignore[method-assign]
    for _ in range(3):
        graphs.run("key", inputs(1), work)
    assert acts == ["pass", "pass", "capture"]


def test_the_first_replay_of_a_key_is_held_beside_the_pass_itself() -> None:
    graphs = Recorder()

    def work(there: Sequence[Tensor]) -> Tensor:
        graphs.gradient += there[0]
        return double(there)

    for number in range(1, 5):
        graphs.gradient.zero_()
        assert graphs.run("key", inputs(number), work).tolist() == [number * 3.0] * 2
        assert graphs.gradient.tolist() == [float(number)] * 2
    assert graphs.lines == []


@pytest.mark.parametrize("wrong", ["result", "gradient"])
def test_a_recording_that_gives_other_numbers_is_not_used(wrong: str) -> None:
    graphs = Recorder()
    recording = False

    def work(there: Sequence[Tensor]) -> Tensor:
        graphs.gradient += there[0] * (1.1 if recording and wrong == "gradient" else 1.0)
        return double(there) * (1.1 if recording and wrong == "result" else 1.0)

    def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = torch.zeros(2)

        def replay() -> None:
            nonlocal recording
            recording = True
            result.copy_(work())
            recording = False

        return replay, result

    graphs.capture = capture  # type: ignore[method-assign]
    for number in range(1, 5):
        graphs.gradient.zero_()
        assert graphs.run("key", inputs(number), work).tolist() == [number * 3.0] * 2
        assert graphs.gradient.tolist() == [float(number)] * 2
    assert "differs by 10.0%" in graphs.lines[0]
    assert len(graphs.lines) == 1
