"""The gain on the step length: when it is lowered, when it is done, and what it says LR 1.0 is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from statistics import fmean

import pytest

from emotrain.pulse.gain import FACTOR, HOPE, START, SURE, Change, Gain
from emotrain.pulse.stopping import StopRule

BASE = 1.0


def play(losses: Iterable[float], rule: StopRule | None = None, every: int = 10) -> tuple[StopRule, int | None]:
    """Validations of these losses, the first that of the base; the rule, and the step at which it ended the run."""
    rule = rule or StopRule(gain=Gain(), min_steps=1)
    for place, loss in enumerate(losses):
        for _ in range(every if place else 0):
            rule.update_step(False, 1e-3)
        rule.update_validation(place * every, loss)
        if place and rule.decide(place * every):
            return rule, place * every
    return rule, None


def gain_of(rule: StopRule) -> Gain:
    assert rule.gain is not None
    return rule.gain


def test_two_validations_without_a_new_best_lower_the_gain_to_a_third_and_one_does_not():
    rule, _ = play([BASE, 0.8, 0.9, 0.7, 0.71])
    assert gain_of(rule).value == START
    rule.update_validation(50, 0.7)
    assert rule.gain_change is Change.LOWERED
    assert gain_of(rule).value == pytest.approx(START / 3)
    assert gain_of(rule).changes == [(50, pytest.approx(1.0))]
    rule.update_validation(60, 0.6)
    assert rule.gain_change is Change.NONE
    assert gain_of(rule).value == pytest.approx(1.0)


def climb(rule: StopRule, count: int, each: tuple[float, ...] = (0.01, 0.01, 0.01)) -> list[Change]:
    """The base and so many validations of pictures that each get better by that much; what they did to the gain."""
    changes = []
    for place in range(count + 1):
        pictures = [9.0 - better * place for better in each]
        rule.update_validation(10 * place, fmean(pictures), pictures=pictures)
        changes.append(rule.gain_change)
    return changes


def test_the_gain_triples_where_ten_validations_in_a_row_are_surely_better():
    rule = StopRule(gain=Gain())
    changes = climb(rule, 3 * SURE - 1)
    assert [place for place, change in enumerate(changes) if change] == [SURE, 2 * SURE]
    assert set(changes) == {Change.NONE, Change.RAISED}
    assert gain_of(rule).changes == [(100, 9.0), (200, 27.0)]


@pytest.mark.parametrize(
    ("each", "risen"),
    [((0.5, 0.0, 0.01), True), ((0.5, -0.01, -0.01), False), ((0.01,), False)],  # by 1.03 and 0.94 standard errors
    ids=["surely", "one picture of three", "a single picture"],
)
def test_only_improvements_above_their_standard_error_count(each, risen):
    rule = StopRule(gain=Gain())
    assert any(climb(rule, 2 * SURE, each)) == risen


def test_a_rise_is_taken_back_as_any_length_is_reduced_and_can_come_again():
    rule = StopRule(gain=Gain())
    climb(rule, SURE)
    rule.update_validation(110, 8.95, pictures=[8.95] * 3)
    assert rule.gain_change is Change.NONE
    rule.update_validation(120, 8.95, pictures=[8.95] * 3)
    assert rule.gain_change is Change.LOWERED
    assert (gain_of(rule).value, gain_of(rule).vain, gain_of(rule).now) == (START, 0, gain_of(rule).best)
    for place in range(SURE):
        loss = 8.85 - 0.01 * place
        rule.update_validation(130 + 10 * place, loss, pictures=[loss] * 3)
    assert gain_of(rule).changes == [(100, FACTOR * START), (120, START), (220, FACTOR * START)]


def test_after_a_rise_that_ends_in_numbers_that_are_not_finite_the_count_begins_anew():
    rule = StopRule(gain=Gain())
    climb(rule, SURE)
    assert gain_of(rule).update_divergence(105)
    assert (gain_of(rule).value, gain_of(rule).sure) == (START, 0)


def test_the_run_ends_when_two_gains_in_a_row_have_brought_next_to_nothing():
    worse = [0.55] * 2
    rule, ended = play([BASE, 0.5, *worse, *worse, *worse, *worse])
    assert ended == 70
    assert gain_of(rule).value == pytest.approx(START / 9)
    sentence = rule.decide(70)
    assert sentence == (
        "the held-out loss was lowest at step 10 (0.5) and 2 step lengths in a row have brought less than 0.5% of what"
        " was gained"
    )


def test_lengths_above_the_start_do_not_end_a_run_so_that_the_published_one_is_tried():
    rule = StopRule(gain=Gain(), min_steps=1)
    climb(rule, 2 * SURE)
    assert gain_of(rule).value == 9 * START
    tried = []
    for step in range(10 * (2 * SURE + 1), 1000, 10):
        rule.update_validation(step, 9.0, pictures=[9.0] * 3)
        tried.append(round(gain_of(rule).value, 3))
        if rule.decide(step):
            break
    assert tried == [27.0, 9.0, 9.0, 3.0, 3.0, 1.0, 1.0, 1.0]


def test_a_gain_that_brings_more_than_a_trifle_starts_the_count_again():
    worse = [0.6] * 2
    trifle = [BASE, 0.5, *worse, *worse, 0.4995, *worse, *worse, *worse]
    more = [BASE, 0.5, *worse, *worse, 0.45, *worse, *worse, *worse]
    assert play(trifle)[1] == 80
    assert play(more)[1] == 120


def test_a_run_that_has_gained_nothing_yet_gets_shorter_steps_and_is_given_time():
    rule, ended = play([BASE] + [1.1] * 60)
    assert ended is not None
    assert ended >= HOPE
    assert gain_of(rule).value < 0.1
    late, ended = play([BASE, *[1.1] * 9, 0.9, 0.8])
    assert ended is None
    assert late.best_step == 110


@pytest.mark.parametrize("mode", ["off", "signal"])
def test_only_the_trusted_mode_ends_by_the_gain_and_a_gain_that_is_done_stays(mode):
    rule, ended = play([BASE, 0.5, *[0.6] * 30], StopRule(mode, gain=Gain()))
    assert ended is None
    assert gain_of(rule).done
    assert len(gain_of(rule).changes) == 2


def test_never_before_min_steps():
    assert play([BASE, 0.5, *[0.6] * 30], StopRule(min_steps=150, gain=Gain()))[1] == 150


def test_lr_is_the_mean_length_of_the_steps_that_the_best_weights_are_made_of():
    gain = Gain()

    def steps(count: int, length: float) -> None:
        for _ in range(count):
            gain.update_step(length)

    def validate(step: int, is_best: bool, best: float) -> bool:
        return gain.update_validation(step, is_best=is_best, best_loss=best, base_loss=BASE)

    validate(0, True, BASE)
    steps(10, 3e-3)
    validate(10, True, 0.5)
    steps(20, 9e-3)  # thrown away
    validate(20, False, 0.5)
    assert validate(30, False, 0.5)
    steps(10, 1e-3)
    validate(40, True, 0.4)
    steps(10, 7.0)  # after the best
    assert gain.best.steps == 20
    assert gain.step_length() == pytest.approx(2e-3)
    assert gain.best.gain / 20 == pytest.approx((3 + 1) / 2)
    assert gain.summary() == {
        "value": pytest.approx(1.0), "changes": [[30, pytest.approx(1.0)]], "steps": 20,
        "step_length": pytest.approx(2e-3),
    }  # fmt: skip


def test_the_meter_and_the_expected_end_agree_with_the_end():
    losses = [BASE, 0.7, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    rule = StopRule(gain=Gain(), min_steps=1)
    meters, ends, said = [], [], []
    for place, loss in enumerate(losses):
        rule.update_validation(10 * place, loss)
        meters.append(rule.meter(10 * place))
        ends.append(rule.expected_end(10 * place, 1000, 10))
        said.append(rule.forecast(10 * place, 1000, 10))
    assert said[2] == "the validation improves; ends at step 1000 at the latest"
    shorter = "1 of 2 validations without improvement, then shorter steps; ends at step 80 at the earliest"
    assert said[3] == said[5] == shorter
    assert said[4] == "the steps were shortened at step 40; ends at step 80 at the earliest"
    assert said[6] == "the steps were shortened at step 60; ends at step 80 at the earliest"
    assert said[7] == "1 of 2 validations without improvement; ends at step 80 if the next is no better"
    assert meters == [0, 0, 0, 0.25, 0, 0.25, 0.5, 0.75, 1.0]
    assert ends[:3] == [None] * 3
    assert ends[3:] == [(80, 120)] * 4 + [(80, 80)] * 2
    assert rule.decide(80)


def test_a_saved_rule_goes_on_like_the_one_it_was_saved_from():
    losses = [BASE, 0.5, 0.6, 0.6, 0.45, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    straight, ended = play(losses)
    assert ended == 100
    first, _ = play(losses[:6])
    second = StopRule(min_steps=1)
    second.load_document(json.loads(json.dumps(first.to_document())))
    assert second == first
    risen = StopRule(min_steps=1, gain=Gain())
    climb(risen, SURE)
    third = StopRule(min_steps=1)
    third.load_document(json.loads(json.dumps(risen.to_document())))
    assert third == risen
    assert gain_of(third).value == FACTOR * START
    for place in range(6, len(losses)):
        for _ in range(10):
            second.update_step(False, 1e-3)
        second.update_validation(place * 10, losses[place])
    assert second == straight


def test_the_state_of_a_version_with_other_fields_is_taken_as_far_as_it_is_known():
    gain = Gain(value=6.0, vain=1)
    document = {key: value for key, value in gain.to_document().items() if key != "sure"}
    assert Gain.from_document({**document, "risen": True, "highest": 12.0}) == gain


def test_mirrored_pictures_lower_it_where_they_no_longer_gain_by_more_than_memorising():
    def style(step: int) -> float:
        return 1.5 - 0.8 * min(step / 100, 1) - 0.2 * max(step - 100, 0) / 900

    def by_heart(step: int) -> float:
        return style(step) - 0.4 * max(step - 100, 0) / 900

    for plain, lowered in ((by_heart, True), (style, False)):
        rule = StopRule(held_out=False, gain=Gain())
        for step in range(0, 301, 30):
            rule.update_validation(step, style(step), plain(step))
        assert bool(gain_of(rule).changes) == lowered


def test_where_mirroring_turns_out_unfair_the_gain_is_judged_by_the_pictures_as_they_are():
    rule = StopRule(held_out=False, gain=Gain(), min_steps=1)
    told = [(1.0, 1.5), (0.9, 1.4), (0.95, 1.4), (0.95, 1.4), (0.95, 1.0), (0.9, 1.0), (0.9, 1.0)]
    for place, (flipped, plain) in enumerate(told):
        rule.update_validation(10 * place, flipped, plain)
    assert rule.unfair
    assert len(gain_of(rule).changes) == 2
    assert (gain_of(rule).mark, gain_of(rule).vain) == (1.0, 0)
