"""Files from strangers: each is refused with exit code 4 and a line that says what it is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from tiny_models import weights

from emotrain.errors import ExitCode, ModelError
from emotrain.lora.file import read_lora
from emotrain.lora.formats import to_kohya

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP, ALPHA = (f"{STEM}.{role}" for role in ("lora_down.weight", "lora_up.weight", "alpha"))


def good() -> dict[str, torch.Tensor]:
    return to_kohya(*weights("sd15", "attn"), "sd15")


def refused(path: Path, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read_lora(path)
    assert caught.value.exit_code == ExitCode.MODEL == 4
    assert path.name in caught.value.message
    assert not caught.value.message.endswith(".")
    assert "\n" not in caught.value.message


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"<html><body>404</body></html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 40, "zip or .pt"),
        (b"\x80\x02}q\x00." + b"\0" * 40, "pickle"),
        (b"GGUF" + b"\0" * 40, "GGUF"),
        (b"abc", "not a safetensors"),
        (b"\0" * 64, "not a safetensors"),
        (with_header(b"{not json}" + b" " * 20), "not a safetensors"),
        (with_header(b"\xff\xfe" * 20), "not a safetensors"),
        (with_header(b"[" * 100_000), "not a safetensors"),
        (with_header(b"[]" + b" " * 20), "not a safetensors"),
        ((2**40).to_bytes(8, "little") + b"{}" * 30, "not a safetensors"),
        (with_header(b'{"a": 1}'), "not a safetensors"),
        (with_header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'), "not a safetensors"),
        (with_header(b'{"a": {"dtype": "F32", "shape": [1099511627776, 4]}}'), "not a safetensors"),
        (with_header(b'{"__metadata__": {"a": 1}}'), "metadata"),
        (with_header(b'{"__metadata__": {}}' + b" " * 4), "no LoRA weights"),
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_said_in_words(content: bytes, words: str, lora_path: Path) -> None:
    lora_path.write_bytes(content)
    refused(lora_path, words)


def test_missing_and_not_a_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "no such LoRA file")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    refused(folder, "not a file")
    if hasattr(os, "mkfifo"):
        pipe = tmp_path / "pipe.safetensors"
        os.mkfifo(pipe)
        refused(pipe, "not a file")


@pytest.mark.parametrize("part", [0.5, 0.99])
def test_a_truncated_file_is_damaged(part: float, lora_path: Path) -> None:
    whole = save(good())
    lora_path.write_bytes(whole[: int(len(whole) * part)])
    refused(lora_path, "damaged")


def test_bytes_after_the_end_are_damage(lora_path: Path) -> None:
    lora_path.write_bytes(save(good()) + b"more")
    refused(lora_path, "damaged")


def test_a_name_twice_in_the_header_is_refused(lora_path: Path) -> None:
    entry = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'
    lora_path.write_bytes(with_header(f'{{"x.alpha":{{{entry}}},"x.alpha":{{{entry}}}}}'.encode(), b"\0" * 4))
    refused(lora_path, "the name `x.alpha` is in it twice")


def test_a_header_over_8_mib_is_not_read(lora_path: Path) -> None:
    lora_path.write_bytes(with_header(b'{"__metadata__": {"a": "' + b"x" * 2**23 + b'"}}'))
    refused(lora_path, "not a safetensors")


def test_more_than_20000_tensors_are_refused(lora_path: Path) -> None:
    header = {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}
    lora_path.write_bytes(with_header(json.dumps(header).encode()))
    refused(lora_path, "20001 tensors")


def test_whole_numbers_are_no_weights_but_may_be_alphas(lora_path: Path) -> None:
    save_file({**good(), DOWN: torch.ones(4, 32, dtype=torch.int64)}, lora_path)
    refused(lora_path, "I64")
    save_file({**good(), ALPHA: torch.tensor(2)}, lora_path)
    assert read_lora(lora_path).alphas["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"] == 2.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), "only one half: down"),
        (lambda t: t.pop(DOWN), "only one half: up"),
        (lambda t: t.update({UP: torch.ones(32, 3)}), "do not fit"),
        (lambda t: t.update({DOWN: torch.ones(4)}), "do not fit"),
        (lambda t: t.update({DOWN: torch.ones(4, 2, 3)}), "do not fit"),
        (lambda t: t.update({DOWN: torch.ones(0, 32), UP: torch.ones(32, 0)}), "do not fit"),
        (lambda t: t.update({UP: t[UP] * math.nan}), "not finite"),
        (lambda t: t.update({DOWN: t[DOWN] * math.inf}), "not finite"),
        (lambda t: t.update({ALPHA: torch.tensor(0.0)}), "alpha of"),
        (lambda t: t.update({ALPHA: torch.tensor(-1.0)}), "alpha of"),
        (lambda t: t.update({ALPHA: torch.tensor(math.nan)}), "alpha of"),
        (lambda t: t.update({ALPHA: torch.tensor(math.inf)}), "alpha of"),
        (lambda t: t.update({ALPHA: torch.ones(3)}), "alpha of"),
        (lambda t: t.update({"lora_unet_nowhere.alpha": torch.tensor(1.0)}), "lora_unet_nowhere.alpha"),
    ],
)  # fmt: skip
def test_broken_weights_are_refused(change: Callable[[dict[str, Any]], Any], words: str, lora_path: Path) -> None:
    tensors = good()
    change(tensors)
    save_file(tensors, lora_path)
    refused(lora_path, words)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_floating_point_dtype_is_read_as_float32(dtype: torch.dtype, lora_path: Path) -> None:
    tensors = good()
    save_file({key: value.to(dtype) for key, value in tensors.items()}, lora_path)
    lora = read_lora(lora_path)
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert lora.state[key].dtype == torch.float32
    assert torch.equal(lora.state[key], tensors[DOWN].to(dtype).to(torch.float32))
    assert lora.dtype in ("fp64", "fp16", "bf16", "fp8")
