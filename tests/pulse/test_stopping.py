"""The stop rule: what it waits for, and what it says."""

from __future__ import annotations

import json
import math

import pytest

from emotrain.pulse.stopping import DENSE, HOPE, WINDOW, StopRule


def play(rule: StopRule, curve, *, every: int = 10, max_steps: int = 2000, ready=lambda step: False, plain=None):
    """Steps until the rule ends the run; `curve(step)` is the validation loss, `plain(step)` the flipped one."""
    rule.update_validation(0, curve(0), plain and plain(0))
    for step in range(1, max_steps + 1):
        rule.update_step(ready(step))
        if step % every == 0:
            rule.update_validation(step, curve(step), plain and plain(step))
        sentence = rule.decide(step)
        if sentence:
            return step, sentence
    return max_steps, None


def valley(best: float, low: float = 0.5, high: float = 1.5, rise: float = 0.3):
    """Falls from `high` to `low` at step `best`, then rises."""
    return lambda s: low + (high - low) * (1 - s / best) ** 2 if s <= best else low + rise * (s - best) / best


def test_over_training_ends_the_run_soon_after_the_best_step():
    rule = StopRule()
    step, sentence = play(rule, valley(120))
    assert rule.best_step == 120
    assert 120 < step <= 1.6 * 120
    assert "120" in sentence


def test_a_loss_that_goes_on_falling_runs_to_the_ceiling():
    step, sentence = play(StopRule(), lambda s: 1.0 / (1 + s / 100))
    assert sentence is None
    assert step == 2000


def test_a_plateau_ends_the_run():
    step, _ = play(StopRule(), lambda s: 0.5 + math.exp(-s / 30))
    assert step < 600


def test_never_before_min_steps():
    step, _ = play(StopRule(min_steps=300), valley(40))
    assert step == 300


def test_one_bad_validation_does_not_end_the_run():
    fall = lambda s: 1.0 / (1 + s / 100)  # noqa: E731
    rule = StopRule()
    _, sentence = play(rule, lambda s: 5.0 if s == 300 else fall(s))
    assert sentence is None


def test_a_run_that_has_gained_nothing_yet_is_given_time():
    late = lambda s: 1.0 + 0.01 * (s > 0) if s <= 150 else 1.0 - (s - 150) / 1000  # noqa: E731
    step, _ = play(StopRule(), late, every=20, max_steps=500)
    assert step == 500
    step, sentence = play(StopRule(), lambda s: 1.0 + s / 1000, every=20)
    assert step == HOPE
    assert "step 0" in sentence


def test_off_never_ends():
    assert play(StopRule("off"), valley(50))[1] is None


def test_signal_mode_needs_a_sustained_signal():
    assert play(StopRule("signal"), valley(50), ready=lambda s: s % 2 == 0)[1] is None
    step, sentence = play(StopRule("signal"), valley(50), ready=lambda s: s > 100)
    assert step == 100 + math.ceil(DENSE * WINDOW)
    assert "READY TO STOP" in sentence


def test_without_a_validation_trusted_mode_listens_to_the_signal():
    rule = StopRule("trusted")
    for _ in range(1, 200):
        rule.update_step(True)
    assert rule.decide(199) is not None


def test_a_lit_signal_shortens_the_wait():
    quiet, _ = play(StopRule(), valley(200))
    lit, _ = play(StopRule(), valley(200), ready=lambda s: s > 150)
    assert lit < quiet


def test_the_meter_stays_within_bounds_and_is_full_at_the_end():
    rule = StopRule()
    curve = valley(100)
    rule.update_validation(0, curve(0))
    meters = []
    for step in range(1, 400):
        rule.update_step(False)
        if step % 10 == 0:
            rule.update_validation(step, curve(step))
        meters.append(rule.meter(step))
        if rule.decide(step):
            break
    assert min(meters) >= 0.0
    assert max(meters) <= 1.0
    assert meters[-1] == 1.0
    assert meters[50] < 1.0


def test_a_saved_rule_goes_on_like_the_one_it_was_saved_from():
    curve = valley(150)

    def go_on(rule: StopRule, step: int, last: int) -> tuple[int, str | None]:
        while step < last and not rule.decide(step):
            step += 1
            rule.update_step(False)
            if step % 10 == 0:
                pictures = [curve(step) + 0.01 * math.sin(step * k) / 3 for k in (1, 2, 3)]
                rule.update_validation(step, sum(pictures) / 3, None, pictures)
        return step, rule.decide(step)

    straight, first, second = StopRule(), StopRule(), StopRule()
    for rule in (straight, first):
        rule.update_validation(0, curve(0), None, [curve(0)] * 3)
    step, sentence = go_on(straight, 0, 1000)
    for cut in (130, step):  # half-way, and between the decision and the hand-over
        go_on(first, 0 if cut == 130 else 130, cut)
        second.load_document(json.loads(json.dumps(first.to_document())))
        assert second == first
    assert "the last validation, at step" in str(sentence)
    assert go_on(second, step, 1000) == (step, sentence)


