"""`emotrain replay` shows what the optimizers themselves would have felt."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from emotrain.cli.app import main
from emotrain.optim import EmoAiry, EmoSens
from emotrain.pulse.draw import Panel, svg
from emotrain.pulse.replay import replay

GOLDEN = Path(__file__).parents[1] / "golden"
LOG = GOLDEN / "published_sdxl_loss.json"


def published() -> tuple[list[int], list[float]]:
    rows = json.loads(LOG.read_text())
    return [row[0] for row in rows], [row[1] for row in rows]


@pytest.mark.parametrize("generation", ["3.9", "3.7.6", "3.7.0"])
def test_readings_are_those_of_an_optimizer_that_hears_the_same_losses(generation: str) -> None:
    steps, losses = published()
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = EmoAiry([param], generation=generation, notify=False)
    expected = []
    for loss in losses:
        optimizer.observe(loss)
        optimizer.step()
        expected.append(optimizer.reading)
    assert list(replay(steps, losses, generation=generation).readings) == expected


def test_the_published_run_is_ready_near_step_318_and_never_for_the_older_signals() -> None:
    signals = replay(*published()).signals
    assert abs(signals[0].first - 318) <= 3
    assert signals[0].at_end
    assert [signal.first for signal in signals[1:]] == [None, None]


def test_the_older_signals_light_as_in_the_optimizers() -> None:
    import numpy as np

    losses = np.load(GOLDEN / "inputs-settle.npz")["loss"].tolist()
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    optimizer = EmoSens([param], generation="3.7", notify=False)
    lit = []
    for step, loss in enumerate(losses, 1):
        optimizer.observe(loss)
        optimizer.step()
        lit += [step] if optimizer.should_stop else []
    signal = replay(range(1, len(losses) + 1), losses).signals[1]
    assert (signal.first, signal.num_lit) == (lit[0], len(lit))


def test_json_is_one_object_with_a_number_for_every_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(LOG), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["generation"] == "3.9"
    words = ("step", "loss", "scalar", "trust", "pulse", "short", "medium", "long", "noise_est", "d_est")
    assert {len(value[word]) for word in words} == {400}
    assert value["signals"][0]["name"] == "3.9"
    assert abs(value["signals"][0]["first"] - 318) <= 3


@pytest.mark.parametrize("generation", ["3.6", "3.7", "3.7.0", "3.9"])
def test_the_terminal_chart_names_every_curve_and_signal(generation: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(LOG), "--generation", generation]) == 0
    captured = capsys.readouterr()
    for word in ("loss", "scalar", "trust", "lr x drive" if generation == "3.6" else "emoPulse", "stop signal"):
        assert word in captured.out
    assert captured.err == ""


def test_the_plot_is_an_svg_with_all_curves_and_the_lit_signal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "felt.svg"
    assert main(["replay", str(LOG), "--json", "--plot", str(path)]) == 0
    json.loads(capsys.readouterr().out)
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"loss", "scalar", "trust", "emoPulse", "3.9 lit"} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 7


def test_a_plot_that_cannot_be_written_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(LOG), "--plot", str(tmp_path / "no" / "felt.svg")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_missing_log_is_a_usage_error_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "nowhere.csv"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nowhere.csv: there is no such log" in captured.err
    assert "hint:" in captured.err


def test_a_thinned_log_with_gaps_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n10,1.0\n20,nan\n30,0.5\n40,0.4\n50,0.3\n")
    assert main(["replay", str(path)]) == 0
    err = capsys.readouterr().err
    assert "every 10th step" in err
    assert "1 losses are not finite" in err


def test_replay_leaves_torch_out() -> None:
    code = (
        "import sys; from emotrain.cli.app import main; "
        f"assert main(['replay', {str(LOG)!r}, '--json']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_svg_escapes_names_and_draws_flat_curves() -> None:
    text = svg([Panel("<b>", [("a&b", [(1.0, 2.0), (2.0, 2.0)])], marks=[(1.5, "<i>")])], title="x<y")
    ElementTree.fromstring(text)
    assert "<b>" not in text
