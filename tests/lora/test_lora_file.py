"""Writing: whole or not at all, the same bytes each time, never non-finite; and the check after it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import weights

from emotrain.errors import ModelError, ResourceError
from emotrain.lora import container
from emotrain.lora.check import self_check
from emotrain.lora.file import read_lora, save_lora
from emotrain.lora.formats import LAYOUTS

STATE, ALPHAS = weights("sd15", "attn")
FIRST = next(iter(STATE))


def write(path: Path, state: dict[str, torch.Tensor] = STATE, **options: object) -> str:
    settings = {"alphas": ALPHAS, "family": "sd15", "metadata": {"b": "2", "a": "1"}, **options}
    return save_lora(path, state, **settings)  # type: ignore[arg-type]


def test_the_same_input_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors")
    turned = dict(reversed(STATE.items()))
    second = write(
        tmp_path / "b.safetensors", turned, alphas=dict(reversed(ALPHAS.items())), metadata={"a": "1", "b": "2"}
    )
    assert first == second
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_returned_sha256_is_the_files(lora_path: Path) -> None:
    assert write(lora_path) == hashlib.sha256(lora_path.read_bytes()).hexdigest() == read_lora(lora_path).sha256


def test_safetensors_reads_what_we_write(lora_path: Path) -> None:
    write(lora_path, dtype="fp32")
    tensors = load_file(lora_path)
    assert len(tensors) == 3 * len(ALPHAS)
    with safe_open(lora_path, "pt") as file:
        assert file.metadata()["a"] == "1"
    header, _ = container.read_header(lora_path)
    assert all(entry["data_offsets"][0] % 4 == 0 for entry in header.values())


def test_plain_and_canonical_names_give_the_same_file(tmp_path: Path) -> None:
    plain = {key.removeprefix("unet."): value for key, value in STATE.items()}
    alphas = {key.removeprefix("unet."): value for key, value in ALPHAS.items()}
    assert write(tmp_path / "a.safetensors") == write(tmp_path / "b.safetensors", plain, alphas=alphas)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_written(value: float, lora_path: Path) -> None:
    write(lora_path)
    before = lora_path.read_bytes()
    broken = {**STATE, FIRST: STATE[FIRST].clone()}
    broken[FIRST][0, 0] = value
    with pytest.raises(ModelError, match="not finite"):
        write(lora_path, broken)
    assert lora_path.read_bytes() == before


def test_what_float16_cannot_hold_is_refused_with_the_way_out(lora_path: Path) -> None:
    with pytest.raises(ModelError, match="too large for fp16") as caught:
        write(lora_path, {**STATE, FIRST: STATE[FIRST] * 1e6})
    assert "fp32" in str(caught.value.hint)
    assert not lora_path.exists()
    write(lora_path, {**STATE, FIRST: STATE[FIRST] * 1e6}, dtype="bf16")


def test_tiny_ups_keep_their_precision_in_float16(lora_path: Path) -> None:
    """A young LoRA's B is near 1e-6, where float16 has next to no digits left."""
    young = {key: value * 1e-6 if "lora_B" in key else value for key, value in STATE.items()}
    write(lora_path, young)
    self_check(lora_path, young, ALPHAS, "sd15")


def test_an_alpha_that_float16_cannot_hold_stays_exact(lora_path: Path) -> None:
    write(lora_path, alphas=dict.fromkeys(ALPHAS, 0.1))
    assert set(read_lora(lora_path).alphas.values()) == {torch.tensor(0.1).item()}
    assert read_lora(lora_path).dtype == "fp16"


def test_a_failed_write_leaves_the_old_file_and_no_rest(lora_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(lora_path)
    before = lora_path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full") as caught:
        write(lora_path, dtype="fp32")
    assert caught.value.exit_code == 6
    assert lora_path.read_bytes() == before
    assert [path.name for path in lora_path.parent.iterdir()] == [lora_path.name]


def test_file_and_folder_are_synced_around_the_rename(lora_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append("fsync"), fsync(d))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    write(lora_path)
    assert calls == ["fsync", "rename", "fsync"]


def test_a_folder_that_is_not_there_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be written"):
        write(tmp_path / "none" / "lora.safetensors")


def test_the_check_passes_what_was_saved_in_every_dtype(tmp_path: Path) -> None:
    for dtype in ("fp16", "bf16", "fp32"):
        for layout in ("kohya", "diffusers"):
            path = tmp_path / f"{dtype}-{layout}.safetensors"
            write(path, dtype=dtype, format=layout)
            self_check(path, STATE, ALPHAS, "sd15")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_the_check_passes_every_layout_that_can_be_asked_for(family: str, layout: str, lora_path: Path) -> None:
    """Where diffusers does not read a layout of a family, our own reading has to do."""
    state, alphas = weights(family, "all")
    save_lora(lora_path, state, alphas=alphas, family=family, format=layout, dtype="fp32", metadata={})
    self_check(lora_path, state, alphas, family)


@pytest.mark.parametrize("fault", ["weight", "alpha", "missing", "swapped", "family"])
def test_the_check_catches_a_file_that_says_something_else(fault: str, lora_path: Path) -> None:
    write(lora_path, dtype="fp32")
    tensors, metadata = container.read(lora_path)
    stems = sorted({key.split(".")[0] for key in tensors})
    down, up, alpha = (f"{stems[0]}.{role}" for role in ("lora_down.weight", "lora_up.weight", "alpha"))
    if fault == "weight":
        tensors[up][0, 0] += 0.01
    elif fault == "alpha":
        tensors[alpha] *= 2
    elif fault == "missing":
        for key in (down, up, alpha):
            del tensors[key]
    elif fault == "swapped":
        other = stems[0].replace("to_k", "to_v")
        assert other != stems[0]
        tensors[up], tensors[f"{other}.lora_up.weight"] = tensors[f"{other}.lora_up.weight"], tensors[up]
    save_file(tensors, lora_path, metadata)
    with pytest.raises(ModelError) as caught:
        self_check(lora_path, STATE, ALPHAS, "sdxl" if fault == "family" else "sd15")
    assert caught.value.exit_code == 4


def test_the_check_sees_what_only_diffusers_gets_wrong(lora_path: Path) -> None:
    """Differing attention alphas are right in our reader and lost in diffusers."""
    write(lora_path, dtype="fp32")
    tensors, metadata = container.read(lora_path)
    changed = dict(ALPHAS)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors[f"{stem}.alpha"] *= 2
    changed["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"] *= 2
    save_file(tensors, lora_path, metadata)
    assert read_lora(lora_path).alphas == changed
    with pytest.raises(ModelError, match="in diffusers"):
        self_check(lora_path, STATE, changed, "sd15")
    write(lora_path, alphas=changed)
    self_check(lora_path, STATE, changed, "sd15")
