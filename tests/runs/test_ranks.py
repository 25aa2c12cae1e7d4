"""Whole runs in two processes: the LoRA of one process with twice the accumulation, resumes, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import together

from emotrain.config.load import load
from emotrain.config.schema import Preset
from emotrain.ranks import ALONE, Ranks
from emotrain.runs import loaded, start
from emotrain.runs.folder import KeptByTheLead, RunFolder
from emotrain.train.events import Notice, StepEnd
from emotrain.train.validation import Validation

PRESET = """
model: builtin:tiny-sd
dataset: {folders: [{path: ./pictures}], trigger: inkmoji, resolution: 64, buckets: {step: 8, min: 64, max: 64}}
network: {rank: 2, alpha: 2, targets: [transformer_blocks.0.*to_q]}
train: {max_steps: 4, micro_batch_size: 1}
save: {every: 2, keep_last: 3}
validate: {every: 2, probe_images: 1}
sample: {every: 0}
stop: {mode: "off"}
log: {tensorboard: false}
"""
TWICE = "train.gradient_accumulation_steps=2"


class Watch:
    """Keeps what a run says, and does something at a step."""

    def __init__(self, at: int = 0, number: int = signal.SIGINT) -> None:
        self.steps: list[int] = []
        self.notices: list[str] = []
        self.at, self.number = at, number

    def handle(self, event: Any) -> None:
        if isinstance(event, Notice):
            self.notices.append(event.message)
        if isinstance(event, StepEnd):
            self.steps.append(event.step)
            if event.step == self.at:
                os.kill(os.getpid(), self.number)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures, a second folder with the same ones under another name, and the preset beside each."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "pictures").mkdir()
    for index in range(7):
        Image.new("RGB", (64, 64), (30 * index, 255 - 30 * index, 90)).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text(f"a square, number {index}")
    (folder / "p.yaml").write_text(PRESET)
    shutil.copytree(folder / "pictures", folder / "machine" / "images")
    (folder / "machine" / "p.yaml").write_text(PRESET.replace("./pictures", "./images"))
    return folder


def preset(place: Path, words: Sequence[str], name: str) -> Preset:
    return load(str(place / "p.yaml"), words, name).preset


def run(place: Path, runs_dir: Path, *words: str, name: str = "run", ranks: Ranks = ALONE, watch: Any = None) -> Any:
    """Exit code, steps and notices of a run."""
    watch = watch or Watch()
    result = start.run(preset(place, words, name), runs_dir=runs_dir, observers=(watch,), ranks=ranks)
    return int(result.exit_code), watch.steps, watch.notices


def go_on(place: Path, runs_dir: Path, *words: str, name: str = "run", ranks: Ranks = ALONE) -> Any:
    watch = Watch()
    folder = RunFolder(runs_dir / name) if ranks.first else KeptByTheLead(runs_dir / name)
    result = start.resume(folder, preset(place, words, name), observers=(watch,), ranks=ranks)
    return int(result.exit_code), watch.steps, watch.notices


def state_of(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    """Weights and optimizer of the last checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {k: v for name in ("adapter", "optimizer") for k, v in load_file(folder / f"{name}.safetensors").items()}


def losses_of(run: Path) -> list[float]:
    """Losses of all steps and validations."""
    rows = [json.loads(line) for log in ("metrics", "validation") for line in (run / f"{log}.jsonl").open()]
    return [number for row in rows for number in (row["loss"], row.get("grad_norm", 0.0))]


def assert_near(one: Path, other: Path) -> None:
    assert losses_of(one) == pytest.approx(losses_of(other), rel=1e-5)
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=1e-3, atol=1e-6, msg=key)


CASES = {
    "sd": (),
    "flux": ("model=builtin:tiny-flux",),
    "class-and-texts": ("dataset.class=square", "network.text_encoder=true"),
    "lokr-and-suspects": ("network.type=lokr", "dataset.suspects=weigh"),
    "gain": ("train.lr=2000", "validate.every=1", "validate.fraction=0.3"),
    "corrected-batches": ("train.loss.baseline=corrected", "train.micro_batch_size=3", "dataset.balance=equal"),
    "adamw": ("train.optimizer=adamw", "train.lr=1e-3", "network.targets=all"),
    "bf16": ("model.dtype=bf16",),
}
QUICK = ("sd",)


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_two_processes_equal_one_with_twice_the_accumulation(place: Path, tmp_path: Path, case: str) -> None:
    words = CASES[case]
    assert run(place, tmp_path, *words, TWICE, name="one")[0] == 0
    first, second = together(lambda ranks: run(place, tmp_path, *words, name="two", ranks=ranks))
    assert (first[:2], second[0]) == ((0, [1, 2, 3, 4]), 0)
    assert_near(tmp_path / "one", tmp_path / "two")
    info = RunFolder(tmp_path / "two").info()
    assert (info["ranks"], info["steps"]) == (2, 4)
    assert (tmp_path / "two" / "lora.safetensors").is_file()


