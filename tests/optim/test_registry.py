"""Optimizers by name, with the words of a preset."""

from __future__ import annotations

import builtins

import pytest
import torch

from emotrain.config.schema import EMO_OPTIMIZERS, OPTIMIZERS, OptimizerSection
from emotrain.errors import ConfigError
from emotrain.optim import EmoSens, build_optimizer
from emotrain.optim.registry import EMO, optimizer_names
from emotrain.pulse.signal import NonFiniteLossError

STOCK = OPTIMIZERS[8:]


def params() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]


def skip_without_library(name: str) -> None:
    pytest.importorskip({"prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(name, "torch"))


def section(name: str) -> dict[str, object]:
    words = OptimizerSection(name=name).model_dump(exclude={"name"})
    return {key: value for key, value in words.items() if value is not None}


def distance(weights) -> float:
    return sum(((w.detach() - 2.0) ** 2).mean().item() for w in weights)


def train(optimizer, weights, steps: int = 40) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(((w - 2.0) ** 2).mean() for w in weights)
        loss.backward()
        optimizer.observe(loss)
        optimizer.step()
    return distance(weights)


def test_the_registry_and_the_schema_name_the_same_optimizers() -> None:
    assert optimizer_names() == OPTIMIZERS
    assert tuple(EMO) == EMO_OPTIMIZERS


@pytest.mark.parametrize("name", EMO_OPTIMIZERS)
def test_an_emo_optimizer_needs_no_learning_rate_and_takes_every_word_of_a_preset(name: str) -> None:
    weights = params()
    optimizer = build_optimizer(name, weights, **section(name))
    expected = 1e-3 if EMO[name].generations == ("3.6",) else 1.0
    assert optimizer.param_groups[0]["lr"] == expected
    before = distance(weights)
    assert train(optimizer, weights) < before
    assert optimizer.reading.scalar > 0


@pytest.mark.parametrize("name", EMO_OPTIMIZERS)
def test_every_word_of_an_emo_optimizer_reaches_it(name: str) -> None:
    words = {"eps": 1e-6, "betas": (0.8, 0.9), "weight_decay": 0.3, "use_shadow": True, "stopcoef": 0.1}
    optimizer = build_optimizer(name, params(), lr=0.7, notify=False, sensor="intent", **words)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in ("eps", "betas", "weight_decay")} == {
        key: words[key] for key in ("eps", "betas", "weight_decay")
    }
    assert (optimizer.use_shadow, optimizer.stopcoef, optimizer.sensor, optimizer.notify) == (
        True,
        0.1,
        "intent",
        False,
    )


@pytest.mark.parametrize("name", STOCK)
def test_a_comparison_partner_trains_behind_the_same_interface(name: str) -> None:
    skip_without_library(name)
    weights = params()
    optimizer = build_optimizer(name, weights, lr=1.0 if name == "prodigy" else 0.02, **section(name))
    before = distance(weights)
    assert train(optimizer, weights, steps=60) < before
    assert -1 < optimizer.reading.scalar < 1
    assert optimizer.reading.pulse > 0
    assert optimizer.should_stop is False
    with pytest.raises(NonFiniteLossError):
        optimizer.observe(float("nan"))


@pytest.mark.parametrize("name", STOCK)
def test_a_comparison_partner_asks_for_its_learning_rate_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(name, params())
    assert caught.value.message == f"train.lr is missing: `{name}` needs a learning rate"
    assert "\n" not in caught.value.hint


def test_a_partners_pulse_is_the_learning_rate_in_use() -> None:
    weights = params()
    optimizer = build_optimizer("adamw", weights, lr=3e-4)
    optimizer.observe(1.0)
    assert optimizer.reading.pulse == 3e-4
    optimizer.param_groups[0]["lr"] = 1e-4
    assert optimizer.observe(1.0).pulse == 1e-4


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")])
def test_a_missing_library_is_named_with_the_way_to_get_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(module: str, *args, **words):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *args, **words)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError) as caught:
        build_optimizer(name, params(), lr=1.0)
    assert package in caught.value.message
    assert caught.value.hint == "pip install emotrain[optimizers]"


def test_schedulefree_shows_its_average_in_eval_mode_and_trains_on_as_if_nobody_had_looked() -> None:
    pytest.importorskip("schedulefree")
    weights = params()
    optimizer = build_optimizer("schedulefree", weights, lr=0.05)
    train(optimizer, weights, 10)
    trained = [w.detach().clone() for w in weights]
    with optimizer.eval_mode():
        averaged = [w.detach().clone() for w in weights]
        with optimizer.eval_mode():
            assert all(torch.equal(w, a) for w, a in zip(weights, averaged, strict=True))
        assert all(torch.equal(w, a) for w, a in zip(weights, averaged, strict=True))
    assert not torch.allclose(averaged[0], trained[0], atol=1e-4)
    assert all(torch.equal(w, t) for w, t in zip(weights, trained, strict=True))
    train(optimizer, weights, 2)


def test_eval_mode_changes_nothing_elsewhere() -> None:
    for name in ("emosens", "adamw"):
        weights = params()
        optimizer = build_optimizer(name, weights, lr=1e-3)
        before = [w.detach().clone() for w in weights]
        with optimizer.eval_mode():
            assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_prodigy_runs_as_its_authors_advise_for_diffusion() -> None:
    pytest.importorskip("prodigyopt")
    group = build_optimizer("prodigy", params(), lr=1.0).param_groups[0]
    assert (group["use_bias_correction"], group["safeguard_warmup"]) == (True, True)


@pytest.mark.parametrize("name", ["emosens", "emonavi", "adamw"])
def test_a_restart_scales_the_step_that_follows(name: str) -> None:
    def moved(scale: float) -> float:
        weights = params()
        optimizer = build_optimizer(name, weights, lr=1e-3 if name != "emosens" else 1.0, weight_decay=0.0)
        if scale != 1.0:
            optimizer.restart(scale)
        before = weights[0].detach().clone()
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.observe(0.5)
        optimizer.step()
        return float((weights[0].detach() - before).abs().mean())

    assert moved(0.25) == pytest.approx(0.25 * moved(1.0), rel=1e-3)


def test_prodigy_is_built_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prodigyopt")
    build_optimizer("prodigy", params(), lr=1.0)
    assert capsys.readouterr().out == ""


def test_a_misspelt_name_gets_the_likely_one() -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer("emosense", params())
    assert caught.value.message == "train.optimizer is `emosense`, which is not an optimizer"
    assert caught.value.hint == "did you mean `emosens`?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"generation": "3.6"}, "EmoSens has generation 3.9, 3.7.6, 3.7.0, got '3.6'"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"stopcoef": 0.0}, "stopcoef must be positive"),
        ({"sensor": "loud"}, "sensor must be one of"),
    ],
)
def test_a_word_out_of_range_is_a_config_error_that_names_it(words: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer("emosens", params(), **words)
    assert caught.value.message.startswith("train.optimizer `emosens`: ")
    assert message in caught.value.message
    with pytest.raises(ValueError, match="must|has generation"):
        EmoSens(params(), **words)


def test_generation_3_7_means_3_7_6() -> None:
    assert EmoSens(params(), generation="3.7").generation == "3.7.6"
    assert EmoSens(params()).generation == "3.9"
