"""`run` and `resume` as a user calls them: what is bad is refused with its exit code, and nothing is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from emotrain.cli.app import main
from emotrain.errors import ResourceError
from emotrain.lora.formats import to_kohya
from emotrain.runs import build, finish
from emotrain.runs.folder import RunFolder
from emotrain.train.checkpoint import SCHEMA_VERSION, _digest

PRESET = """
model: builtin:tiny-sd
dataset: {folders: [{path: ./pictures}], trigger: t, resolution: 64, buckets: {step: 8, min: 64, max: 64}}
network: {rank: 2, alpha: 2, targets: [mid_block.*to_q]}
train: {max_steps: 3}
save: {every: 1, keep_last: 3}
validate: {every: 3, probe_images: 1}
sample: {every: 0}
stop: {mode: "off"}
log: {tensorboard: false}
"""
PART = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, the preset, and a run of three steps that lacks its last one."""
    folder = tmp_path_factory.mktemp("codes")
    (folder / "pictures").mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (90 * index, 90, 9)).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text("a square")
    (folder / "half.yaml").write_text(PRESET)
    assert main(["run", str(folder / "half.yaml"), "--runs-dir", str(folder / "runs"), "--plain"]) == 0
    run = RunFolder(folder / "runs" / "half")
    shutil.rmtree(run.checkpoints_dir / "step-00000003")
    run.update_info(finished=None, stop_reason=None)
    run.lora_path.unlink()
    return folder


@pytest.fixture
def half(place: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(place / "runs" / "half", tmp_path / "half")))


