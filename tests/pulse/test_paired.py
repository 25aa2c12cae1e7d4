"""Two validations of the same pictures: the difference, its standard error, and both in words."""

from __future__ import annotations

import math

import pytest

from emotrain.pulse.paired import Paired, share_above
from emotrain.pulse.stopping import SHARED, StopRule

FACTS = {"step": 310, "best_step": 300, "gained": 0.5, "base_loss": 1.0, "negligible": 0.005}


@pytest.mark.parametrize(
    ("t", "degrees", "share"),  # a table of Student's t
    [
        (0.0, 4, 0.5), (1.0, 1, 0.25), (12.706, 1, 0.025), (4.303, 2, 0.025), (2.353, 3, 0.05), (2.132, 4, 0.05),
        (2.571, 5, 0.025), (3.169, 10, 0.005), (1.697, 30, 0.05), (1.645, 10_001, 0.05), (-2.353, 3, 0.95),
    ],
)  # fmt: skip
def test_the_tail_of_students_t_is_that_of_the_tables(t: float, degrees: int, share: float) -> None:
    assert share_above(t, degrees) == pytest.approx(share, rel=2e-3)


def test_the_difference_and_its_standard_error_are_taken_over_pictures() -> None:
    paired = Paired.of([0.50, 0.31, 0.93, 0.70], [0.49, 0.30, 0.90, 0.73], **FACTS)
    assert paired.difference == pytest.approx(0.005)
    assert paired.error == pytest.approx(math.sqrt((0.005**2 + 0.005**2 + 0.025**2 + 0.035**2) / 3 / 4))
    assert paired.chance == pytest.approx(share_above((0.0025 + 0.005) / paired.error, 3))


def test_what_all_pictures_have_in_common_has_no_standard_error() -> None:
    apart = Paired.of([0.2, 0.9, 0.5], [0.3, 1.0, 0.6], **FACTS)
    assert apart.error == pytest.approx(0.0, abs=1e-12)
    assert apart.chance == pytest.approx(1.0)
    same = Paired.of([0.5, 0.5], [0.5, 0.5], **FACTS)
    assert (same.error, same.chance) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("losses", "facts", "words"),
    [
        ([0.501, 0.503, 0.5], {}, "worse than step 300 by 0.3% of the gain, plus or minus 0.2%;"
         " the chance of an improvement of 0.5% is 2%"),
        ([0.48, 0.47, 0.49], {}, "better than step 300 by 4.0% of the gain, plus or minus 1.2%;"
         " the chance of an improvement of 0.5% is 95%"),
        ([0.501, 0.503, 0.5], {"negligible": 0.03}, "worse than step 300 by 0.3% of the gain, plus or minus 0.2%;"
         " the chance of an improvement of 3% is below 1%"),
        ([0.48], {}, "better than step 300 by 4.0% of the gain (one picture, so nobody knows how sure that is)"),
        ([0.48, 0.49], {"best_step": 0}, "better than the base model by 1.5% of the base's loss, plus or minus 0.5%"),
        ([0.52, 0.52], {"gained": 0.0}, "worse than step 300 by 2.0% of the base's loss, plus or minus 0.0%"),
        ([0.52, 0.52], {"gained": 0.0, "base_loss": 0.0}, ""),
    ],
)  # fmt: skip
def test_the_words_say_how_much_and_how_sure(losses: list[float], facts: dict[str, float], words: str) -> None:
    assert Paired.of(losses, [0.5] * len(losses), **{**FACTS, **facts}).words() == words


def test_a_validation_is_compared_with_the_best_before_it() -> None:
    rule = StopRule()
    for step, pictures in ((0, [1.0, 2.0]), (10, [0.8, 1.6]), (20, [0.9, 1.6]), (30, [0.7, 1.5]), (40, [0.7, 1.6])):
        rule.update_validation(step, sum(pictures) / 2, None, pictures)
        found = (rule.paired.best_step, round(rule.paired.difference, 6)) if rule.paired else None
        assert found == {0: None, 10: (0, -0.3), 20: (10, 0.05), 30: (10, -0.1), 40: (30, 0.05)}[step]
    assert rule.paired is not None
    assert rule.paired.gained == pytest.approx(0.4)
    assert rule.evidence().startswith("; the last validation, at step 40, is worse than step 30")
    rule.update_non_finite_validation(50)
    assert rule.evidence() == ""


def test_what_flipped_pictures_gain_by_being_memorised_is_no_improvement() -> None:
    rule = StopRule(held_out=False)
    rule.update_validation(0, 1.0, 1.0, [0.9, 1.1], [0.9, 1.1])
    rule.update_validation(10, 0.6, 0.6, [0.5, 0.7], [0.5, 0.7])
    rule.update_validation(20, 0.59, 0.4, [0.5, 0.68], [0.3, 0.5])
    assert rule.best_step == 10
    assert rule.paired is not None
    assert rule.paired.difference == pytest.approx(-0.01 + SHARED * 0.2)


def test_pictures_of_another_number_are_not_compared() -> None:
    rule = StopRule()
    rule.update_validation(0, 1.0, None, [1.0, 1.0])
    rule.update_validation(10, 0.5, None, [0.5])
    assert rule.paired is None
    assert rule.evidence() == ""
