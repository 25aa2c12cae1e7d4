"""Runs that memory is too small for: found out in the first minute, told with what to change, nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from emotrain.cli.app import main
from emotrain.config.load import load
from emotrain.config.schema import Preset
from emotrain.errors import ExitCode
from emotrain.families.sd.model import StableDiffusion
from emotrain.lora.file import read_lora
from emotrain.runs import out_of_memory, start
from emotrain.runs.folder import RunFolder
from emotrain.train.checkpoint import CheckpointStore
from emotrain.train.memory import OutOfMemory

PRESET = """
model: builtin:tiny-sd
dataset: {folders: [{path: ./pictures}], resolution: 64, buckets: {step: 8, min: 32, max: 96}}
network: {rank: 2, alpha: 2, targets: [mid_block.*to_q]}
train: {max_steps: 4, gradient_accumulation_steps: 1, micro_batch_size: 1, seed: 5, loss: {baseline: raw}}
save: {every: 3, keep_last: 3}
validate: {every: 3, probe_images: 1}
sample: {every: 0}
stop: {mode: "off"}
log: {tensorboard: false}
"""
CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small pictures and a large one, which comes as the last of the epoch."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "pictures").mkdir()
    for index in range(7):
        size = (64, 64) if index == 6 else (32, 64)
        Image.new("RGB", size, (30 * index, 255 - 30 * index, 90)).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text(f"a square, number {index}")
    (folder / "p.yaml").write_text(PRESET)
    return folder


def preset(place: Path, *overrides: str, name: str = "one") -> Preset:
    return load(str(place / "p.yaml"), overrides, name).preset


class Denoiser:
    """Counts the calls with a gradient, keeps their sizes, and runs out of memory where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full: Callable[[int, tuple[int, ...]], bool]) -> None:
        self.sizes: list[tuple[int, ...]] = []
        plain = StableDiffusion.predict

        def predict(family: StableDiffusion, noisy: torch.Tensor, *words: Any) -> torch.Tensor:
            if torch.is_grad_enabled() and noisy.device.type != "meta":
                self.sizes.append(tuple(noisy.shape))
                if full(len(self.sizes), tuple(noisy.shape)):
                    raise torch.OutOfMemoryError(CUDA)
            return plain(family, noisy, *words)

        monkeypatch.setattr(StableDiffusion, "predict", predict)


def area(size: tuple[int, ...]) -> int:
    return size[0] * size[-1] * size[-2]


def digest(run: RunFolder) -> list[Any]:
    """All that a run leaves, without its times."""
    found: list[Any] = []
    for step in CheckpointStore(run.checkpoints_dir).steps():
        checkpoint, _ = CheckpointStore(run.checkpoints_dir).load(step)
        found += [{k: v.tolist() for k, v in tensors.items()} for _, tensors in sorted(checkpoint.tensors.items())]
        checkpoint.documents["state"] |= {"train_s": 0, "resumes": 0}
        found.append({k: v for k, v in checkpoint.documents.items() if k != "identity"})
    found += [{k: v.tolist() for k, v in read_lora(path).state.items()} for path in (run.lora_path, run.lora_last_path)]
    found.append((run.path / "picture_losses.jsonl").read_text())
    return found


def test_the_largest_batch_is_tried_first_and_changes_no_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Denoiser(monkeypatch, lambda call, size: False)
    tried = start.run(preset(place), runs_dir=tmp_path / "tried", observers=())
    sizes = denoiser.sizes
    assert len(sizes) == 5
    assert area(sizes[0]) == max(map(area, sizes)) > area(sizes[1])
    torch.rand(100)
    with monkeypatch.context() as without:
        without.setattr(out_of_memory, "try_largest", lambda *_: None)
        denoiser.sizes = []
        plain = start.run(preset(place), runs_dir=tmp_path / "plain", observers=())
    assert denoiser.sizes == sizes[1:]
    assert digest(tried.folder) == digest(plain.folder)


@pytest.mark.slow
def test_a_resumed_run_tries_it_too_and_goes_on_to_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Denoiser(monkeypatch, lambda call, size: False)
    straight = start.run(preset(place), runs_dir=tmp_path / "straight", observers=())
    first = start.run(preset(place, "train.max_steps=3"), runs_dir=tmp_path / "half", observers=())
    denoiser.sizes = []
    resumed = start.resume(first.folder, preset(place), observers=())
    assert len(denoiser.sizes) == 2
    assert area(denoiser.sizes[0]) > area(denoiser.sizes[1])
    assert digest(straight.folder) == digest(resumed.folder)


