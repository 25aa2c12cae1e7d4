"""Checkpoints: whole or not at all, exact, and never silently something else."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emotrain.errors import CheckpointError, DivergedError, ResourceError
from emotrain.train import checkpoint as module
from emotrain.train.checkpoint import MANIFEST, SCHEMA_VERSION, Checkpoint, CheckpointStore, _digest

FILES = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "optimizer.json",
    MANIFEST,
)


def contents(step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    generator = torch.Generator().manual_seed(step)
    down = torch.randn(4, 8, generator=generator)
    tensors = {
        "adapter": {"a.lora_A.weight": down, "a.lora_B.weight": down.T.contiguous()},
        "optimizer": {"a.exp_avg": down.bfloat16(), "step": torch.tensor(float(step))},
        "rng": {"torch_cpu": torch.arange(16, dtype=torch.uint8)},
    }
    documents = {
        "state": {"step": step, "history": [0.1 + step, 1e-310, 1 / 3, 2.0**70, float("inf")]},
        "optimizer": {"lr": 0.1 + 0.2, "flag": True, "none": None, "words": [2**64, -1]},
    }
    return tensors, documents


def save(store: CheckpointStore, step: int, best: bool = False) -> Path:
    tensors, documents = contents(step)
    return store.save(step, tensors, documents, best=best)


def same(checkpoint: Checkpoint, step: int) -> bool:
    tensors, documents = contents(step)
    return (
        checkpoint.step == step
        and checkpoint.documents == documents
        and checkpoint.tensors.keys() == tensors.keys()
        and all(
            checkpoint.tensors[stem].keys() == named.keys()
            and all(
                checkpoint.tensors[stem][name].dtype == tensor.dtype
                and torch.equal(checkpoint.tensors[stem][name], tensor)
                for name, tensor in named.items()
            )
            for stem, named in tensors.items()
        )
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=3)


@pytest.fixture
def three(store: CheckpointStore) -> CheckpointStore:
    for step in (100, 200, 300):
        save(store, step)
    return store


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_what_is_saved_comes_back_to_the_last_bit(store: CheckpointStore) -> None:
    path = save(store, 250)
    assert path.name == "step-00000250"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    checkpoint, notices = store.load()
    assert same(checkpoint, 250)
    assert notices == []
    assert type(checkpoint.documents["optimizer"]["flag"]) is bool


def test_views_shared_and_empty_tensors_are_saved_as_they_look(store: CheckpointStore) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    named = {"whole": base, "again": base, "view": base[1:], "turned": base.T, "none": base[:0]}
    store.save(1, {"adapter": named, "extra": {}}, {})
    loaded = store.load()[0].tensors
    assert loaded["extra"] == {}
    assert all(torch.equal(loaded["adapter"][name], tensor) for name, tensor in named.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_never_written(three: CheckpointStore, value: float) -> None:
    tensors, documents = contents(400)
    tensors["adapter"]["a.lora_B.weight"][0, 0] = value
    with pytest.raises(DivergedError, match=r"`a.lora_B.weight` of `adapter`"):
        three.save(400, tensors, documents)
    assert three.steps() == (100, 200, 300)


@pytest.mark.parametrize("value", [float("nan"), {1: "a"}, {"a": {2}}, b"x"])
def test_a_document_that_json_would_change_is_refused(store: CheckpointStore, value: Any) -> None:
    with pytest.raises(ValueError, match=r"\$\.value"):
        store.save(1, {}, {"state": value})
    assert store.steps() == ()


def test_the_newest_are_kept_and_the_best_is_never_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    for step in range(1, 8):
        save(store, step, best=step in (1, 3))
    assert store.steps() == (3, 6, 7)
    assert names(store) == ["step-00000003", "step-00000006", "step-00000007"]


def test_steps_that_are_asked_for_outlive_the_prune(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    for step in range(1, 6):
        store.save(step, *contents(step), keep={2})
    assert store.steps() == (2, 4, 5)
    store.save(6, *contents(6))
    assert store.steps() == (5, 6)


def test_one_checkpoint_alone_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        CheckpointStore(tmp_path, keep_last=1)


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def damage_longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def damage_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_older(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-00000200" / path.name, path)


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent / "step-00000200" / path.name)


def damage_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (
    damage_missing,
    damage_cut,
    damage_longer,
    damage_zeros,
    damage_empty,
    damage_older,
    damage_folder,
    damage_link,
    damage_pipe,
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(
    three: CheckpointStore, damage: Any, name: str
) -> None:
    damage(three.folder / "step-00000300" / name)
    checkpoint, notices = three.load()
    assert same(checkpoint, 200)
    assert len(notices) == 1
    assert notices[0].startswith("skipped step-00000300: ")
    assert (name in notices[0]) or name == MANIFEST
    assert names(three) == [".bad-step-00000300", "step-00000100", "step-00000200"]


@pytest.mark.parametrize("name", FILES)
def test_every_single_flipped_bit_is_found(three: CheckpointStore, name: str) -> None:
    path = three.folder / "step-00000300" / name
    whole = path.read_bytes()
    places = {*range(0, len(whole), max(1, len(whole) // 60))}
    if name == MANIFEST:
        places |= {whole.index(b'"best"') + 1, whole.index(b'"step"') + 1}
    for position in sorted(places):
        for bit in (0, 3, 5, 7):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                checkpoint = three.load(300)[0]
            except CheckpointError:
                continue
            assert name == MANIFEST, f"bit {bit} of byte {position}"  # white space between words
            assert same(checkpoint, 300)
            assert not checkpoint.best
    path.write_bytes(whole)
    assert same(three.load()[0], 300)


def test_weights_of_one_step_with_the_optimizer_of_another_are_found_under_a_forged_manifest(
    three: CheckpointStore,
) -> None:
    folder = three.folder / "step-00000300"
    old = three.folder / "step-00000200"
    shutil.copy(old / "optimizer.safetensors", folder / "optimizer.safetensors")
    fields = json.loads((folder / MANIFEST).read_bytes())
    other = json.loads((old / MANIFEST).read_bytes())
    fields["files"]["optimizer.safetensors"] = other["files"]["optimizer.safetensors"]
    del fields["sha256"]
    (folder / MANIFEST).write_text(json.dumps({**fields, "sha256": _digest(fields)}))
    checkpoint, notices = three.load()
    assert checkpoint.step == 200
    assert notices == ["skipped step-00000300: optimizer.safetensors is of step 200"]


def test_a_folder_under_another_steps_name_is_found(three: CheckpointStore) -> None:
    (three.folder / "step-00000300").rename(three.folder / "step-00000400")
    assert three.load()[1] == ["skipped step-00000400: MANIFEST.json is of step 300"]


def test_a_manifest_cannot_reach_out_of_its_folder(three: CheckpointStore) -> None:
    folder = three.folder / "step-00000300"
    fields = json.loads((folder / MANIFEST).read_bytes())
    fields["files"]["../step-00000200/state.json"] = fields["files"].pop("state.json")
    del fields["sha256"]
    (folder / MANIFEST).write_text(json.dumps({**fields, "sha256": _digest(fields)}))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        three.load(300)


def test_an_extra_file_is_left_alone(three: CheckpointStore) -> None:
    (three.folder / "step-00000300" / "note.txt").write_text("mine")
    assert same(three.load()[0], 300)


@pytest.mark.parametrize(
    ("version", "hint"),
    [(SCHEMA_VERSION + 1, "upgrade emotrain"), (SCHEMA_VERSION - 1, "finish it with that version, or start a new run")],
)
def test_another_format_is_refused_and_not_stepped_over(three: CheckpointStore, version: int, hint: str) -> None:
    path = three.folder / "step-00000300" / MANIFEST
    fields = json.loads(path.read_bytes())
    del fields["sha256"]
    fields |= {"schema_version": version, "emotrain": "9.0.0", "new": 1}
    path.write_text(json.dumps({**fields, "sha256": _digest(fields)}))
    with pytest.raises(CheckpointError, match="written by emotrain 9.0.0") as caught:
        three.load()
    assert (caught.value.hint or "").startswith(hint)
    assert names(three)[-1] == "step-00000300"


def test_an_explicit_damaged_step_is_refused_without_falling_back(three: CheckpointStore) -> None:
    damage_cut(three.folder / "step-00000200" / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000200 is damaged: adapter.safetensors"):
        three.load(200)
    assert three.steps() == (100, 200, 300)


def test_an_explicit_missing_step_is_refused_and_the_others_are_named(
    three: CheckpointStore,
) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 150") as caught:
        three.load(150)
    assert caught.value.hint == "there: 100, 200, 300"


def test_when_all_are_damaged_nothing_is_loaded_renamed_or_deleted(three: CheckpointStore) -> None:
    for step in three.steps():
        damage_cut(three.folder / f"step-{step:08d}" / "state.json")
    before = names(three)
    with pytest.raises(CheckpointError, match=r"step-00000300: state.json .* step-00000100: "):
        three.load()
    assert names(three) == before


def test_no_checkpoint_is_an_error_and_not_step_zero(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        store.load()


def test_folders_are_ordered_by_number_and_other_names_and_links_are_left_alone(
    store: CheckpointStore,
) -> None:
    for step in (9, 10, 200):
        save(store, step)
    (store.folder / "step-00000009").rename(store.folder / "step-9")
    (store.folder / "step-00000010").rename(store.folder / "step-10")
    (store.folder / "step-abc").mkdir()
    (store.folder / "step--5").mkdir()
    (store.folder / "step-00000400").symlink_to(store.folder / "step-00000200")
    (store.folder / "step-00000500").write_text("a file")
    assert store.steps() == (9, 10, 200)
    assert same(store.load()[0], 200)
    assert same(store.load(9)[0], 9)


def test_the_folder_can_be_moved_because_no_file_names_its_place(three: CheckpointStore, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    three.folder.rename(moved)
    assert same(CheckpointStore(moved, 3).load()[0], 300)
    for file in moved.rglob("*.*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes()


def test_a_damaged_one_keeps_its_files_and_a_second_one_gets_its_own_name(
    three: CheckpointStore,
) -> None:
    for _ in range(2):
        damage_cut(three.folder / "step-00000300" / "state.json")
        three.load()
        save(three, 300)
    assert names(three)[:2] == [".bad-step-00000300", ".bad-step-00000300-2"]
    assert len(list((three.folder / ".bad-step-00000300").iterdir())) == len(FILES)


def test_going_back_sets_the_later_ones_aside_so_that_they_are_not_resumed(
    three: CheckpointStore,
) -> None:
    notices = three.drop_after(100)
    assert len(notices) == 2
    assert same(three.load()[0], 100)
    assert names(three) == [".left-step-00000200", ".left-step-00000300", "step-00000100"]


def test_saving_a_step_again_sets_the_former_one_aside(three: CheckpointStore) -> None:
    tensors, documents = contents(300)
    documents["state"] = "new"
    three.save(300, tensors, documents)
    checkpoint = three.load()[0]
    assert checkpoint.documents["state"] == "new"
    assert ".left-step-00000300" in names(three)


def test_leftovers_are_swept_and_other_names_are_not(three: CheckpointStore) -> None:
    for name in (".tmp-step-00000400-123", ".del-step-00000050"):
        (three.folder / name).mkdir()
        (three.folder / name / "adapter.safetensors").write_bytes(b"half")
    (three.folder / ".tmp-mine").mkdir()
    three.load()
    assert names(three)[:2] == [".tmp-mine", "step-00000100"]


def test_a_full_disk_leaves_the_older_ones_and_nothing_half_written(three: CheckpointStore) -> None:
    tensors, documents = contents(400)
    tensors["adapter"]["big"] = torch.zeros(100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(ResourceError, match="step 400 could not be saved") as caught:
            three.save(400, tensors, documents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "earlier checkpoints are as they were" in (caught.value.hint or "")
    assert names(three) == ["step-00000100", "step-00000200", "step-00000300"]
    assert same(three.load()[0], 300)
    save(three, 400)
    assert same(three.load()[0], 400)


LAST_STAGE_OF_THE_SAVE = 1 + 3 * len(FILES) + 4  # opened, written, synced per file


@pytest.mark.parametrize("number", range(1, LAST_STAGE_OF_THE_SAVE + 3))
def test_an_error_at_any_stage_leaves_what_was_committed(tmp_path: Path, number: int) -> None:
    stages: list[str] = []

    def fail(name: str) -> None:
        stages.append(name)
        if len(stages) == number:
            raise OSError(28, "No space left on device")

    folder = tmp_path / "checkpoints"
    good = CheckpointStore(folder, 2)
    save(good, 1)
    save(good, 2)
    if number > LAST_STAGE_OF_THE_SAVE:  # a prune is tried again after the next save
        save(CheckpointStore(folder, 2, stage=fail), 3)
    else:
        with pytest.raises(ResourceError, match="No space left on device"):
            save(CheckpointStore(folder, 2, stage=fail), 3)
    assert not [path for path in folder.iterdir() if path.name.startswith(".tmp")]
    assert same(good.load()[0], 3 if "renamed" in stages else 2)


def test_bytes_that_the_disk_gives_back_wrong_are_never_committed(
    three: CheckpointStore,
) -> None:
    def rot(name: str) -> None:
        if name == "synced temporary folder":
            (temporary,) = three.folder.glob(".tmp-*")
            path = temporary / "adapter.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    with pytest.raises(ResourceError, match="read back wrong: adapter.safetensors sha256"):
        save(CheckpointStore(three.folder, 2, stage=rot), 400)
    assert names(three) == ["step-00000100", "step-00000200", "step-00000300"]


def test_a_read_only_place_is_a_resource_error(three: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **words: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResourceError, match="Read-only file system"):
        save(three, 400)
    assert three.steps() == (100, 200, 300)


def test_a_prune_that_fails_does_not_fail_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    save(store, 1)
    save(store, 2)

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", refuse)
        save(store, 3)
    assert store.steps() == (2, 3)
    save(store, 4)
    assert names(store) == ["step-00000003", "step-00000004"]
