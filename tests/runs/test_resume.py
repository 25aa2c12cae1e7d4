"""Real runs of a few steps: what ends them, what a resume gives back, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from emotrain.config.load import load, load_preset
from emotrain.config.schema import Preset
from emotrain.errors import CheckpointError, ExitCode, ResourceError
from emotrain.lora.file import read_lora
from emotrain.pulse import gain
from emotrain.runs import start
from emotrain.runs.changes import Identity, refuse
from emotrain.runs.folder import RunFolder
from emotrain.runs.start import Result
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.events import Event, Notice, Phase, SamplesDrawn, Saved, StepEnd

PRESET = """
model: builtin:tiny-sd
dataset: {folders: [{path: ./pictures}], trigger: inkmoji, resolution: 64, buckets: {step: 8, min: 64, max: 64}}
network: {rank: 2, alpha: 2, targets: [mid_block.*to_q]}
train: {max_steps: 6, gradient_accumulation_steps: 2, micro_batch_size: 2, loss: {baseline: corrected}}
save: {every: 2, keep_last: 3}
validate: {every: 3, probe_images: 1}
sample: {every: 0}
stop: {mode: "off"}
log: {tensorboard: false}
"""


class Watch:
    """Keeps the events, and does something at a step."""

    def __init__(self, at: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self.events: list[Event] = []
        self.at, self.act = at, act

    def handle(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepEnd) and event.step == self.at:
            self.act()

    def close(self) -> None:
        pass

    @property
    def notices(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Notice)]

    @property
    def steps(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, StepEnd)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures (a ragged last batch) and the preset."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "pictures").mkdir()
    for index in range(7):
        colour = (30 * index, 255 - 30 * index, 90)
        Image.new("RGB", (64, 64), colour).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text(f"a square, number {index}")
    (folder / "p.yaml").write_text(PRESET)
    return folder


def preset(place: Path, *overrides: str, name: str = "straight") -> Preset:
    return load(str(place / "p.yaml"), overrides, name).preset


@pytest.fixture(scope="module")
def straight(place: Path) -> RunFolder:
    result = start.run(preset(place), runs_dir=place / "runs", observers=(Watch(),))
    assert result.exit_code == ExitCode.OK
    return result.folder


@pytest.fixture
def half(place: Path, straight: RunFolder, tmp_path: Path) -> RunFolder:
    """The run as a kill after the checkpoint of step 4 would have left it."""
    run = RunFolder(tmp_path / "straight")
    shutil.copytree(straight.path, run.path)
    shutil.rmtree(run.checkpoints_dir / "step-00000006")
    run.update_info(finished=None, stop_reason=None)
    run.lora_path.unlink()
    return run


def resume(place: Path, run: RunFolder, *overrides: str, **words: Any) -> tuple[Result, Watch]:
    watch = Watch()
    result = start.resume(run, preset(place, *overrides, name=run.name), observers=(watch,), **words)
    return result, watch


def assert_same(one: RunFolder, other: RunFolder, steps: int = 6) -> None:
    for name in ("lora.safetensors", "lora-last.safetensors"):
        first, second = read_lora(one.path / name).state, read_lora(other.path / name).state
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    first, second = (CheckpointStore(run.checkpoints_dir).load(steps)[0] for run in (one, other))
    for stem, tensors in first.tensors.items():
        assert all(torch.equal(tensors[key], second.tensors[stem][key]) for key in tensors), stem
    for document in (first.documents, second.documents):
        document["state"] = {k: v for k, v in document["state"].items() if k not in ("train_s", "resumes")}
        del document["identity"]
    assert first.documents == second.documents
    logs = [
        [{**json.loads(line), "step_s": 0, "memory_gib": 0} for line in run.metrics_path.read_text().splitlines()]
        for run in (one, other)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == steps


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_run_that_is_stopped_and_goes_on_equals_one_that_was_not(
    place: Path, straight: RunFolder, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    watch = Watch(3, lambda: os.kill(os.getpid(), number))
    result = start.run(preset(place), runs_dir=tmp_path, observers=(watch,))
    assert (result.exit_code, watch.steps) == (code, [1, 2, 3])
    assert result.end.resume_command == f"emotrain resume {result.folder.path}"
    assert result.folder.info()["finished"] is None
    result, watch = resume(place, result.folder)
    assert (result.exit_code, watch.steps) == (0, [4, 5, 6])
    assert_same(straight, result.folder)


@pytest.mark.slow
def test_a_signal_ends_a_sheet_at_once_and_the_resumed_run_draws_it(place: Path, tmp_path: Path) -> None:
    """The one before the first step is drawn to its end, as nothing is saved there."""
    words = ("sample.every=2", "sample.steps=4", 'sample.prompts=["red", "green"]', "train.max_steps=3")
    straight = start.run(preset(place, *words), runs_dir=tmp_path / "a", observers=())

    class AtSecondPicture(Watch):
        def handle(self, event: Event) -> None:
            super().handle(event)
            if isinstance(event, Phase) and (event.name, event.done) == ("drawing samples", 1) and self.steps:
                os.kill(os.getpid(), signal.SIGINT)

    watch = AtSecondPicture()
    half = start.run(preset(place, *words), runs_dir=tmp_path / "b", observers=(watch,))
    assert (half.exit_code, watch.steps) == (130, [1, 2])
    assert [path.name for path in half.folder.checkpoints_dir.iterdir()] == ["step-00000002"]
    assert not (half.folder.samples_dir / "step-00000002-2.png").exists()
    assert "samples of step 2 are left out: the run stops" in watch.notices
    result, watch = resume(place, half.folder, *words)
    assert (result.exit_code, watch.steps) == (0, [3])
    assert [event.step for event in watch.events if isinstance(event, SamplesDrawn)] == [2]
    names = sorted(path.name for path in straight.folder.samples_dir.iterdir())
    assert names == sorted(path.name for path in half.folder.samples_dir.iterdir())
    for name in names:
        assert (straight.folder.samples_dir / name).read_bytes() == (half.folder.samples_dir / name).read_bytes(), name


@pytest.mark.parametrize(("lr", "rises"), [(20000, False), pytest.param(1, True, marks=pytest.mark.slow)])
def test_a_run_that_measures_its_step_length_goes_on_bit_for_bit(
    lr: int, rises: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps far too long validations fail: the gain is lowered before and after the resume. Or it rises."""
    words = (f"train.lr={lr}", "validate.every=1", "validate.fraction=0.3", "train.max_steps=7")
    monkeypatch.setattr(gain, "SURE", 3)

    def changes(folder: RunFolder) -> list[int]:
        values = [value for _, value in folder.info()["gain"]["changes"]]
        assert (max(values, default=0.0) > gain.START) == rises
        return values

    straight = start.run(preset(place, *words), runs_dir=tmp_path / "a", observers=())
    watch = Watch(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    half = start.run(preset(place, *words), runs_dir=tmp_path / "b", observers=(watch,))
    assert watch.steps == [1, 2, 3, 4]
    before = changes(half.folder)
    resumed, watch = resume(place, half.folder, *words)
    assert watch.steps == [5, 6, 7]
    assert before
    assert len(before) < len(changes(straight.folder))
    assert changes(resumed.folder) == changes(straight.folder)
    assert resumed.folder.info()["gain"] == straight.folder.info()["gain"]
    assert_same(straight.folder, resumed.folder, steps=7)


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_gives_the_same_end(
    place: Path, straight: RunFolder, half: RunFolder
) -> None:
    (half.checkpoints_dir / "step-00000004" / "adapter.safetensors").write_bytes(b"")
    _, watch = resume(place, half)
    assert "skipped step-00000004: adapter.safetensors has 0 bytes" in watch.notices[0]
    assert watch.steps == [3, 4, 5, 6]
    assert_same(straight, half)


def test_an_earlier_checkpoint_can_be_asked_for_and_the_later_ones_are_set_aside(
    place: Path, straight: RunFolder, half: RunFolder
) -> None:
    _, watch = resume(place, half, step=2)
    assert watch.steps == [3, 4, 5, 6]
    assert any("step-00000004 is of the line that was left" in line for line in watch.notices)
    assert (half.checkpoints_dir / ".left-step-00000004").is_dir()
    assert_same(straight, half)


def test_a_run_that_died_before_its_lora_was_written_hands_it_over(
    place: Path, straight: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "straight")
    shutil.copytree(straight.path, run.path)
    run.update_info(finished=None, stop_reason=None)
    run.lora_path.unlink()
    result, watch = resume(place, run)
    assert (result.exit_code, watch.steps, result.end.stop_reason) == (0, [], "max_steps")
    assert_same(straight, run)


def test_a_run_that_is_done_is_not_resumed(place: Path, straight: RunFolder) -> None:
    with pytest.raises(CheckpointError, match="is done: it stopped automatically after step 6"):
        resume(place, straight)


def test_a_raised_ceiling_goes_on_and_stays_raised(place: Path, half: RunFolder) -> None:
    result, watch = resume(place, half, "train.max_steps=7", "save.every=5")
    assert watch.steps == [5, 6, 7]
    assert "max_steps: 7" in half.preset_path.read_text()
    assert CheckpointStore(half.checkpoints_dir).steps() == (4, 5, 7)
    assert result.folder.info()["steps"] == 7


def test_what_has_changed_is_refused_by_name_and_nothing_is_written(
    place: Path, half: RunFolder, tmp_path: Path
) -> None:
    before = sorted(path.name for path in half.path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"train.max_grad_norm was 1.0 .* is 0.5 now") as caught:
        resume(place, half, "train.max_grad_norm=0.5")
    assert "--allow-config-change" in (caught.value.hint or "")
    for word in ("train.loss.baseline=raw", "train.ema=false", "train.gain=fixed"):
        with pytest.raises(CheckpointError, match=f"{word.split('=')[0]} was") as caught:
            resume(place, half, word, allow_config_change=True)
        assert "cannot change within a run" in (caught.value.hint or "")
    caption = place / "pictures" / "3.txt"
    caption.write_text("another one")
    try:
        with pytest.raises(CheckpointError, match=r"data set: 1 have changed .*3\.png"):
            resume(place, half)
        _, watch = resume(place, half, allow_config_change=True)
        assert any("3.png" in line for line in watch.notices)
    finally:
        caption.write_text("a square, number 3")
    assert set(before) <= {path.name for path in half.path.rglob("*")}


def test_without_a_whole_checkpoint_it_is_refused_and_never_starts_at_zero(place: Path, half: RunFolder) -> None:
    for path in half.checkpoints_dir.glob("step-*/MANIFEST.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint") as caught:
        resume(place, half)
    assert caught.value.exit_code == ExitCode.CHECKPOINT
    shutil.rmtree(half.checkpoints_dir)
    with pytest.raises(CheckpointError, match="no checkpoint in") as caught:
        resume(place, half)
    assert "start it anew under another --name" in (caught.value.hint or "")


def test_a_run_that_trains_is_not_resumed_beside(place: Path, half: RunFolder) -> None:
    with half.lock(), pytest.raises(ResourceError, match="in use") as caught:
        resume(place, half)
    assert caught.value.exit_code == ExitCode.RESOURCES


def test_a_run_is_never_written_over(place: Path, straight: RunFolder) -> None:
    before = straight.info_path.stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="exists already"):
        start.run(preset(place), runs_dir=straight.path.parent, observers=())
    assert straight.info_path.stat().st_mtime_ns == before


