"""Acting on single pictures: who counts less, who is shown less, what comes in their place, and that it is undone."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fake_run import FakeData, Recorder, limits, make_parts

from emotrain.dataset.contrasts import PictureContrast
from emotrain.dataset.ranking import LossRecord
from emotrain.train.loop import accumulate
from emotrain.train.state import TrainState
from emotrain.train.suspects import Action, Suspects, describe

NAMES = [f"p{k:02}" for k in range(24)]


def contrast(name: str, gain: float) -> PictureContrast:
    """A picture whose own caption is `gain` (of its log-loss) better than three others'."""
    place = NAMES.index(name)
    others = [NAMES[(place + k) % len(NAMES)] for k in (1, 5, 9)]
    wobble = [0.02 * ((place * 7 + k * 5) % 11 - 5) for k in range(3)]
    own = float(torch.tensor(-gain).exp())
    rows = ((other, (float(torch.tensor(w).exp()),)) for other, w in zip(others, wobble, strict=True))
    return PictureContrast(name, (own,), tuple(rows))


def told(wrong: tuple[str, ...] = ("p03",)) -> Suspects:
    contrasts = {name: contrast(name, -0.1 if name in wrong else 0.5 + 0.01 * k) for k, name in enumerate(NAMES)}
    return Suspects(contrasts=contrasts)


def losses(memorised: str | None) -> list[LossRecord]:
    """Twelve visits of every picture; the memorised one's loss falls to a tenth in the second half."""
    found = []
    for step in range(1, 13):
        for k, name in enumerate(NAMES):
            loss = 0.1 if name == memorised and step > 6 else 1.0 + 0.01 * ((k * step) % 7)
            found.append(LossRecord(step, name, (step * 0.37 + k * 0.11) % 1.0, loss))
    return found


@pytest.mark.parametrize("mode", ["weigh", "leave_out"])
def test_a_caption_that_suits_no_better_acts_and_is_undone_when_the_evidence_goes(mode: Any) -> None:
    suspects = told()
    assert suspects.decide(10, mode) == [Action("p03", mode, 10)]
    assert suspects.decide(20, mode) == []
    assert suspects.weights == {"p03": 0.1}
    assert suspects.shares == ({"p03": 0.0} if mode == "leave_out" else {})
    suspects.contrasts["p03"] = contrast("p03", 0.6)
    assert suspects.decide(30, mode) == [Action("p03", mode, 10, undone=30)]
    assert suspects.weights == suspects.shares == {}
    suspects.contrasts["p03"] = contrast("p03", -0.1)
    assert suspects.decide(40, mode) == [Action("p03", mode, 40)]
    assert [one.describe()[-21:] for one in suspects.actions][0].endswith("from step 10 to 30")


def test_a_memorised_picture_is_shown_a_quarter_as_often() -> None:
    suspects = Suspects()
    suspects.note(losses("p05"))
    assert suspects.decide(12, "weigh") == [Action("p05", "seldom", 12)]
    assert suspects.shares == {"p05": 0.25}
    assert suspects.weights == {}


def test_nothing_is_done_where_nothing_stands_out_or_the_model_hears_no_captions() -> None:
    clean = told(wrong=())
    clean.note(losses(None))
    assert clean.decide(12, "weigh") == []
    deaf = Suspects(contrasts={name: contrast(name, 0.0) for name in NAMES})
    assert deaf.decide(0, "leave_out") == []
    few = Suspects(contrasts={name: told().contrasts[name] for name in NAMES[:7]})
    assert few.decide(0, "weigh") == []
    assert Suspects().decide(0, "weigh") == []


def test_the_state_comes_back_from_json_and_decides_alike() -> None:
    state = TrainState(suspects=told())
    state.suspects.note(losses("p05"))
    state.suspects.decide(12, "weigh")
    again = TrainState.from_document(json.loads(json.dumps(state.to_document())), {})
    assert again == state
    assert again.suspects.decide(20, "weigh") == state.suspects.decide(20, "weigh") == []


