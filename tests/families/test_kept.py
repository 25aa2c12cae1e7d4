"""The base that a queue keeps: what a run does to its modules does not reach it."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from emotrain.families.kept import SPARE, WORDS, KeptBase

A, B = tuple("a" * len(WORDS)), tuple("b" * len(WORDS))


class Tokenizer:
    """Something that is handed on as it is."""


def fresh() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight  # tied
    return {"denoiser": model, "tokenizer": Tokenizer()}


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "x.safetensors").write_bytes(b"x")
    return str(tmp_path)


def test_each_run_has_modules_of_its_own_around_the_same_weights(file: str) -> None:
    kept = KeptBase()
    kept.next = A
    first = kept.load(A, [file], fresh)
    assert not kept.reused
    model = first["denoiser"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model[2].weight is model[0].weight
    model.to(torch.bfloat16)
    model[0] = nn.Identity()
    model[1].extra = nn.Linear(2, 2)
    second = kept.load(A, [file], pytest.fail)
    assert kept.reused
    assert second["tokenizer"] is first["tokenizer"]
    after = second["denoiser"].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    third = kept.load(A, [file], pytest.fail)["denoiser"]
    assert third[0].weight.data_ptr() == second["denoiser"][0].weight.data_ptr()


def test_only_what_the_next_run_needs_is_kept(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptBase()
    kept.next = B
    kept.load(A, [file], fresh)
    kept.load(A, [file], fresh)
    assert not kept.reused
    kept.next = A
    kept.load(A, [file], fresh)
    kept.load(B, [file], fresh)
    kept.load(A, [file], fresh)
    assert not kept.reused
    kept.load(A, [file], fresh)
    assert kept.reused
    os.utime(Path(file) / "unet" / "x.safetensors", ns=(1, 1))
    kept.load(A, [file], fresh)
    assert not kept.reused  # other files since
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Full", (), {"total": 1 << 40, "available": 1 << 30}))
    kept.load(A, [file], fresh)
    kept.load(A, [file], fresh)
    assert not kept.reused  # no room for two


@pytest.mark.parametrize(("processes", "reused"), [(1, True), (2, True), (3, False)])
def test_processes_of_one_machine_keep_a_base_where_there_is_room_for_all_of_theirs(
    processes: int, reused: bool, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type("Memory", (), {"total": 1 << 40, "available": SPARE + 250})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    kept = KeptBase(processes)
    kept.beside = 100  # what the run takes of the memory, the base being there
    kept.next = A
    kept.load(A, [file], fresh)
    kept.load(A, [file], fresh)
    assert kept.reused == reused


def test_pages_of_files_are_free_and_only_copies_are_counted(file: str) -> None:
    """As the system counts: a base of 24 GB that is mapped from its files keeps no run from starting."""
    kept = KeptBase()
    kept.next, kept.copied = A, 7
    assert kept.nbytes == 0
    kept.load(A, [file], fresh)
    kept.copied = 9  # of the next run, which is not loaded yet
    assert kept.nbytes == 7
    kept.drop()
    assert kept.nbytes == 0


def test_what_is_not_used_is_let_go_before_another_is_read(file: str) -> None:
    """Else two models lie in memory where one has room."""
    kept = KeptBase()
    kept.next = A
    held = weakref.ref(kept.load(A, [file], fresh)["tokenizer"])
    seen: list[object] = []

    def read() -> dict[str, Any]:
        gc.collect()
        seen.append(held())
        return fresh()

    kept.load(B, [file], read)
    assert seen == [None]
