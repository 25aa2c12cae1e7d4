"""The average beside the weights: its formula, what shows it, and that training does not feel it."""

from __future__ import annotations

import pytest
import torch

from emotrain.errors import CheckpointError
from emotrain.optim import build_optimizer
from emotrain.optim.averaged import POWER, Averaged


def make(name: str = "emosens") -> tuple[list[torch.nn.Parameter], Averaged]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (4,))]
    words = {} if name.startswith("emo") else {"lr": 1e-2}
    return params, Averaged(build_optimizer(name, params, **words))


def train(params: list[torch.nn.Parameter], optimizer, first: int, last: int) -> list[list[torch.Tensor]]:
    """The weights after each step."""
    after = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.observe(1.0 / (1 + 0.2 * step) + 0.1 * (step % 3))
        optimizer.step()
        after.append([p.detach().clone() for p in params])
    return after


def shown(params: list[torch.nn.Parameter], optimizer) -> list[torch.Tensor]:
    with optimizer.eval_mode():
        return [p.detach().clone() for p in params]


def test_step_k_of_n_weighs_what_the_power_function_says() -> None:
    params, optimizer = make()
    after = train(params, optimizer, 0, 40)
    # the recursion written out: step k keeps w_k of itself and loses (1 - 1/j)^POWER at each later step j
    shares = []
    for k in range(1, 41):
        share = 1 - (1 - 1 / k) ** POWER
        for j in range(k + 1, 41):
            share *= (1 - 1 / j) ** POWER
        shares.append(share)
    assert sum(shares) == pytest.approx(1)
    age = sum(share * (40 - k) for k, share in enumerate(shares, 1))
    assert age == pytest.approx(40 / (POWER + 1), abs=0.5)
    for place, average in enumerate(shown(params, optimizer)):
        wanted = sum(share * weights[place] for share, weights in zip(shares, after, strict=True))
        assert torch.allclose(average, wanted, atol=1e-6)


def test_after_a_restart_the_average_is_what_was_put_in_place_and_looks_back_as_far_as_before() -> None:
    params, optimizer = make()
    train(params, optimizer, 0, 40)
    put = shown(params, optimizer)
    for parameter, weights in zip(params, put, strict=True):
        parameter.data.copy_(weights + 0.1)
    optimizer.restart(1 / 3)
    assert all(torch.equal(a, w + 0.1) for a, w in zip(shown(params, optimizer), put, strict=True))
    (after,) = train(params, optimizer, 40, 41)
    share = 1 - (1 - 1 / 41) ** POWER
    for average, weights, new in zip(shown(params, optimizer), put, after, strict=True):
        assert torch.allclose(average, torch.lerp(weights + 0.1, new, share), atol=1e-6)


@pytest.mark.parametrize("name", ["emosens", "emoairy", "adamw"])
def test_training_goes_the_same_way_with_and_without_it(name: str) -> None:
    params, optimizer = make(name)
    plain, other = make(name)
    for step in range(12):
        train(params, optimizer, step, step + 1)
        shown(params, optimizer)
        train(plain, other.inner, step, step + 1)
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


def test_modes_nest_and_end_where_they_began_also_after_an_error() -> None:
    params, optimizer = make()
    assert all(torch.equal(p, q) for p, q in zip(shown(params, optimizer), params, strict=True))  # before a step
    trained = train(params, optimizer, 0, 9)[-1]
    average = shown(params, optimizer)
    assert not torch.equal(average[0], trained[0])
    with optimizer.eval_mode():
        with optimizer.eval_mode():
            assert torch.equal(params[0], average[0])
        assert torch.equal(params[0], average[0])
    with pytest.raises(ZeroDivisionError), optimizer.eval_mode():
        _ = 1 / 0
    assert all(torch.equal(p, t) for p, t in zip(params, trained, strict=True))


@pytest.mark.parametrize("name", ["emosens", "emoairy", "adamw"])
@pytest.mark.parametrize("when", [0, 7])
def test_a_resumed_run_has_the_same_weights_and_the_same_average(name: str, when: int) -> None:
    straight, whole = make(name)
    train(straight, whole, 0, 20)
    params, first = make(name)
    train(params, first, 0, when)
    saved = first.state_dict()
    resumed, second = make(name)
    for p, q in zip(resumed, params, strict=True):
        p.data.copy_(q)
    second.load_state_dict(saved)
    assert second.reading == first.reading
    train(resumed, second, when, 20)
    assert all(torch.equal(p, q) for p, q in zip(resumed, straight, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(shown(resumed, second), shown(straight, whole), strict=True))


def test_a_state_of_another_optimizer_is_refused_and_one_without_an_average_too() -> None:
    params, optimizer = make("emosens")
    train(params, optimizer, 0, 3)
    _, other = make("emocats")
    with pytest.raises(CheckpointError):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(KeyError):
        optimizer.load_state_dict(optimizer.inner.state_dict())
