"""The loss baseline: a corrected loss says the same at every place of the noise scale."""

from __future__ import annotations

import pytest

from emotrain.train.losses import BINS, LossBaseline, expected_by_bins


def test_the_raw_ear_hears_the_mean():
    assert LossBaseline().observe([0.1, 0.9], [1.0, 3.0]) == 2.0


def test_the_corrected_ear_hears_the_mean_everywhere_where_nothing_has_changed():
    positions = [(i + 0.5) / BINS for i in range(BINS)]
    losses = [0.1 + 2 * position for position in positions]
    baseline = LossBaseline(expected_by_bins(positions, losses))
    for position, loss in zip(positions, losses, strict=True):
        assert baseline.observe([position], [loss]) == pytest.approx(1.1)
    assert baseline.observe(positions, [loss / 2 for loss in losses]) == pytest.approx(0.55)


def test_between_the_centres_of_two_bins_the_expected_loss_is_linear():
    baseline = LossBaseline([1.0] * 10 + [3.0] * 10)
    assert baseline.observe([0.5], [2.0]) == pytest.approx(1.0)


def test_an_empty_bin_takes_its_nearest_neighbour():
    assert expected_by_bins([0.0, 0.99], [1.0, 3.0]) == [0.5] * 10 + [1.5] * 10


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="no losses"):
        expected_by_bins([], [])
