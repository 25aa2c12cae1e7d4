"""Headers and JSON from strangers: each is refused in words and at once, as a LoRA and as a model."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotrain.errors import ModelError
from emotrain.families.headers import read_header as read_model
from emotrain.families.headers import read_json
from emotrain.files import parse_header, strict_json
from emotrain.lora.container import read_header as read_lora

GOOD: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def entry(**changes: Any) -> str:
    return json.dumps({"a": {**GOOD, **changes}})


HOSTILE = {
    "a dtype that is a list": entry(dtype=["F32"]),
    "an unknown dtype": entry(dtype="F99"),
    "an infinite shape": '{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 24]}}',
    "a negative shape": entry(shape=[-2, 3]),
    "a shape of truth": entry(shape=[True, 6]),
    "a shape of many huge sides": entry(shape=[10**19] * 390_000),
    "a shape that is text": entry(shape="2,3"),
    "a side with 5,000 digits": '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 24]}}',
    "offsets as text": entry(data_offsets=["0", "24"]),
    "offsets outside the file": entry(shape=[20, 3], data_offsets=[0, 240]),
    "offsets of another size": entry(data_offsets=[0, 20]),
    "offsets the wrong way round": entry(data_offsets=[24, 0]),
    "one entry of text": '{"a": "b"}',
    "nesting": "[" * 100_000,
    "nesting in objects": '{"a":' * 100_000,
    "a list": "[1]",
    "metadata of numbers": '{"__metadata__": {"a": 1}}',
    "shared bytes": json.dumps({"a": GOOD, "b": GOOD}),
    "a name twice among 60,000": "{" + ",".join(f'"{i % 59_999}": {{}}' for i in range(60_000)) + "}",
}


def file_of(path: Path, header: str) -> Path:
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 24)
    return path


@pytest.mark.parametrize("read", [read_model, read_lora], ids=["model", "LoRA"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_refused_in_words_and_at_once(
    case: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = file_of(tmp_path / "a.safetensors", HOSTILE[case])
    started = time.process_time()
    with pytest.raises(ModelError) as refused:
        read(path)
    assert time.process_time() - started < 3
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 600


@pytest.mark.parametrize("read", [read_model, read_lora], ids=["model", "LoRA"])
@pytest.mark.parametrize("length", [640, 1152])  # 0x0280 and 0x0480: the two first bytes of a pickle
def test_a_header_whose_length_looks_like_a_pickle_is_read(
    length: int, read: Callable[[Path], object], tmp_path: Path
) -> None:
    read(file_of(tmp_path / "a.safetensors", entry().ljust(length)))


@pytest.mark.parametrize("read", [read_model, read_lora], ids=["model", "LoRA"])
def test_a_good_header_and_a_scalar_pass(read: Callable[[Path], object], tmp_path: Path) -> None:
    scalar = {"dtype": "F32", "shape": [], "data_offsets": [20, 24]}
    header = {"a": {**GOOD, "shape": [5], "data_offsets": [0, 20]}, "b": scalar, "__metadata__": {"x": "y"}}
    read(file_of(tmp_path / "a.safetensors", json.dumps(header)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("read", [read_model, read_lora, read_json], ids=["model", "LoRA", "JSON"])
def test_a_pipe_is_never_waited_for(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ModelError):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nouser/x"])
@pytest.mark.parametrize("read", [read_model, read_json], ids=["model", "JSON"])
def test_a_name_that_cannot_be_is_no_file(read: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        read(tmp_path / name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "U8", "F4"]) | json_values,
        "shape": st.lists(st.integers(-1, 9), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2) | json_values,
    },
)


@given(st.dictionaries(st.text(max_size=6), entries | json_values, max_size=5), st.integers(0, 200))
def test_any_header_is_parsed_or_refused_in_words(header: dict[str, Any], size: int) -> None:
    try:
        parsed, _ = parse_header(json.dumps(header).encode(), size)
    except ValueError:  # and nothing else
        return
    for one in parsed.values():
        first, last = one["data_offsets"]
        assert 0 <= first <= last <= size
        assert all(type(side) is int and side >= 0 for side in one["shape"])


@given(st.text(max_size=60) | json_values.map(json.dumps))
def test_any_text_is_json_or_refused_in_words(text: str) -> None:
    with contextlib.suppress(ValueError):  # and nothing else
        assert json.dumps(strict_json(text))


def test_a_tokenizer_without_a_limit_is_no_damage() -> None:
    """transformers writes 10^30, rounded, for the length of a tokenizer that has none."""
    assert strict_json('{"model_max_length": 1000000000000000019884624838656}') == {"model_max_length": int(1e30)}
