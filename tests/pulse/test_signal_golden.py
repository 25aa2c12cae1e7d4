"""The sensors, pulses and stop signals equal the recorded ones of the published optimizers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from emotrain.pulse.signal import emo_drive, observe, start

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = sorted(path for path in GOLDEN.glob("emo*.npz"))


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_scalars_match_the_trace_to_1e_12_and_stop_signals_exactly(path: Path) -> None:
    name, generation, scenario = path.stem.split("-", 2)
    trace, losses = np.load(path), np.load(GOLDEN / f"inputs-{scenario}.npz")["loss"]
    state, readings, signals = start(generation), [], []
    for loss in losses:
        state, reading, ready = observe(
            state,
            float(loss),
            scope=1e-3 if generation == "3.6" else 1.0,
            watch="long" if name in ("emonavi", "emosens") else "scalar",
            num_tensors=4,
        )
        readings.append(reading)
        signals.append(ready)
    words = {"scalar": "scalar", "trust": "trust", "pulse": "emoPulse", "drive": "emoDrive"}
    for ours, theirs in words.items():
        if f"trace_{theirs}" in trace.files:
            felt = np.array([getattr(reading, ours) for reading in readings])
            np.testing.assert_allclose(felt, trace[f"trace_{theirs}"], rtol=0, atol=1e-12, err_msg=ours)
    assert signals == trace["trace_should_stop"].tolist()


def test_every_optimizer_and_generation_has_four_traces() -> None:
    kinds = {tuple(path.stem.split("-", 2)[:2]) for path in TRACES}
    assert len(kinds) == 14
    assert len(TRACES) == 4 * len(kinds)


def test_the_settle_traces_light_every_signal() -> None:
    lit = [np.load(path)["trace_should_stop"].any() for path in TRACES if path.stem.endswith("settle")]
    assert len(lit) == 14
    assert all(lit)


PUBLISHED_DRIVE = {0.26: 6.36, 0.30: 5.99, 0.35: 5.54, 0.40: 5.09, 0.45: 4.64, 0.49: 4.29, -0.26: 5.48}
# The published table goes on with these, which its own code does not give: the traces, recorded from that code, have
# 4.3552 at -0.4222 and 4.2156 at -0.4419 where the table would need 3.8 and 3.6.
MISPRINTED_DRIVE = {-0.30: 5.04, -0.35: 4.55, -0.40: 4.03, -0.45: 3.50, -0.49: 3.16}


def drive_at(scalar: float) -> float:
    return emo_drive(scalar, math.copysign(1 - abs(scalar), scalar))


@pytest.mark.parametrize(("scalar", "drive"), PUBLISHED_DRIVE.items())
def test_emo_drive_reproduces_the_published_table_to_its_two_decimals(scalar: float, drive: float) -> None:
    assert drive_at(scalar) == pytest.approx(drive, abs=0.005)


@pytest.mark.parametrize(("scalar", "drive"), MISPRINTED_DRIVE.items())
def test_emo_drive_follows_the_recorded_code_where_the_table_does_not(scalar: float, drive: float) -> None:
    trace = np.load(GOLDEN / "emonavi-3.6-spike.npz")
    recorded = {float(s): float(d) for s, d in zip(trace["trace_scalar"], trace["trace_emoDrive"], strict=True)}
    falling = {s: d for s, d in recorded.items() if -0.5 < s < -0.25}
    assert falling
    for s, d in falling.items():
        assert drive_at(s) == pytest.approx(d, abs=1e-12)
    assert drive_at(scalar) > drive + 0.1


@pytest.mark.parametrize("scalar", [0.0, 0.25, -0.25, 0.5, -0.5, 0.75, -0.75])
def test_emo_drive_is_one_outside_its_open_intervals(scalar: float) -> None:
    assert emo_drive(scalar, 1 - abs(scalar)) == 1.0


def test_emo_drive_brakes_above_three_quarters() -> None:
    assert emo_drive(-0.9, -0.1) == pytest.approx(0.1)


def test_the_published_sdxl_run_is_first_ready_near_step_318() -> None:
    rows = json.loads((GOLDEN / "published_sdxl_loss.json").read_text())
    state = start("3.9")
    lit = []
    for step, loss, _pulse, _ready in rows:
        state, _, ready = observe(state, loss, watch="long")
        lit += [step] if ready else []
    assert abs(lit[0] - 318) <= 3
