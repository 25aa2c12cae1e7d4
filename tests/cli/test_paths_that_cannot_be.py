"""A name that no file can have, or that may not be touched, is one line and never a mistake of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from emotrain.cli.app import main

LONG, NUL = "x" * 300, "a\0b"
COMMANDS = [
    ["check", "{}"], ["check", "{}.yaml"], ["run", "{}"], ["plan", "{}"], ["lint", "{}"], ["resume", "{}"],
    ["images", "{}"], ["runs", "show", "{}"], ["runs", "compare", "{}", "{}"], ["runs", "list", "--runs-dir", "{}"],
    ["replay", "{}"], ["verify-resume", "{}"], ["lora", "inspect", "{}"], ["lora", "merge", "{}", "{}", "-o", "o"],
    ["lora", "convert", "{}", "--to", "kohya", "-o", "o.safetensors"], ["presets", "show", "{}"],
    ["presets", "copy", "quickstart", "{}"], ["check", "quickstart", "--set", "model={}"],
    ["check", "quickstart", "--set", "dataset={}"], ["check", "quickstart", "--set", "model.vae=./{}"],
    ["check", "quickstart", "--set", "start_from.continue=./{}"], ["check", "quickstart", "--set", "name={}"],
    ["run", "quickstart", "--runs-dir", "{}", "--set", "train.max_steps=1"], ["run", "quickstart", "--name", "{}"],
]  # fmt: skip


@pytest.mark.parametrize("name", [LONG, NUL, "~nouser/x"], ids=["long", "NUL", "nouser"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_name_that_no_file_can_have_is_refused_in_a_line(
    command: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if name.startswith("~") and "--runs-dir" in command:
        pytest.skip("a folder of that name can be made")
    code = main([word.format(name) if "{}" in word else word for word in command])
    streams = capsys.readouterr()
    assert code in (2, 3, 4, 5, 6) or (code == 0 and "list" in command), streams.err[-600:]
    assert "Traceback" not in streams.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may read everything")
@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] in ("check", "lint", "lora", "runs")], ids=" ".join)
def test_a_folder_that_may_not_be_read_is_refused_in_a_line(command: list[str], tmp_path: Path, capsys: Any) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    code = main([word.format(closed / "x") if "{}" in word else word for word in command])
    assert code != 1, capsys.readouterr().err
