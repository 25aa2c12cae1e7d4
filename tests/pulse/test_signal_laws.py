"""What holds for every series of losses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.errors import DivergedError
from emotrain.pulse.signal import (
    GENERATIONS,
    NonFiniteLossError,
    canonical_generation,
    observe,
    start,
    state_from_dict,
    state_to_dict,
    update_averages,
)

losses = st.lists(st.floats(1e-4, 1e6), min_size=1, max_size=60)
wild_losses = st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=60)
generations = st.sampled_from(GENERATIONS)
sensors = st.sampled_from(["faithful", "intent"])
scopes = st.floats(1e-3, 100.0)


def run(generation: str, series: list[float], **words):
    state, readings = start(generation), []
    for loss in series:
        state, reading, _ = observe(state, loss, **words)
        readings.append(reading)
    return state, readings


@given(wild_losses, generations, sensors)
def test_scalar_stays_inside_one_and_trust_complements_it(series: list[float], generation: str, sensor: str) -> None:
    for reading in run(generation, series, sensor=sensor)[1]:
        assert -1.0 < reading.scalar < 1.0
        assert abs(reading.trust) == 1.0 - abs(reading.scalar)
        assert math.copysign(1.0, reading.trust) == math.copysign(1.0, reading.scalar)


def test_a_loss_that_jumps_a_millionfold_leaves_scalar_above_minus_one() -> None:
    scalar = run("3.9", [1e-3, 1e6])[1][-1].scalar
    assert -1.0 < scalar < -0.999


@given(wild_losses, scopes)
def test_pulse_of_3_9_is_within_its_bounds(series: list[float], scope: float) -> None:
    for reading in run("3.9", series, scope=scope)[1]:
        assert 1e-8 <= reading.pulse <= scope * 3e-3


@given(wild_losses, scopes)
def test_pulse_of_3_7_6_is_within_its_bounds(series: list[float], scope: float) -> None:
    for reading in run("3.7.6", series, scope=scope)[1]:
        assert 1e-6 <= reading.pulse <= 3e-3


@given(wild_losses, scopes, st.integers(1, 50))
def test_pulse_of_3_7_0_is_at_most_a_thousandth(series: list[float], scope: float, num_tensors: int) -> None:
    for reading in run("3.7.0", series, scope=scope, num_tensors=num_tensors)[1]:
        assert 0.0 <= reading.pulse <= 1e-3


@given(wild_losses)
def test_drive_of_3_6_is_positive_and_below_its_peak(series: list[float]) -> None:
    for reading in run("3.6", series, scope=1e-3)[1]:
        assert reading.pulse == 1e-3
        assert 0.0 < reading.drive < 8 * 0.75 * 1.075


@given(losses, generations, sensors, st.integers(-3, 10))
def test_scaling_the_loss_leaves_scalar_unchanged(
    series: list[float], generation: str, sensor: str, power: int
) -> None:
    # by powers of two: the faithful branch is decided by the last bit, which any other factor may turn
    series = [loss + 1e-3 for loss in series]
    before = run(generation, series, sensor=sensor)[1]
    after = run(generation, [loss * 2.0**power for loss in series], sensor=sensor)[1]
    assert [x.scalar for x in after] == [x.scalar for x in before]


@given(st.lists(st.floats(0.05, 2.0), min_size=1, max_size=60), st.floats(0.1, 100.0))
def test_scaling_by_any_factor_leaves_both_candidates_of_the_scalar_unchanged(
    series: list[float], factor: float
) -> None:
    plain = scaled = None
    for loss in series:
        plain, scalar, _ = update_averages(plain, loss, "intent")
        scaled, scaled_scalar, _ = update_averages(scaled, loss * factor, "intent")
        diff = plain.long - plain.short
        candidates = (math.tanh(diff / plain.long), math.tanh(diff / plain.medium))
        assert min(abs(scaled_scalar - c) for c in candidates) < 1e-9
        assert min(abs(scalar - c) for c in candidates) < 1e-9


@given(losses, losses, generations)
@settings(max_examples=50)
def test_a_state_goes_through_json_at_any_step(head: list[float], tail: list[float], generation: str) -> None:
    state, _ = run(generation, head)
    again = state_from_dict(json.loads(json.dumps(state_to_dict(state))))
    assert again == state
    for loss in tail:
        state, reading, ready = observe(state, loss)
        again, reading_again, ready_again = observe(again, loss)
        assert (reading_again, ready_again) == (reading, ready)


def test_listen_hears_what_feel_hears() -> None:
    series = [1.0, 0.8, 0.9, 0.5, 2.0]
    averages = None
    for loss, reading in zip(series, run("3.9", series)[1], strict=True):
        averages, scalar, trust = update_averages(averages, loss)
        assert (scalar, trust) == (reading.scalar, reading.trust)
    assert averages.short == reading.short


def test_scalar_is_positive_while_the_loss_falls_and_negative_while_it_rises() -> None:
    assert run("3.9", [1.0, 0.9, 0.8])[1][-1].scalar > 0
    assert run("3.9", [0.8, 0.9, 1.0])[1][-1].scalar < 0


def test_intent_never_takes_the_louder_average_and_faithful_sometimes_does() -> None:
    series = [1.0 - 0.01 * step for step in range(60)]  # falling: medium is below long, so its ratio is the louder
    faithful = [abs(reading.scalar) for reading in run("3.9", series)[1]]
    intent = [abs(reading.scalar) for reading in run("3.9", series, sensor="intent")[1]]
    assert all(i <= f for i, f in zip(intent, faithful, strict=True))
    assert any(i < f for i, f in zip(intent, faithful, strict=True))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_refused_before_the_averages_are_touched(loss: float) -> None:
    state, _ = run("3.9", [1.0, 0.9])
    before = replace(state)
    with pytest.raises(NonFiniteLossError, match="the loss is"):
        observe(state, loss)
    assert state == before
    assert issubclass(NonFiniteLossError, DivergedError)


def test_the_signal_of_3_9_goes_out_again_and_the_windowed_ones_latch() -> None:
    quiet, burst = [0.01] * 200, [5.0] * 5
    signals = {}
    for generation in ("3.9", "3.7.6"):
        state, _ = run(generation, quiet)
        assert state.ready
        for loss in burst:
            state, _, _ = observe(state, loss)
        signals[generation] = state.ready
    assert signals == {"3.9": False, "3.7.6": True}


def test_a_higher_stopcoef_lights_a_higher_loss() -> None:
    assert not run("3.9", [0.3] * 200)[0].ready
    assert run("3.9", [0.3] * 200, stopcoef=0.35)[0].ready


def test_3_7_means_3_7_6_and_unknown_generations_are_named() -> None:
    assert canonical_generation("3.7") == "3.7.6"
    with pytest.raises(ValueError, match=r"3\.6, 3\.7\.0, 3\.7\.6, 3\.9, got '4\.0'"):
        start("4.0")


def test_an_unknown_sensor_is_refused() -> None:
    with pytest.raises(ValueError, match="faithful, intent, got 'loud'"):
        update_averages(None, 1.0, "loud")  # type: ignore[arg-type]


@given(st.floats(1e-3, 1e3), losses, generations)
def test_an_emotion_begun_at_a_loss_has_heard_but_not_felt_it(base: float, series: list[float], kind: str) -> None:
    begun, first = start(kind, base), start(kind)
    assert replace(begun, averages=None) == first
    state, reading, _ = observe(begun, series[0])
    told = observe(observe(first, base)[0], series[0])[0]
    assert state.step == 1
    assert state.averages == told.averages
    assert reading.scalar == update_averages(begun.averages, series[0])[1]


def test_an_emotion_does_not_begin_at_a_loss_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteLossError):
        start("3.9", math.nan)
