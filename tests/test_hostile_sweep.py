"""A small part of tests/bench/hostile.py: no spoiled input gives a traceback, exit 1 or a hang."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest

TRIALS = {"model folder, JSON": 4, "model folder, weights": 2, "captions": 8, "pictures and masks": 6, "run folder": 12}
OTHERS = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root, before = tmp_path_factory.mktemp("hostile"), tempfile.tempdir
    hostile.prepare(root)
    yield root
    tempfile.tempdir = before


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_no_spoiled_input_breaks_a_command(kind: str, place: Path) -> None:
    outcomes = [hostile.run_trial(kind, number, 7, place) for number in range(TRIALS.get(kind, OTHERS))]
    assert [(outcome.number, outcome.words, outcome.fault) for outcome in outcomes if outcome.fault] == []
    codes = {outcome.code for outcome in outcomes}
    assert codes <= {0, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_the_inputs_are_good_before_they_are_spoiled(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the sweep would only ever meet one early refusal."""
    for name in ("spoil_tree", "spoil_bytes", "spoil_container", "spoil_png"):
        monkeypatch.setattr(hostile, name, lambda rng, content, *_: content)
    monkeypatch.setattr(hostile, "spoil_json", lambda rng, tree: hostile.as_json(tree))
    if kind in ("preset, as text", "--set", "captions", "model file"):
        pytest.skip("spoils by hand")
    network = {**hostile.PRESET["network"], "targets": ["mid_block"]}  # a run's LoRA need not be large to be good
    monkeypatch.setitem(hostile.PRESET, "network", network)
    seen: list[str] = []
    for number in range(2 if "model" in kind else 6):
        outcome = hostile.run_trial(kind, number, 7, place)
        if outcome.code == 0:
            return
        seen.append(outcome.first)
    pytest.fail(f"none of them is good: {seen}")
