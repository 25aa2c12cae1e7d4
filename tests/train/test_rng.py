"""Random states come back exactly, and are not drawn from on the way."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from emotrain.errors import CheckpointError
from emotrain.files import decode_json, encode_json
from emotrain.train import rng


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_kernels_are_chosen_on_cuda_and_nothing_changes_on_the_cpu(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", chosen.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rng.deterministic_kernels(wanted)
    assert chosen == []
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rng.deterministic_kernels(wanted)
    assert chosen == [wanted]
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None) == (":4096:8" if wanted else None)


def draws() -> tuple[object, ...]:
    return (
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        np.random.standard_normal(3).tolist(),
        np.random.random(2).tolist(),
        random.random(),
        random.gauss(0, 1),
        random.sample(range(100), 5),
    )


def test_every_generator_goes_on_where_it_was_after_a_trip_through_json() -> None:
    for _ in range(3):  # an odd number of normal draws leaves half a pair behind in numpy and python
        np.random.standard_normal()
        random.gauss(0, 1)
        tensors, document = rng.capture()
        document = decode_json(encode_json(document))
        wanted = draws()
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        assert rng.restore(tensors, document) == ()
        assert draws() == wanted


def test_one_seed_is_for_every_generator() -> None:
    rng.seed_all(7)
    first = draws()
    rng.seed_all(7)
    assert draws() == first
    rng.seed_all(8)
    assert not any(one == other for one, other in zip(draws(), first, strict=True))


def test_capturing_draws_nothing() -> None:
    first = rng.capture()
    second = rng.capture()
    assert first[1] == second[1]
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])


@pytest.mark.parametrize("name", ["torch_cpu", "numpy_keys"])
def test_a_missing_or_short_state_is_refused_and_nothing_is_changed(name: str) -> None:
    tensors, document = rng.capture()
    broken = {key: value for key, value in tensors.items() if key != name}
    for state in (broken, {**broken, name: tensors[name][:5]}):
        with pytest.raises(CheckpointError, match="random state"):
            rng.restore(state, document)
    with pytest.raises(CheckpointError, match="random state"):
        rng.restore(tensors, {**document, "python": {"version": 3, "words": [1]}})
    assert rng.capture()[1] == document


def test_other_devices_are_said_and_do_not_stop_the_run() -> None:
    tensors, document = rng.capture()
    tensors |= {"torch_cuda_0": tensors["torch_cpu"], "torch_cuda_1": tensors["torch_cpu"]}
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    (notice,) = rng.restore(tensors, {**document, "cuda_devices": 2})
    assert "from 2 CUDA devices" in notice
    assert "no longer bit-identical" in notice
