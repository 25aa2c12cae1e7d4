"""Made-up events for the observers' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from emotrain.pulse.signal import Reading
from emotrain.train.events import RunStart, StepEnd


class MockClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> MockClock:
    return MockClock()


@pytest.fixture
def make_start(tmp_path: Path) -> Callable[..., RunStart]:
    def make(**changes: object) -> RunStart:
        values: dict[str, object] = {
            "name": "mika",
            "run_dir": tmp_path,
            "start_step": 0,
            "max_steps": 400,
            "steps_per_epoch": 8.0,
            "optimizer": "emosens",
            "num_images": 32,
            "num_modules": 192,
            "num_parameters": 6_780_000,
            "device": "cpu",
        }
        return RunStart(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_step() -> Callable[..., StepEnd]:
    def make(step: int, **changes: object) -> StepEnd:
        loss = 0.5 + 1.0 / step
        scalar = 0.2 if step % 3 else -0.1
        reading = Reading(scalar, 0.8, 1e-4 * step, 1.0, loss, loss, loss, 0.5, 0.4)
        values: dict[str, object] = {
            "step": step,
            "epoch": step / 8,
            "loss": loss,
            "observed_loss": loss,
            "reading": reading,
            "ready": False,
            "grad_norm": 0.25,
            "lr": 1e-4,
            "step_s": 0.2,
            "stop_meter": 0.5,
        }
        return StepEnd(**{**values, **changes})  # type: ignore[arg-type]

    return make
