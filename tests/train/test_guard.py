"""Non-finite numbers are counted, left out, and end the run at three in a row."""

from __future__ import annotations

from math import inf, nan

import pytest

from emotrain.train.state import Guard, describe


def after(*steps: tuple[float, float]) -> Guard:
    guard = Guard()
    for loss, grad_norm in steps:
        guard = guard.update(loss, grad_norm)
    return guard


@pytest.mark.parametrize("bad", [(nan, 1.0), (inf, 1.0), (-inf, 1.0), (1.0, nan), (1.0, inf)])
def test_a_number_that_is_not_finite_leaves_the_step_out(bad: tuple[float, float]) -> None:
    guard = after((1.0, 1.0), bad)
    assert guard.leave_out
    assert not guard.diverged
    assert guard.skipped == 1


def test_three_in_a_row_end_the_run_and_a_good_one_between_starts_the_count_anew() -> None:
    bad, good = (nan, 1.0), (1.0, 1.0)
    assert after(bad, bad, bad).diverged
    guard = after(bad, bad, good, bad, bad)
    assert not guard.diverged
    assert guard.skipped == 4
    assert not after(bad, good).leave_out


def test_huge_and_negative_losses_are_not_its_business() -> None:
    assert not after((1e300, 1e300), (-5.0, 0.0)).leave_out


def test_it_goes_through_a_checkpoint() -> None:
    guard = after((nan, 1.0), (nan, 1.0))
    assert Guard.from_dict(guard.to_dict()) == guard
    assert Guard.from_dict(guard.to_dict()).update(1.0, nan).diverged


def test_the_line_names_the_number_and_the_pictures_once() -> None:
    line = describe(7, 0.5, inf, ["a.png", "b.png", "a.png"])
    assert line == "step 7 left out: gradient norm is inf; pictures of this step: a.png, b.png"
    assert "loss is nan" in describe(7, nan, nan, [])
