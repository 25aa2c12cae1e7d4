"""Out of memory: how it is known, that its tensors are let go, and that trying the largest batch changes nothing."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fake_run import FakeFamily, Recorder, limits, make_parts

from emotrain.errors import ConfigError, ExitCode
from emotrain.train.loop import fit
from emotrain.train.memory import OutOfMemory, asked_gib, describe, is_out_of_memory, rehearse, with_memory
from emotrain.train.state import TrainState

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB"
CPU = "err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes."
MPS = "MPS backend out of memory (allocated: 1.00 GB). Tried to allocate 512.00 MiB on private pool."
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    ("error", "gib"),
    [
        (torch.OutOfMemoryError(CUDA), 2.5),
        (RuntimeError(CPU), 1.0),
        (RuntimeError(MPS), 0.5),
        (RuntimeError(CUBLAS), None),
        (MemoryError(), None),
    ],
)
def test_every_library_s_way_of_saying_it_is_understood(error: BaseException, gib: float | None) -> None:
    def fail() -> None:
        raise error

    assert is_out_of_memory(error)
    assert asked_gib(error) == gib
    with pytest.raises(OutOfMemory, match="^out of memory at step 7") as caught:
        with_memory("at step 7", fail)
    assert caught.value.exit_code == ExitCode.RESOURCES


def test_other_errors_pass_as_they_are() -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes") as caught:
        with_memory("at step 7", fail)
    assert not isinstance(caught.value, OutOfMemory)


def test_the_tensors_that_filled_the_memory_are_let_go_before_the_error_is_raised() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def fill() -> None:
        activations = torch.zeros(10)
        seen.append(weakref.ref(activations))
        raise torch.OutOfMemoryError(CUDA)

    gc.disable()  # what only the collector finds would not be free in time
    try:
        with pytest.raises(OutOfMemory) as caught:
            with_memory("at step 1", fill)
        assert seen[0]() is None
    finally:
        gc.enable()
    assert caught.value.__context__ is None


def states() -> list[object]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


def test_trying_a_batch_leaves_weights_gradients_and_random_states_as_they_were() -> None:
    class Restless(FakeFamily):
        vae_scale = 8

        def predict(self, *words):
            torch.rand(3), np.random.rand(3), random.random()  # as dropout would
            return super().predict(*words)

    recorder = Recorder()
    family = Restless()
    parts = make_parts(recorder, family=family, adapter=family.adapter)
    before, weights = states(), parts.adapter.state()["layer.weight"]
    rehearse(family, parts.objective, family.adapter, parts.data.batch(0), reserve=1000)
    assert family.calls == 1
    assert states() == before
    assert torch.equal(parts.adapter.state()["layer.weight"], weights)
    assert all(parameter.grad is None for parameter in family.adapter.parameters())


def test_a_batch_that_does_not_fit_is_named_and_leaves_no_gradient() -> None:
    class Full(FakeFamily):
        vae_scale = 8

        def predict(self, *words):
            torch.rand(3)
            raise torch.OutOfMemoryError(CUDA)

    family = Full()
    parts = make_parts(Recorder(), family=family, adapter=family.adapter)
    before = states()
    with pytest.raises(OutOfMemory) as caught:
        rehearse(family, parts.objective, family.adapter, parts.data.batch(0))
    told = "out of memory on the largest batch, 2 pictures of 32x32: 2.50 GiB more were needed"
    assert caught.value.message == told
    assert states() == before


def test_one_picture_is_said_in_the_singular() -> None:
    batch = make_parts(Recorder()).data.batch(2)
    assert describe(batch, 8) == "1 picture of 32x32"


def test_a_step_that_runs_out_of_memory_is_not_done_and_the_state_before_it_is_saved() -> None:
    class Filling(FakeFamily):
        full_at = 6

        def predict(self, *words):
            if self.calls + 1 == self.full_at:
                raise torch.OutOfMemoryError(CUDA)
            return super().predict(*words)

    def run(full_at: int) -> tuple[Recorder, TrainState, torch.Tensor]:
        family, recorder, state = Filling(), Recorder(), TrainState()
        family.full_at = full_at
        parts = make_parts(recorder, family=family, adapter=family.adapter, validation=False)
        parts = replace(parts, optimizer=type(parts.optimizer)(family.adapter.parameters()))
        words = limits(max_steps=2, gradient_accumulation_steps=3, save_every=2)
        if full_at:
            with pytest.raises(OutOfMemory, match="at step 2: 2.50 GiB"):
                fit(parts, words, state)
        else:
            fit(parts, replace(words, max_steps=1), state)
        return recorder, state, family.adapter.state()["layer.weight"]

    recorder, state, weights = run(6)
    assert recorder.saves == [1]
    _, after_one, expected = run(0)
    assert torch.equal(weights, expected)
    assert (state.step, state.micro_step, state.samples_seen) == (1, 3, after_one.samples_seen)


def test_an_operation_without_a_deterministic_form_is_named_with_the_key_to_change() -> None:
    def scatter() -> None:
        raise RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_determin...")

    with pytest.raises(ConfigError, match=r"train.deterministic is true, and `put_` has no deterministic form"):
        with_memory("at step 1", scatter)