def test_a_full_disk_costs_a_save_and_not_the_run(
    place: Path, half: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CheckpointStore.save

    def refuse(self: CheckpointStore, step: int, *args: Any, **words: Any) -> Path:
        if step == 5:
            raise ResourceError("step 5 could not be saved in x: No space left on device")
        return plain(self, step, *args, **words)

    monkeypatch.setattr(CheckpointStore, "save", refuse)
    result, watch = resume(place, half, "save.every=1")
    assert result.exit_code == ExitCode.OK
    assert "step 5 could not be saved in x: No space left on device; the run goes on" in watch.notices
    saved = [event.step for event in watch.events if isinstance(event, Saved) and "step-" in event.path.name]
    assert saved == [6]


def test_numbers_that_are_not_finite_never_reach_a_file(
    place: Path, half: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emotrain.train import loop

    plain = loop.losses_there
    calls = 0

    def poisoned(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*args) * (float("nan") if calls > 2 else 1.0)

    monkeypatch.setattr(loop, "losses_there", poisoned)
    result, watch = resume(place, half)
    assert result.exit_code == ExitCode.DIVERGED
    assert watch.steps == [5]
    left_out = [line for line in watch.notices if "left out: loss is nan; pictures" in line]
    assert len(left_out) == 3  # without held-out pictures the step length is the published one: none is tried again
    assert ".png" in left_out[0]
    for path in (*half.path.rglob("*.safetensors"), half.lora_path):
        tensors = load_file(path)
        assert all(bool(torch.isfinite(value).all()) for value in tensors.values()), path


def test_data_that_only_moved_resumes_and_data_that_changed_does_not(
    place: Path, half: RunFolder, tmp_path: Path
) -> None:
    pictures = load_preset(half.preset_path).dataset.folders[0].path
    moved = Path(shutil.copytree(pictures, tmp_path / "elsewhere" / Path(pictures).name))
    result, _ = resume(place, half, f"dataset.folders.0.path={moved}")
    assert result.exit_code == 0


def test_data_whose_folder_was_renamed_resumes_to_the_same(
    place: Path, half: RunFolder, straight: RunFolder, tmp_path: Path
) -> None:
    """Ids begin with the folder's name; those of the run stay, so that order, validation and logs do."""
    pictures = load_preset(half.preset_path).dataset.folders[0].path
    moved = Path(shutil.copytree(pictures, tmp_path / "renamed"))
    twin = RunFolder(Path(shutil.copytree(half.path, tmp_path / "twin" / half.name)))
    result, _ = resume(place, half, f"dataset.folders.0.path={moved}")
    assert result.exit_code == 0
    assert_same(half, straight)
    gone = min(path.name for path in moved.glob("*.png"))
    (moved / gone).unlink()
    with pytest.raises(CheckpointError) as refused:
        resume(place, twin, f"dataset.folders.0.path={moved}")
    told = [problem.message for problem in refused.value.problems]
    assert [one for one in told if "data set" in one] == [f"data set: 1 are gone: {Path(pictures).name}/{gone}"]


def test_a_rate_that_is_changed_on_purpose_is_the_one_that_trains(half: RunFolder, tmp_path: Path) -> None:
    """A checkpoint brings its parameter groups, and with them the old rate."""

    def first_pulse(run: RunFolder, *overrides: str) -> float:
        watch, pulses = Watch(), list[float]()
        watch.handle = lambda event: pulses.append(event.reading.pulse) if isinstance(event, StepEnd) else None
        settings = load_preset(run.preset_path, list(overrides))
        start.resume(run, settings, allow_config_change=True, observers=[watch])
        return pulses[0]

    twin = RunFolder(Path(shutil.copytree(half.path, tmp_path / "twin")))
    assert first_pulse(twin, "train.lr=0.5") == pytest.approx(0.5 * first_pulse(half), rel=1e-6)


@pytest.mark.parametrize("what", ["the VAE", "the text encoders", "the model's scheduler", "earlier LoRA 1"])
def test_every_other_input_that_changed_is_named(what: str) -> None:
    before, after = (Identity({}, "a", {}, {what: digest, "x": "same"}) for digest in ("1", "2"))
    with pytest.raises(CheckpointError, match=what) as refused:
        refuse(before, after, allow=False)
    assert len(refused.value.problems) == 1
    assert refuse(before, after, allow=True) == [f"{what}: not what the run was started with"]
    assert Identity.from_document(before.to_document()) == before
