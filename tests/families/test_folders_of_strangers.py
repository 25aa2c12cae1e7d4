"""Diffusers folders from strangers: nothing is filled up at random, and nothing of theirs is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from emotrain.errors import ModelError
from emotrain.families import load_family


@pytest.fixture
def copy(tmp_path: Path, sd_folder: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


@pytest.mark.parametrize("how", ["missing", "renamed"])
def test_a_text_encoder_with_a_tensor_that_is_not_there_is_refused(copy: Path, how: str) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "q_proj.weight" in key)
    value = tensors.pop(name)
    if how == "renamed":
        tensors[name.replace("q_proj", "query")] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of its tensors") as refused:
        load_family(str(copy), device="cpu")
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("unet", ["diffusers", "DiffusionPipeline"]),
        ("scheduler", ["diffusers", "os.system"]),
        ("tokenizer", "AutoTokenizer"),
    ],
)
def test_a_class_that_this_part_cannot_be_is_refused_and_never_asked_about(
    copy: Path, part: str, entry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`AutoTokenizer` with an `auto_map` would ask whether to run the folder's own code."""
    marker = copy / "ran"
    (copy / "tokenizer" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    config = copy / "tokenizer" / "tokenizer_config.json"
    words = json.loads(config.read_text()) if config.is_file() else {}
    config.write_text(json.dumps({**words, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, part: entry}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ModelError):
        load_family(str(copy), device="cpu")
    assert not marker.exists()
