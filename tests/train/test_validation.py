"""The validation: fixed pictures, noise and timesteps; what it costs and what drift means."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fake_run import SCHEDULER, FakeData, FakeFamily

from emotrain.diffusion import build_objective
from emotrain.train.validation import Validation


def validation_of(family: FakeFamily, draws: int = 4) -> Validation:
    data = FakeData()
    return Validation(
        family, build_objective("epsilon", SCHEDULER), family.adapter, [data.of([0, 1, 2])], {}, draws=draws
    )


def shift_adapter(family: FakeFamily, by: float) -> None:
    family.adapter.load_state({"layer.weight": torch.full((4, 4, 1, 1), by)})


def test_the_same_adapter_gives_the_same_loss_and_another_one_another():
    family = FakeFamily()
    validation = validation_of(family)
    first = validation.pictures()
    assert validation.pictures() == first
    shift_adapter(family, 0.1)
    assert validation.pictures() != first
    assert validation_of(family, draws=2).pictures() != validation.pictures()


def test_a_picture_counts_once_with_the_mean_of_its_draws():
    validation = validation_of(FakeFamily(), draws=4)
    losses = validation.losses().tolist()
    assert validation.pictures() == pytest.approx([sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)])


def test_drift_is_the_mean_square_of_what_the_adapter_adds():
    family = FakeFamily()
    validation = validation_of(family)
    assert validation.drift() == 0.0
    shift_adapter(family, 0.1)
    small = validation.drift()
    shift_adapter(family, 0.3)
    assert small > 0
    assert validation.drift() == pytest.approx(9 * small, rel=1e-4)
    assert family.adapter.on


def test_drift_looks_at_one_draw_a_picture_and_asks_the_base_once(monkeypatch: pytest.MonkeyPatch):
    family = FakeFamily()
    validation = validation_of(family)
    seen: list[tuple[int, bool]] = []
    plain = family.predict

    def counted(noisy, *rest):
        seen.append((len(noisy), family.adapter.on))
        return plain(noisy, *rest)

    monkeypatch.setattr(family, "predict", counted)
    validation.drift()
    validation.drift()
    assert [number for number, _ in seen] == [3, 3, 3]
    assert [on for _, on in seen].count(False) == 1