def test_where_the_first_step_is_as_large_nothing_is_tried(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Denoiser(monkeypatch, lambda call, size: False)
    words = ("train.gradient_accumulation_steps=7", "train.max_steps=1")
    start.run(preset(place, *words), runs_dir=tmp_path, observers=())
    assert len(denoiser.sizes) == 7


def test_a_run_that_does_not_fit_ends_before_it_has_a_folder_and_says_what_to_change(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    largest: list[int] = []
    Denoiser(monkeypatch, lambda call, size: not largest.append(area(size)))
    runs = tmp_path / "runs"
    code = main(["run", str(place / "p.yaml"), "--runs-dir", str(runs), "--plain"])
    said = capsys.readouterr().err
    assert code == ExitCode.RESOURCES
    assert "error: out of memory on the largest batch, " in said
    assert "0.02 GiB more were needed" in said
    assert "hint: `train.gradient_checkpointing: true` saves about " in said
    assert "Traceback" not in said
    assert not (runs / "p").exists()


def test_a_run_that_fills_the_memory_later_keeps_its_last_step_and_ends_with_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = start.run(preset(place, "save.every=2"), runs_dir=tmp_path / "straight", observers=())
    with monkeypatch.context() as full:
        Denoiser(full, lambda call, size: call == 5)  # the one that is tried first, then four steps
        with pytest.raises(OutOfMemory, match=r"^out of memory at step 4: 0\.02 GiB") as caught:
            start.run(preset(place, "save.every=2"), runs_dir=tmp_path / "full", observers=())
    run = RunFolder(tmp_path / "full" / "one")
    assert caught.value.exit_code == ExitCode.RESOURCES
    assert "train.gradient_checkpointing: true" in caught.value.hint
    assert "resume with `emotrain resume one --set KEY=VALUE --allow-config-change`" in caught.value.hint
    assert CheckpointStore(run.checkpoints_dir).steps() == (2, 3)
    assert (run.info()["stop_reason"], run.info()["steps"]) == ("out of memory", 3)
    start.resume(run, preset(place, "save.every=2"), observers=())
    last = [CheckpointStore(folder.checkpoints_dir).load(4)[0].tensors for folder in (straight.folder, run)]
    for stem, tensors in last[0].items():
        assert all(torch.equal(value, last[1][stem][key]) for key, value in tensors.items()), stem


def test_samples_that_do_not_fit_cost_the_samples_and_not_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emotrain.runs import draw
    from emotrain.train.events import Event, Notice

    def full(*words: Any) -> None:
        raise torch.OutOfMemoryError(CUDA)

    told: list[Event] = []
    watch = type("Watch", (), {"handle": lambda self, event: told.append(event), "close": lambda self: None})()
    monkeypatch.setattr(draw, "draw_sample", full)
    words = ("sample={every: 2, prompts: [a], at_start: false}", "train.max_steps=2")
    result = start.run(preset(place, *words), runs_dir=tmp_path, observers=(watch,))
    assert result.exit_code == ExitCode.OK
    lines = [event.message for event in told if isinstance(event, Notice)]
    assert "samples of step 2 were not drawn: out of memory; a smaller sample.size needs less" in lines


@pytest.mark.parametrize(
    ("wanted", "chosen"), [(0.5, ["a"]), (2.0, ["b"]), (3.5, ["a", "b", "c"]), (9.0, ["a", "b", "c"])]
)
def test_the_cheapest_switch_that_is_enough_is_chosen_else_several(wanted: float, chosen: list[str]) -> None:
    assert out_of_memory.choose([("a", 1.0), ("b", 2.0), ("c", 1.5)], wanted) == chosen


def test_every_switch_of_the_plan_has_a_price(place: Path) -> None:
    from emotrain.families.memory import MemoryPlan
    from emotrain.runs.build import sniffed
    from emotrain.runs.plan import activation_memory_of
    from emotrain.runs.plan_memory import Memory

    one = preset(place, "train.micro_batch_size=8")
    found = sniffed(one)
    activation_memory = activation_memory_of(one, found, (8, 64, 64), torch.bfloat16)
    memory = Memory(one, found, activation_memory, torch.bfloat16, None)
    rows = memory.savings(MemoryPlan("none", False, False, 0.0, None, ""))
    assert rows
    assert {name for name, _ in rows} <= set(out_of_memory.COSTS)