def test_changes_are_told_in_a_line_a_kind() -> None:
    lines = describe([Action("a", "weigh", 5), Action("b", "weigh", 5), Action("c", "seldom", 2, undone=5)])
    assert len(lines) == 2
    assert lines[0].startswith("a, b: counting a tenth from now on")
    assert lines[1] == "c: as before again (not shown a quarter as often), the evidence is gone"


def test_the_gradient_counts_less_and_the_loss_that_is_observed_does_not() -> None:
    def gradient(suspects: Suspects, names: tuple[str, ...]) -> tuple[torch.Tensor, list[float]]:
        class Named(FakeData):
            def batch(self, micro_step: int, shares: object = None) -> Any:
                return replace(super().batch(micro_step), ids=names)

        parts = make_parts(Recorder(), data=Named(4, 2))
        gathered = accumulate(parts, limits(), TrainState(suspects=suspects))
        return parts.adapter.parameters()[0].grad, gathered.read(torch.zeros(1))[1]

    whole, plain = gradient(Suspects(), ("a", "b"))
    first, _ = gradient(Suspects([Action("b", "leave_out", 0)]), ("a", "b"))
    both, observed = gradient(Suspects([Action("a", "weigh", 0), Action("b", "weigh", 0)]), ("a", "b"))
    torch.testing.assert_close(both, 0.1 * whole)
    assert observed == plain
    second, _ = gradient(Suspects([Action("a", "weigh", 0)]), ("a", "b"))
    torch.testing.assert_close(first + second, 1.1 * whole)
    assert not torch.allclose(first, whole)


@pytest.mark.parametrize("mode", ["weigh", pytest.param("leave_out", marks=pytest.mark.slow)])
def test_a_run_that_acts_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Killed between an action and the next look at the pictures, and between two of its draws."""
    from emotrain.config.load import load_preset
    from emotrain.dataset.scan import resolve_folder
    from emotrain.runs import contrast as watching
    from emotrain.runs import start
    from emotrain.runs.folder import RunFolder
    from emotrain.train.checkpoint import CheckpointStore

    torch.set_num_threads(1)
    monkeypatch.setattr(watching, "SHARE", 0.5)
    shutil.copytree(resolve_folder("builtin:example"), tmp_path / "own")
    captions = sorted((tmp_path / "own").glob("*.txt"))[:6]
    texts = [path.read_text(encoding="utf-8") for path in captions]
    for path, text in zip(captions, [*texts[1:], texts[0]], strict=True):
        path.write_text(text, encoding="utf-8")
    words = (
        f"dataset.folders=[{{path: {tmp_path / 'own'}}}]", "sample.every=0", "log.tensorboard=false", "save.every=6",
        "validate.every=4", "train.max_steps=12", "stop.mode=off", f"dataset.suspects={mode}",
        "network.targets=[mid_block.*to_q]", "train.loss.baseline=raw",
    )  # fmt: skip
    preset = load_preset("quickstart", words, "one")
    whole = start.run(preset, runs_dir=tmp_path / "a", observers=()).folder
    other = RunFolder(tmp_path / "b" / "one")
    shutil.copytree(whole.path, other.path)
    shutil.rmtree(other.checkpoints_dir / "step-00000012")
    other.update_info(finished=None, stop_reason=None, picture_actions=None)
    start.resume(other, preset, observers=())
    first, second = (CheckpointStore(run.checkpoints_dir).load(12)[0] for run in (whole, other))
    assert first.documents["state"]["suspects"] == second.documents["state"]["suspects"]
    assert first.documents["state"]["suspects"]["contrasts"]
    acted = {one["id"].removeprefix("own/") for one in first.documents["state"]["suspects"]["actions"]}
    assert acted
    assert acted <= {f"{path.stem}.png" for path in captions}
    assert all(
        torch.equal(tensor, second.tensors[stem][key])
        for stem, tensors in first.tensors.items()
        for key, tensor in tensors.items()
    )
    assert whole.info()["picture_actions"] == other.info()["picture_actions"]
    page = (other.path / "report.html").read_text(encoding="utf-8")
    words_on_page = "counting a tenth" if mode == "weigh" else "left out"
    assert words_on_page in page
