"""`emotrain cache info` and `clear`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emotrain.cli.app import main
from emotrain.dataset.cache import Cache, content_key


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMOTRAIN_CACHE", str(tmp_path / "cache"))
    cache = Cache(tmp_path / "cache")
    for name in "ab":
        cache.put("latents", content_key(name=name), {"latents": torch.ones(4, 8, 8)})
    cache.put("texts", content_key(name="c"), {"prompt_embeds": torch.ones(4, 8)})
    return tmp_path / "cache"


def test_info_says_where_and_how_much(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(cache_dir)
    assert said["kinds"]["latents"]["entries"] == 2
    assert said["bytes"] == sum(path.stat().st_size for path in cache_dir.rglob("*.safetensors"))
    assert main(["cache", "info"]) == 0
    text = capsys.readouterr().out
    assert str(cache_dir) in text
    assert "latents" in text


def test_clear_empties_it(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", "--unused-days", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 0
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out.startswith("3 entries removed, ")
    assert list(cache_dir.rglob("*.safetensors")) == []


def test_clear_says_what_it_cannot_remove(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["cache", "clear"]) == 6
    assert "cannot be cleared: Permission denied" in capsys.readouterr().err


def test_there_is_nothing_to_say_of_no_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOTRAIN_CACHE", str(tmp_path / "none"))
    assert main(["cache", "info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 0
    assert not (tmp_path / "none").exists()