Says = Callable[..., tuple[int, str]]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Runs a command; its exit code and stderr."""

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(list(words))
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        return code, shown

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------ presets


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("network.rank=0",), 2, "network.rank"),
        (("network.targets=[single_transformer_blocks]",), 2, "single_transformer_blocks"),
        (("name=../up",), 2, "../up"),
        (("dataset.folders=[{path: ./nowhere}]",), 3, "does not exist"),
        (("model.base=./no.safetensors",), 4, "no.safetensors"),
    ],
)
def test_a_run_that_is_refused_leaves_no_folder(
    place: Path, tmp_path: Path, says: Says, words: tuple[str, ...], code: int, line: str
) -> None:
    sets = [part for word in words for part in ("--set", word)]
    got, shown = says("run", str(place / "half.yaml"), "--runs-dir", str(tmp_path / "runs"), "--plain", *sets)
    assert (got, line in shown) == (code, True), shown
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------ earlier LoRAs


def tensors(module: str = PART, width: int = 32) -> dict[str, torch.Tensor]:
    return to_kohya(
        {f"{module}.lora_A.weight": torch.ones(2, width), f"{module}.lora_B.weight": torch.ones(width, 2)},
        {module: 2.0},
        "sd15",
    )


def flux_like() -> dict[str, torch.Tensor]:
    stem = "transformer.single_transformer_blocks.0.attn.to_q"
    return {f"{stem}.lora_A.weight": torch.ones(2, 3072), f"{stem}.lora_B.weight": torch.ones(3072, 2)}


BAD_STACKS: dict[str, tuple[Any, str]] = {
    "not there": (None, "x.safetensors"),
    "a pickle": (b"\x80\x02}q\x00." + b"\0" * 40, "pickle"),
    "cut": ("cut", "damaged"),
    "another family": (flux_like(), "flux"),
    "no module of this model": (
        tensors(PART.replace("down_blocks.1", "down_blocks.2"), 1280),
        "1 of the LoRA's 1 modules are not in this unet",
    ),
    "other widths": (tensors(width=320), "is (2, 320), (320, 2) in the LoRA; the model's layer is"),
    "NaN": ({key: value * float("nan" if "up" in key else 1) for key, value in tensors().items()}, "not finite"),
    "DoRA": ({**tensors(), "lora_unet_x.dora_scale": torch.ones(2)}, "DoRA"),
}


@pytest.mark.parametrize("case", BAD_STACKS)
@pytest.mark.parametrize("use", ["stack", "continue"])
def test_an_earlier_lora_that_cannot_be_used_is_exit_4(
    place: Path, tmp_path: Path, says: Says, case: str, use: str
) -> None:
    given, line = BAD_STACKS[case]
    path = tmp_path / "x.safetensors"
    if given == "cut":
        save_file(tensors(), path)
        path.write_bytes(path.read_bytes()[:-20])
    elif isinstance(given, bytes):
        path.write_bytes(given)
    elif given is not None:
        save_file(given, path)
    word = f"start_from.stack=[{{path: {path}, weight: 1.0}}]" if use == "stack" else f"start_from.continue={path}"
    runs = tmp_path / "runs"
    code, shown = says("run", str(place / "half.yaml"), "--runs-dir", str(runs), "--plain", "--set", word)
    assert (code, line in shown) == (4, True), shown
    assert not runs.exists()


# ------------------------------------------------------------ checkpoints


def damage(run: RunFolder, step: int) -> None:
    path = run.checkpoints_dir / f"step-{step:08d}" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def test_a_damaged_newest_checkpoint_is_said_and_the_run_goes_on(half: RunFolder, says: Says) -> None:
    damage(half, 2)
    code, shown = says("resume", str(half.path), "--plain")
    assert code == 0
    assert "skipped step-00000002: optimizer.safetensors" in shown
    assert half.lora_path.is_file()


def test_all_damaged_is_exit_5_and_nothing_is_changed(half: RunFolder, says: Says) -> None:
    damage(half, 1)
    damage(half, 2)
    before = content(half.path)
    code, shown = says("resume", str(half.path), "--plain")
    assert code == 5
    assert "no whole checkpoint" in shown
    assert content(half.path) == before


def test_a_damaged_one_that_is_asked_for_is_exit_5_without_falling_back(half: RunFolder, says: Says) -> None:
    damage(half, 2)
    before = content(half.path)
    code, shown = says("resume", str(half.path), "--checkpoint", "2", "--plain")
    assert code == 5
    assert "step-00000002" in shown
    assert content(half.path) == before
    assert says("resume", str(half.path), "--checkpoint", "7", "--plain")[0] == 5


FORGED: dict[str, Any] = {"identity": {}, "state": {"step": "x"}, "stop_rule": 7, "rng": [], "baseline": {"a": 1}}


@pytest.mark.parametrize("name", FORGED)
def test_a_document_that_is_forged_with_its_sha256_is_exit_5(name: str, half: RunFolder, says: Says) -> None:
    folder = half.checkpoints_dir / "step-00000002"
    assert (folder / f"{name}.json").is_file()
    text = json.dumps(FORGED[name]).encode()
    (folder / f"{name}.json").write_bytes(text)
    fields = json.loads((folder / "MANIFEST.json").read_text())
    fields["files"][f"{name}.json"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    del fields["sha256"]
    (folder / "MANIFEST.json").write_text(json.dumps({**fields, "sha256": _digest(fields)}))
    code, shown = says("resume", str(half.path), "--checkpoint", "2", "--plain")
    assert code == 5, shown
    assert "checkpoint" in shown


def test_a_newer_format_is_exit_5(half: RunFolder, says: Says) -> None:
    path = half.checkpoints_dir / "step-00000002" / "MANIFEST.json"
    fields = json.loads(path.read_text()) | {"schema_version": SCHEMA_VERSION + 1, "emotrain": "9.0.0"}
    del fields["sha256"]
    path.write_text(json.dumps({**fields, "sha256": _digest(fields)}))
    code, shown = says("resume", str(half.path), "--plain")
    assert code == 5
    assert "step-00000002 was written by emotrain 9.0.0" in shown
    assert "hint: upgrade emotrain" in shown


def test_another_preset_is_exit_5_unless_it_is_allowed(half: RunFolder, says: Says) -> None:
    before = content(half.path)
    change = ("--set", "train.max_grad_norm=0.5")
    code, shown = says("resume", str(half.path), "--plain", *change)
    assert code == 5
    assert "train.max_grad_norm was 1.0" in shown
    assert content(half.path) == before
    assert says("resume", str(half.path), "--plain", "--allow-config-change", *change)[0] == 0


def test_another_base_model_is_exit_5(half: RunFolder, says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "digest_module", lambda *words: "another")
    code, shown = says("resume", str(half.path), "--plain")
    assert code == 5
    assert "model.base holds other weights" in shown


def test_another_data_set_is_exit_5(place: Path, half: RunFolder, says: Says) -> None:
    Image.new("RGB", (64, 64), "red").save(place / "pictures" / "new.png")
    try:
        code, shown = says("resume", str(half.path), "--plain")
    finally:
        (place / "pictures" / "new.png").unlink()
    assert code == 5
    assert "data set: 1 are new: pictures/new.png" in shown


def test_a_run_in_use_is_exit_6(half: RunFolder, says: Says) -> None:
    with half.lock():
        code, shown = says("resume", str(half.path), "--plain")
    assert code == 6
    assert "in use by process" in shown


def test_a_run_that_exists_or_is_done_or_is_not_there_is_exit_5(
    place: Path, half: RunFolder, tmp_path: Path, says: Says
) -> None:
    code, shown = says("run", str(place / "half.yaml"), "--runs-dir", str(tmp_path), "--plain")
    assert (code, "exists already" in shown, "-2` is free" in shown) == (5, True, True)
    code, shown = says("resume", str(half.path), "--plain")
    assert (code, "has no effect" in shown) == (0, False)  # every key is in a run's own preset
    code, shown = says("resume", str(half.path), "--plain")
    assert (code, "is done" in shown) == (5, True)
    assert says("resume", str(tmp_path / "none"), "--plain")[0] == 5


def test_a_disk_that_is_full_at_the_hand_over_is_exit_6_and_a_resume_hands_over(
    half: RunFolder, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: Any, **more: Any) -> None:
        raise ResourceError("x: No space left on device")

    with monkeypatch.context() as small:
        small.setattr(finish, "save_lora", full)
        code, shown = says("resume", str(half.path), "--plain")
    assert (code, "No space left on device" in shown) == (6, True)
    assert not half.lora_path.exists()
    assert says("resume", str(half.path), "--plain")[0] == 0
    assert half.lora_path.is_file()


@pytest.mark.parametrize("part", ["metrics.jsonl", "samples", "checkpoints", "tensorboard", "notes"])
@pytest.mark.parametrize("how", ["link", "folder", "pipe"])
def test_nothing_is_written_through_a_run_folder_that_was_meddled_with(
    half: RunFolder, tmp_path: Path, says: Says, part: str, how: str
) -> None:
    """Resuming cuts logs, overwrites pictures and deletes checkpoints: never those that a link leads to."""
    import os

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    place = half.path / part
    kept = tmp_path / "kept"
    if place.exists():
        shutil.move(place, kept)
    if how == "link":
        place.symlink_to(outside / "mine.txt" if part.endswith((".jsonl", "notes")) else outside)
    elif how == "pipe":
        os.mkfifo(place)
    elif part.endswith(".jsonl"):
        place.mkdir()
    elif part == "notes":
        pytest.skip("a user's own folder may lie there")
    else:
        place.write_text("")
    code, said = says("resume", str(half.path))
    assert code == 5, said
    assert part in said
    assert content(outside) == {"mine.txt": b"mine"}
