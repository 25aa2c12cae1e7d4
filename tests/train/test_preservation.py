"""`dataset.class`: what the model makes of the class word stays what it is without the LoRA."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fake_run import FakeData, Recorder, limits, make_parts

from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.dataset.buckets import BucketRules
from emotrain.dataset.examples import Example
from emotrain.dataset.settings import LoaderSettings
from emotrain.runs import start
from emotrain.runs.folder import RunFolder
from emotrain.runs.plan import make_plan
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.loop import accumulate
from emotrain.train.preservation import EVERY, WEIGHT, Preservation
from emotrain.train.state import TrainState


def with_change(parts: Any) -> Any:
    """The parts with a LoRA that changes predictions."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        parts.adapter.parameters()[0].copy_(0.2 * torch.randn(4, 4, 1, 1, generator=generator))
    return replace(
        parts, preservation=Preservation(parts.family, parts.adapter, lambda ids: (("woman",) * len(ids), {}))
    )


def gradient(parts: Any, step: int, **words: int) -> tuple[torch.Tensor, list[float]]:
    parts.adapter.drop_gradients()
    gathered = accumulate(parts, limits(**words), TrainState(step=step))
    return parts.adapter.parameters()[0].grad.clone(), gathered.read(torch.zeros(1))[0]


def test_its_gradient_is_that_of_the_mean_squared_change_and_it_stays_out_of_the_loss() -> None:
    parts = with_change(make_parts(Recorder(), data=FakeData(4, 2)))
    kept, observed = gradient(parts, 0)
    bare, plain = gradient(replace(parts, preservation=None), 0)
    assert observed == plain
    batch, objective = parts.data.batch(0), parts.objective
    seen: list[torch.Tensor] = []
    whole = parts.family.predict

    def spy(noisy: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append(noisy)
        return whole(noisy, *more)

    parts.family.predict = spy
    gradient(parts, 0)
    noisy = seen[1]
    assert torch.equal(seen[1], seen[2])  # off and on at the same place
    weight = parts.adapter.parameters()[0].detach().clone().requires_grad_(True)
    change = torch.nn.functional.conv2d(noisy, weight)
    (WEIGHT * change.pow(2).mean()).backward()
    torch.testing.assert_close(kept - bare, weight.grad)
    assert objective is not None
    assert len(batch.ids) == 2


def test_a_share_of_the_steps_preserves_once_a_step_whatever_is_accumulated() -> None:
    parts = with_change(make_parts(Recorder(), data=FakeData(6, 2)))
    for step in range(2 * EVERY):
        for count in (1, 3):
            parts.family.calls = 0
            gradient(parts, step, gradient_accumulation_steps=count)
            assert parts.family.calls == count + 2 * (step % EVERY == 0)


def test_training_towards_it_alone_takes_the_change_away() -> None:
    parts = with_change(make_parts(Recorder(), data=FakeData(4, 2)))
    weight = parts.adapter.parameters()[0]
    before = weight.detach().norm()
    for _ in range(60):
        batch = parts.data.batch(0)
        loss = parts.preservation.loss(0, batch, batch.latents, torch.zeros(2))
        parts.adapter.drop_gradients()
        loss.backward()
        with torch.no_grad():
            weight -= 0.5 * weight.grad
    assert weight.detach().norm() < 0.1 * before


def drift(folder: RunFolder) -> float:
    import json

    return float(json.loads(folder.path.joinpath("validation.jsonl").read_text().splitlines()[-1])["drift"])


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        pytest.param("quickstart", (), marks=pytest.mark.slow),
        ("quickstart-flux", ("train.gradient_accumulation_steps=2",)),
        pytest.param("quickstart", ("network.text_encoder=true",), marks=pytest.mark.slow),
    ],
)
def test_a_run_with_a_class_changes_it_less_and_resumes_bit_for_bit(
    tmp_path: Path, preset: str, more: tuple[str, ...]
) -> None:
    torch.set_num_threads(1)
    words = ["sample.every=0", "log.tensorboard=false", "validate.every=2", "train.max_steps=4", "save.every=2",
             "stop.mode=off", "dataset.class=picture", "network.targets=attn",
             "train.loss.baseline=raw", "validate.probe_images=1", *more]  # fmt: skip
    loaded = load_preset(preset, words, "one")
    whole = start.run(loaded, runs_dir=tmp_path / "a", observers=()).folder
    other = RunFolder(tmp_path / "b" / "one")
    shutil.copytree(whole.path, other.path)
    shutil.rmtree(other.checkpoints_dir / "step-00000004")
    other.update_info(finished=None, stop_reason=None)
    start.resume(other, loaded, observers=())
    first, second = (CheckpointStore(run.checkpoints_dir).load(4)[0].tensors for run in (whole, other))
    assert all(torch.equal(t, second[stem][key]) for stem, tensors in first.items() for key, t in tensors.items())
    without = load_preset(preset, [*words, "dataset.class=null"], "two")
    assert drift(whole) < drift(start.run(without, runs_dir=tmp_path / "a", observers=()).folder)


def test_a_class_that_holds_the_trigger_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    text = "model: builtin:tiny-sd\ndataset: {path: builtin:example, trigger: inkmoji, class: %s}\n"
    path.write_text(text % "an Inkmoji picture", encoding="utf-8")
    assert main(["check", str(path)]) == 2
    assert "p.yaml:2: dataset.class is `an Inkmoji picture`, which holds the trigger" in capsys.readouterr().err
    path.write_text(text % "picture", encoding="utf-8")
    assert main(["check", str(path)]) == 0
    assert "`picture` is kept near to what it was" in capsys.readouterr().out
    without = make_plan(load_preset(path, ["dataset.class=null"], "x")).work.texts
    assert make_plan(load_preset(path, (), "x")).work.texts == without + 32
    path.write_text(text % '" "', encoding="utf-8")
    assert main(["check", str(path)]) == 2
    path.write_text((text % "picture").replace("trigger: inkmoji, ", ""), encoding="utf-8")
    assert main(["check", str(path)]) == 2
    assert "dataset.class is `picture` without a dataset.trigger" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("red dress, smiling", "woman, red dress, smiling"),
        ("mika_ch, red dress", "woman, red dress"),
        ("A photo of Mika_ch in a red dress", "woman, A photo of woman in a red dress"),
        ("[trigger] in a red dress", "woman in a red dress"),
        ("", "woman"),
    ],
)
def test_the_class_word_stands_in_the_trigger_s_place(caption: str, kept: str) -> None:
    settings = LoaderSettings(BucketRules((64,)), trigger="mika_ch", class_word="woman")
    example = Example("a.png", Path(), 64, 64, (caption,), "", 0)
    assert settings.class_text(example) == kept
    assert "mika_ch" in settings.texts(example)[0].casefold()
    assert settings.class_text(replace(example, captions=("a girl",), prior=True)) == "a girl"