@pytest.fixture(scope="module")
def straight(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("straight")
    together(lambda ranks: run(place, runs, ranks=ranks))
    return runs / "run"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both_and_they_go_on_bit_for_bit(
    place: Path, straight: Path, tmp_path: Path, rank: int
) -> None:
    """Either process gets the signal; rank 1 hears of no step, so that its watch is on the batch it takes."""

    def stopped(ranks: Ranks) -> Any:
        if ranks.rank != rank:
            return run(place, tmp_path, ranks=ranks)
        return run(place, tmp_path, ranks=ranks, watch=Watch(1, signal.SIGTERM))

    first, second = together(stopped)
    assert (first[0], second[0]) == (143, 143)
    assert first[1] == [1, 2]
    assert together(lambda ranks: go_on(place, tmp_path, ranks=ranks))[0][:2] == (0, [3, 4])
    assert losses_of(tmp_path / "run") == losses_of(straight)
    mine, theirs = state_of(tmp_path / "run"), state_of(straight)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_loading_one_after_another_changes_nothing(
    place: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "room", lambda *_, **words: (True, None))
    first, second = together(lambda ranks: run(place, tmp_path, ranks=ranks))
    assert (first[0], second[0]) == (0, 0)
    assert any("load it one after another" in line for line in first[2])
    assert losses_of(tmp_path / "run") == losses_of(straight)


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_another_number_of_processes(place: Path, straight: Path, tmp_path: Path, world: int) -> None:
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    RunFolder(tmp_path / "run").update_info(finished=None, stop_reason=None)
    if world == 1:
        code, steps, notices = go_on(place, tmp_path)
    else:
        code, steps, notices = together(lambda ranks: go_on(place, tmp_path, ranks=ranks), world)[0]
    assert (code, steps) == (0, [3, 4])
    assert any("trained on 2 processes" in line and "the same 2 micro-batches" in line for line in notices)
    assert any("1 of 3 processes have nothing to do" in line for line in notices) == (world == 3)
    assert_near(tmp_path / "run", straight)
    assert RunFolder(tmp_path / "run").info()["ranks"] == world


def test_a_second_machine_has_its_own_folders_and_needs_no_run_folder(
    place: Path, straight: Path, tmp_path: Path
) -> None:
    """The pictures lie elsewhere, in a folder of another name; the run's folder is rank 0's alone."""

    def apart(ranks: Ranks) -> Any:
        os.environ["EMOTRAIN_CACHE"] = str(tmp_path / f"cache-{ranks.rank}")
        where = place if ranks.first else place / "machine"
        return run(where, tmp_path / str(ranks.rank), ranks=ranks)

    assert [code for code, *_ in together(apart)] == [0, 0]
    assert not (tmp_path / "1").exists()
    assert losses_of(tmp_path / "0" / "run") == losses_of(straight)


def test_other_settings_or_pictures_on_one_machine_are_refused_by_all(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(place / "machine", other)
    (other / "images" / "3.txt").write_text("another caption")

    def apart(ranks: Ranks) -> Any:
        words = () if ranks.first else ("train.lr=0.5", "log.every=3")
        return run(place if ranks.first else other, tmp_path / "runs", *words, ranks=ranks)

    first, second = together(apart)
    assert (first[:2], first[3], second[3]) == (("ConfigError", 2), False, True)
    assert first[2] == [
        "rank 1: train.lr is 0.5, and None on rank 0",
        "rank 1: data set: 1 have changed (picture or caption): pictures/3.png (beside rank 0)",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_taken_is_refused_once(place: Path, straight: Path) -> None:
    first, second = together(lambda ranks: run(place, straight.parent, ranks=ranks))
    assert (first[:2], first[3], second[3]) == (("CheckpointError", 5), False, True)
    assert len(first[2]) == 1


def test_weights_that_differ_between_processes_are_not_saved(place: Path, tmp_path: Path) -> None:
    from emotrain.optim.averaged import Averaged

    def broken(ranks: Ranks) -> Any:
        plain = Averaged.step

        def step(self: Any, closure: Any = None) -> Any:
            plain(self, closure)
            if ranks.rank == 1:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].view(-1)[0] += 1e-7

        Averaged.step = step  # type: ignore[method-assign]
        return run(place, tmp_path, ranks=ranks)

    first, second = together(broken)
    assert (first[:2], first[3], second[3]) == (("ResourceError", 6), False, True)
    assert "the LoRA of rank 1 is not that of rank 0" in first[2][0]
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.slow
def test_memory_that_one_process_lacks_ends_all_with_one_message(place: Path, tmp_path: Path) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def lacking(ranks: Ranks) -> Any:
        if ranks.rank == 1:
            Validation.pictures = full  # type: ignore[method-assign]
        return run(place, tmp_path, ranks=ranks)

    first, second = together(lacking)
    assert (first[1], second[1], first[3], second[3]) == (6, 6, False, True)
    assert first[2] == ["rank 1: out of memory at the validation of step 0: 0.02 GiB more were needed"]