def test_the_saves_around_the_densest_signals_are_named():
    rule = StopRule("off")
    for step in range(1, 401):
        rule.update_step(150 <= step < 175 or step % 40 == 0)
    assert (rule.densest, rule.densest_end) == (25, 174)
    assert rule.around_signals(range(50, 401, 50)) == {100, 200}
    again = StopRule("off")
    again.load_document(json.loads(json.dumps(rule.to_document())))
    assert again.around_signals(range(50, 401, 50)) == {100, 200}


def test_without_a_signal_no_save_is_kept_for_it():
    rule = StopRule("off")
    for _ in range(100):
        rule.update_step(False)
    assert rule.around_signals([50, 100]) == set()


def style(step):
    """Four fifths of the fall by step 100, the rest by step 1000."""
    return 1.5 - 0.8 * min(step / 100, 1) - 0.2 * max(step - 100, 0) / 900


def by_heart(step):
    """The same pictures as they are, from step 100 on memorised: three times as fast as the style."""
    return style(step) - 0.4 * max(step - 100, 0) / 900


def test_a_fall_of_mirrored_pictures_that_comes_of_learning_by_heart_does_not_count():
    rule = StopRule(held_out=False)
    stopped, sentence = play(rule, style, plain=by_heart)
    assert 140 <= stopped <= 200
    assert 90 <= rule.best_step <= 130
    assert "flipped" in sentence
    again = StopRule(held_out=False)
    again.load_document(json.loads(json.dumps(rule.to_document())))
    assert again == rule


def test_a_slow_fall_that_mirrored_pictures_share_counts():
    rule = StopRule(held_out=False)
    play(rule, style, plain=style, max_steps=500)
    assert rule.best_step > 400


def test_where_mirroring_is_not_fair_the_pictures_are_heard_as_they_are():
    def flipped(step):  # light from the left: flipped it comes from the right
        return 1.5 - 0.3 * min(step / 50, 1) + 0.2 * max(step - 50, 0) / 900

    def plain(step):
        return 1.5 - 0.8 * min(step / 50, 1) - 0.2 * min(max(step / 50 - 1, 0), 1)

    rule = StopRule(held_out=False)
    stopped, sentence = play(rule, flipped, plain=plain)
    assert rule.unfair
    assert rule.best_step == 100
    assert (rule.base_loss, rule.best_loss) == (1.5, pytest.approx(0.5))
    assert stopped == 140
    assert "training pictures" in sentence
    again = StopRule(held_out=False)
    again.load_document(json.loads(json.dumps(rule.to_document())))
    assert again == rule


def test_mirrored_pictures_that_lag_behind_but_still_fall_are_heard_on():
    rule = StopRule(held_out=False)
    told = [(1.0, 1.0), (0.99, 0.95), (0.8, 0.7), (0.6, 0.55), (0.6, 0.5), (0.65, 0.4), (0.7, 0.3)]
    for place, (flipped, plain) in enumerate(told):
        rule.update_validation(50 * place, flipped, plain)
    assert not rule.unfair
    assert rule.best_step == 150


def test_nothing_is_said_about_mirroring_before_anything_was_gained():
    rule = StopRule(held_out=False)
    play(rule, lambda s: 1.0 + s / 1e5, plain=lambda s: 1.0 - s / 1e5)
    assert not rule.unfair


@pytest.mark.parametrize("best", [40, 120, 200])
@pytest.mark.parametrize("lit_from", [0, 150, 10_000])
@pytest.mark.parametrize("every", [10, 25])
def test_the_forecast_holds_the_step_that_the_run_ends_at(best: int, lit_from: int, every: int) -> None:
    rule, curve, said = StopRule(), valley(best), {}
    rule.update_validation(0, curve(0))
    for step in range(1, 1000):
        rule.update_step(step >= lit_from)
        if step % every == 0:
            rule.update_validation(step, curve(step))
            said[step] = (rule.forecast(step, 1000, every), rule.expected_end(step, 1000, every))
        if rule.decide(step):
            break
    failing = {place: words for place, words in said.items() if words[1] is not None and place < step}
    assert failing
    for words, (first, last) in failing.values():
        assert first <= step <= last
        assert f"ends at step {first}" in words
    assert said[every] == ("the validation improves; ends at step 1000 at the latest", None)


def test_the_forecast_says_what_the_end_waits_for() -> None:
    rule = StopRule()
    for step, loss in ((0, 1.0), (100, 0.5), (200, 0.4), (225, 0.5)):
        rule.update_validation(step, loss)
    words = "1 of 2 validations without improvement; ends at step 260 to 280 if the next is no better"
    assert rule.forecast(225, 1000, 25) == words
    rule.update_validation(250, 0.6)
    words = "2 of 2 validations without improvement; ends at step 260 to 280 if none is better before"
    assert rule.forecast(250, 1000, 25) == words
    assert rule.forecast(250, 270, 25) == words.replace("280", "270")
    assert StopRule("off").forecast(0, 50, 5) == "ends at step 50: stop.mode is off"
    assert StopRule("signal").forecast(0, 50, 5).endswith("90% of 32 steps; ends at step 50 at the latest")
