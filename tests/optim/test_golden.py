"""The weights equal the recorded ones of the published optimizers, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emotrain.optim import kernels
from emotrain.optim.registry import EMO

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = sorted(GOLDEN.glob("emo*.npz"))
# One rounding per step apart (torch's fused kernels); weights move by up to 3e-3 a step.
MID_TOLERANCE, FINAL_TOLERANCE = 5e-6, 1e-4


def replay(path: Path, **words):
    name, generation, scenario = path.stem.split("-", 2)
    trace, inputs = np.load(path), dict(np.load(GOLDEN / f"inputs-{scenario}.npz"))
    params = [torch.nn.Parameter(torch.tensor(inputs[f"init_{i}"])) for i in range(4)]
    words = {**json.loads(str(trace["kwargs"])), **words}
    optimizer = EMO[name](params, generation=generation, notify=False, **words)
    readings, signals, mid = [], [], []
    for step, loss in enumerate(inputs["loss"], 1):
        for i, param in enumerate(params):
            param.grad = torch.tensor(inputs[f"grad_{i}"][step - 1])
        optimizer.observe(float(loss))
        optimizer.step()
        readings.append(optimizer.reading)
        signals.append(optimizer.should_stop)
        if step == 20:
            mid = [param.detach().clone().numpy() for param in params]
    return trace, readings, signals, mid, [param.detach().numpy() for param in params], optimizer


def furthest(ours: list[np.ndarray], trace: np.lib.npyio.NpzFile, when: str) -> float:
    return max(float(np.abs(x - trace[f"{when}_{i}"]).max()) for i, x in enumerate(ours))


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_weights_and_readings_match_the_trace(path: Path) -> None:
    trace, readings, signals, mid, final, optimizer = replay(path)
    assert furthest(mid, trace, "mid") < MID_TOLERANCE
    assert furthest(final, trace, "final") < FINAL_TOLERANCE
    words = {"scalar": "scalar", "trust": "trust", "pulse": "emoPulse", "drive": "emoDrive"}
    for ours, theirs in words.items():
        if f"trace_{theirs}" in trace.files:
            felt = np.array([getattr(reading, ours) for reading in readings])
            np.testing.assert_allclose(felt, trace[f"trace_{theirs}"], rtol=0, atol=1e-12, err_msg=ours)
    assert signals == trace["trace_should_stop"].tolist()
    assert optimizer.param_groups[0]["lr"] == readings[-1].pulse


@pytest.mark.parametrize("path", [p for p in TRACES if "descend" in p.stem], ids=lambda path: path.stem)
def test_the_fallback_without_fused_kernels_matches_the_trace_to_1e_6(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_fused_adamw", lambda device_type: False)
    monkeypatch.setattr(kernels, "has_fused_sgd", lambda device_type: False)
    trace, _, _, mid, final, _ = replay(path)
    assert furthest(mid, trace, "mid") < 1e-6
    assert furthest(final, trace, "final") < 1e-6


def test_airy_and_fact_hold_no_state_at_all() -> None:
    for stem in ("emoairy-3.9-descend", "emoairy-3.7.6-descend", "emoairy-3.7.0-descend", "emofact-3.6-descend"):
        optimizer = replay(GOLDEN / f"{stem}.npz")[-1]
        assert optimizer.state_dict()["state"] == {}
