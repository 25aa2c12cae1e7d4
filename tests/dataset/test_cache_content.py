"""The cache: keyed by content, verified, outside the data, and never in the way."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from emotrain.dataset.cache import Cache, content_key, narrow
from emotrain.dataset.cachedir import clear, default_cache_dir, entry_path, measure

KEY = content_key(picture="a", place=[1, 2], flipped=False)
TENSORS = {"latents": torch.arange(12.0).view(3, 4), "scale": torch.tensor(0.5)}


def test_an_entry_comes_back_as_it_was_put(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get("latents", KEY) is None
    cache.put("latents", KEY, TENSORS)
    found = cache.get("latents", KEY)
    assert found is not None
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert (cache.made, cache.damaged) == (1, 0)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


def test_keys_follow_every_value_and_no_order() -> None:
    assert content_key(flipped=False, place=[1, 2], picture="a") == KEY
    others = [
        content_key(picture="b", place=[1, 2], flipped=False),
        content_key(picture="a", place=[2, 1], flipped=False),
        content_key(picture="a", place=[1, 2], flipped=True),
    ]
    assert len({KEY, *others}) == 4
    assert len(KEY) == 64


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("latents", KEY, TENSORS)
    path = entry_path(tmp_path, "latents", KEY)
    data = path.read_bytes()
    wrong = 0
    for index in range(0, len(data), 2):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        found = cache.get("latents", KEY)
        if found is not None:  # a changed space in the header changes nothing
            wrong += any(not torch.equal(found[name], TENSORS[name]) for name in TENSORS)
        path.write_bytes(data[:index])
        assert cache.get("latents", KEY) is None
    assert wrong == 0
    assert cache.damaged > len(data) // 2


def test_an_entry_under_another_key_is_not_taken(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("latents", KEY, TENSORS)
    other = content_key(picture="b")
    path = entry_path(tmp_path, "latents", other)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry_path(tmp_path, "latents", KEY).rename(path)
    assert cache.get("latents", other) is None


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("texts", KEY, TENSORS)
    entry_path(tmp_path, "texts", KEY).write_bytes(b"\0" * 100)
    found = cache.lookup("texts", KEY, lambda: {"latents": torch.ones(2)})
    assert torch.equal(found["latents"], torch.ones(2))
    assert Cache(tmp_path).get("texts", KEY) is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(number, "No space left on device")

    said: list[str] = []
    cache = Cache(tmp_path, said.append)
    monkeypatch.setattr(Path, "replace", refuse)
    for name in "abc":
        made = cache.lookup("latents", content_key(name=name), lambda: TENSORS)
        assert torch.equal(made["latents"], TENSORS["latents"])
    assert len(said) == 1
    assert "kept in memory" in said[0]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_folder_that_is_a_file_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    said: list[str] = []
    cache = Cache(tmp_path / "file", said.append)
    assert cache.lookup("latents", KEY, lambda: TENSORS) is TENSORS
    assert len(said) == 1


def test_narrow_loses_nothing() -> None:
    rough = torch.tensor([1.0, 0.5, -3.0])
    assert narrow(rough).dtype == torch.bfloat16
    fine = torch.tensor([1.0 + 2**-10])
    assert narrow(fine).dtype == torch.float16
    full = torch.tensor([0.1])
    assert narrow(full) is full
    whole = torch.tensor([1, 2])
    assert narrow(whole) is whole
    big = torch.tensor([1e30 / 3])
    assert narrow(big) is big


def test_the_cache_lies_where_the_variable_or_the_platform_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EMOTRAIN_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("EMOTRAIN_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "emotrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "emotrain"
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_cache_dir() == Path.home() / "Library" / "Caches" / "emotrain"


def test_clear_removes_entries_and_nothing_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for name in "ab":
        cache.put("latents", content_key(name=name), TENSORS)
    cache.put("texts", KEY, TENSORS)
    keep = tmp_path / "v1" / "latents" / "aa" / "holiday.png"
    keep.parent.mkdir(parents=True, exist_ok=True)
    keep.write_bytes(b"mine")
    (tmp_path / "notes.txt").write_text("mine")
    usage = {item.kind: item for item in measure(tmp_path)}
    assert [usage[kind].entries for kind in ("latents", "masks", "texts")] == [2, 0, 1]
    size = sum(item.size for item in usage.values())
    assert clear(tmp_path, unused_days=1) == (0, 0)
    assert clear(tmp_path) == (3, size)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["holiday.png", "notes.txt"]
    assert clear(tmp_path / "missing") == (0, 0)


def test_a_used_entry_counts_as_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    cache = Cache(tmp_path)
    for name in ("old", "used"):
        cache.put("latents", content_key(name=name), TENSORS)
        os.utime(entry_path(tmp_path, "latents", content_key(name=name)), (0, 0))
    assert cache.get("latents", content_key(name="used")) is not None
    assert clear(tmp_path, unused_days=30)[0] == 1
    assert cache.get("latents", content_key(name="used")) is not None


def test_two_writers_of_one_entry_leave_a_whole_one(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    caches: list[Any] = [Cache(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda cache: [cache.put("latents", KEY, TENSORS) for _ in range(20)], caches))
    assert Cache(tmp_path).get("latents", KEY) is not None
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
