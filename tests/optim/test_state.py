"""Saving and going on: exact, plain, and refused where it does not fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.errors import CheckpointError
from emotrain.optim import WrongStateError, build_optimizer
from emotrain.optim.registry import EMO

KINDS = [(name, generation) for name, cls in EMO.items() for generation in cls.generations]


def make(name: str, generation: str | None = None, dtype=torch.float32, **words):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 2), (4,), (2, 1, 3))]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    return params, EMO[name](groups, generation=generation, notify=False, **words)


def train(params, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.observe(1.0 / (1 + 0.2 * step) + 0.1 * (step % 3))
        optimizer.step()


@pytest.mark.parametrize(("name", "generation"), KINDS)
@pytest.mark.parametrize("use_shadow", [False, True])
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(name: str, generation: str, use_shadow: bool) -> None:
    straight, optimizer = make(name, generation, use_shadow=use_shadow)
    train(straight, optimizer, 0, 30)
    resumed, first = make(name, generation, use_shadow=use_shadow)
    train(resumed, first, 0, 17)
    _, second = make(name, generation, use_shadow=use_shadow)
    for group, other in zip(second.param_groups, first.param_groups, strict=True):
        group["params"] = other["params"]
    second.load_state_dict(first.state_dict())
    assert second.reading == first.reading
    train(resumed, second, 17, 30)
    assert all(torch.equal(x, y) for x, y in zip(straight, resumed, strict=True))
    assert second.reading == optimizer.reading
    assert second.should_stop == optimizer.should_stop


@given(st.integers(0, 12), st.sampled_from(KINDS))
@settings(max_examples=30, deadline=None)
def test_a_state_is_the_same_after_a_round_trip_at_any_step(steps: int, kind: tuple[str, str]) -> None:
    params, optimizer = make(*kind)
    train(params, optimizer, 0, steps)
    _, other = make(*kind)
    other.load_state_dict(optimizer.state_dict())
    again, before = other.state_dict(), optimizer.state_dict()
    assert again["emotion"] == before["emotion"]
    assert again["param_groups"] == before["param_groups"]
    for index, slots in before["state"].items():
        assert all(torch.equal(again["state"][index][slot], value) for slot, value in slots.items())


def test_a_state_saved_between_observe_and_step_goes_on_with_the_step() -> None:
    params, optimizer = make("emosens")
    train(params, optimizer, 0, 3)
    optimizer.observe(0.5)
    _, other = make("emosens")
    other.load_state_dict(optimizer.state_dict())
    other.step()


@pytest.mark.parametrize("name", EMO)
def test_the_state_is_plain_numbers_and_tensors_and_its_numbers_go_through_json(name: str) -> None:
    params, optimizer = make(name, use_shadow=True)
    train(params, optimizer, 0, 3)
    state = optimizer.state_dict()
    assert json.loads(json.dumps(state["emotion"])) == state["emotion"]
    json.dumps(state["param_groups"])
    for slots in state["state"].values():
        assert slots
        assert all(isinstance(value, torch.Tensor) for value in slots.values())
    assert all(isinstance(slots, dict) for slots in optimizer.state.values())
    assert all(isinstance(key, torch.Tensor) for key in optimizer.state)


def test_a_state_whose_numbers_went_through_json_is_taken() -> None:
    params, optimizer = make("emotion")
    train(params, optimizer, 0, 4)
    state = optimizer.state_dict()
    for key in ("emotion", "param_groups"):
        state[key] = json.loads(json.dumps(state[key]))
    other_params, other = make("emotion")
    for mine, theirs in zip(other_params, params, strict=True):
        mine.data.copy_(theirs.data)
    other.load_state_dict(state)
    train(params, optimizer, 4, 8)
    train(other_params, other, 4, 8)
    assert all(torch.equal(x, y) for x, y in zip(params, other_params, strict=True))


@pytest.mark.parametrize("name", EMO)
def test_loading_leaves_the_callers_dict_alone_also_later(name: str) -> None:
    params, optimizer = make(name)
    train(params, optimizer, 0, 3)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    other_params, other = make(name)
    other.load_state_dict(state)
    train(other_params, other, 3, 6)
    train(params, optimizer, 3, 6)
    assert state.keys() == before.keys()
    assert state["emotion"] == before["emotion"]
    assert state["param_groups"] == before["param_groups"]
    for index, slots in before["state"].items():
        assert all(torch.equal(state["state"][index][slot], value) for slot, value in slots.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_float32_state_of_half_precision_parameters_is_loaded_without_rounding(dtype) -> None:
    params, optimizer = make("emosens", dtype=dtype)
    train(params, optimizer, 0, 5)
    _, other = make("emosens", dtype=dtype)
    other.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(params, (p for group in other.param_groups for p in group["params"]), strict=True):
        for slot, value in optimizer.state[mine].items():
            assert value.dtype == torch.float32
            assert other.state[theirs][slot].dtype == torch.float32
            assert torch.equal(value, other.state[theirs][slot])


def refusal(name: str, generation: str | None, state: dict) -> str:
    _, optimizer = make(name, generation)
    before = optimizer.state_dict()
    with pytest.raises(WrongStateError) as caught:
        optimizer.load_state_dict(state)
    assert isinstance(caught.value, CheckpointError)
    assert caught.value.hint
    assert optimizer.state_dict()["emotion"] == before["emotion"]
    return caught.value.message


def test_another_optimizers_state_is_refused_with_a_sentence() -> None:
    state = make("emocats")[1].state_dict()
    assert refusal("emosens", None, state) == ("this state is of the optimizer `emocats` and cannot go on in `emosens`")


def test_another_generations_state_is_refused_with_a_sentence() -> None:
    state = make("emosens", "3.7.6")[1].state_dict()
    assert refusal("emosens", "3.9", state) == "this state is of EmoSens generation 3.7.6 and cannot go on in 3.9"


def test_a_state_of_torchs_adamw_is_refused_with_a_sentence() -> None:
    state = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    assert refusal("emosens", None, state) == "this state holds no emotion, so it is not of EmoSens"


def test_a_state_of_other_parameters_is_refused_with_a_sentence() -> None:
    params, optimizer = make("emosens")
    train(params, optimizer, 0, 1)
    state = optimizer.state_dict()
    state["state"][1]["exp_avg"] = torch.zeros(9)
    assert refusal("emosens", None, state) == "this state has a `exp_avg` of shape (9,) for a parameter of shape (4,)"
    state["param_groups"] = state["param_groups"][:1]
    assert refusal("emosens", None, state).startswith("this state is of parameter groups of [2] tensors")


def test_a_deep_copy_feels_on_by_itself() -> None:
    params, optimizer = make("emovoid")
    train(params, optimizer, 0, 3)
    twin = copy.deepcopy(optimizer)
    twin.observe(0.1)
    assert twin.reading != optimizer.reading


@pytest.mark.parametrize("name", ["adamw", "lion", "prodigy", "schedulefree", "adafactor"])
def test_a_comparison_partner_resumes_exactly_and_refuses_anothers_state(name: str) -> None:
    pytest.importorskip({"prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(name, "torch"))
    params = [torch.nn.Parameter(torch.ones(4, 3))]
    optimizer = build_optimizer(name, params, lr=1e-2)
    train(params, optimizer, 0, 5)
    other_params = [torch.nn.Parameter(params[0].detach().clone())]
    other = build_optimizer(name, other_params, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.reading == optimizer.reading
    train(params, optimizer, 5, 9)
    train(other_params, other, 5, 9)
    assert torch.equal(params[0], other_params[0])
    assert other.reading == optimizer.reading
    with pytest.raises(WrongStateError, match="is of the optimizer `unknown`"):
        other.load_state_dict(torch.optim.SGD(params).state_dict())


def test_what_the_loss_was_before_the_first_step_can_be_told_until_then() -> None:
    params, optimizer = make("emosens")
    optimizer.begin(2.0)
    assert optimizer.observe(1.0).scalar > 0  # it has fallen
    _, published = make("emosens")
    assert published.observe(1.0).scalar == 0
    with pytest.raises(RuntimeError, match="after 1 steps"):
        optimizer.begin(2.0)
