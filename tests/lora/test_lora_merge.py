"""Merging: exact by concatenation, nearest by SVD."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import output, tiny, trained, weights

from emotrain.errors import ConfigError, ModelError
from emotrain.lora.adapter import adapter_like
from emotrain.lora.convert import merge_files
from emotrain.lora.file import LoraFile, read_lora, save_lora
from emotrain.lora.formats import pairs
from emotrain.lora.merge import merge, resize


def lora(family: str = "sd15", scale: float = 1.0, **options: object) -> LoraFile:
    state, alphas = weights(family, **options)  # type: ignore[arg-type]
    state = {key: value * scale for key, value in state.items()}
    return LoraFile(Path(f"{family}.safetensors"), state, alphas, family, "kohya", "fp32", {}, "00")


def test_a_merge_is_the_weighted_sum_of_the_updates() -> None:
    first, second = lora(targets="attn"), lora(targets="all", rank=3, alpha=7.0, scale=0.3)
    merged = merge([(first, 0.8), (second, -0.5)])
    ours = pairs(merged.state, merged.alphas)
    a, b = pairs(first.state, first.alphas), pairs(second.state, second.alphas)
    assert ours.keys() == a.keys() | b.keys()
    for name, pair in ours.items():
        expected = torch.zeros(pair.up.shape[0], pair.down.flatten(1).shape[1], dtype=torch.float64)
        for part, weight in ((a.get(name), 0.8), (b.get(name), -0.5)):
            if part is not None:
                expected += weight * part.strength * (part.up.flatten(1).double() @ part.down.flatten(1).double())
        found = pair.strength * (pair.up.flatten(1).double() @ pair.down.flatten(1).double())
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert set(merged.ranks.values()) == {3, 7}
    assert merged.error == 0.0


def test_a_rank_that_is_enough_loses_nothing_and_a_smaller_one_says_what() -> None:
    first = lora(targets="attn", rank=4)
    same = merge([(first, 0.5), (first, 0.5)], rank=4)
    assert same.error < 1e-6
    assert set(same.ranks.values()) == {4}
    less = merge([(first, 1.0)], rank=2)
    assert 0.2 < less.error < 1.0
    assert less.worst[1] >= less.error
    name = less.worst[0]
    kept = less.state[f"{name}.lora_B.weight"] @ less.state[f"{name}.lora_A.weight"]
    full = pairs(first.state, first.alphas)[name]
    whole = full.up @ full.down * full.strength
    assert float((kept - whole).norm() / whole.norm()) == pytest.approx(less.worst[1], rel=1e-4)


def test_resizing_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 20, 3, 3, generator=generator), torch.randn(15, 6, 1, 1, generator=generator)
    small_down, small_up, size, error = resize(down, up, 2)
    assert (small_down.shape, small_up.shape) == ((2, 20, 3, 3), (15, 2, 1, 1))
    whole = up.flatten(1) @ down.flatten(1)
    singular = torch.linalg.svdvals(whole)
    assert size == pytest.approx(float(singular.norm()), rel=1e-5)
    assert error == pytest.approx(float(singular[2:].norm()), rel=1e-5)
    assert float((small_up.flatten(1) @ small_down.flatten(1) - whole).norm()) == pytest.approx(error, rel=1e-4)


def test_different_families_and_odd_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="sd15.*flux"):
        merge([(lora(), 1.0), (lora("flux"), 1.0)])
    with pytest.raises(ConfigError, match="nan"):
        merge([(lora(), float("nan"))])
    with pytest.raises(ConfigError):
        merge([])


@pytest.mark.parametrize(("family", "both"), [("sd15", "attn-mlp"), ("sd15", "all"), ("flux", "attn-mlp")])
def test_a_merged_file_does_what_both_files_do(family: str, both: str, tmp_path: Path) -> None:
    paths = []
    for number, targets in enumerate(("attn" if both != "all" else "all", both)):
        t = trained(family, targets=targets)
        paths.append(tmp_path / f"{number}.safetensors")
        save_lora(
            paths[-1], t.adapter.state(), alphas=t.adapter.alphas(), family=family, dtype="fp32",
            metadata={"modelspec.trigger_phrase": f"word{number}"},
        )  # fmt: skip
    written, _ = merge_files([(paths[0], 0.75), (paths[1], 0.5)], tmp_path / "both.safetensors")
    merged = read_lora(written.path)
    model, expected = tiny(family), tiny(family)
    adapter_like(model, merged.state, merged.alphas, family=family)
    for number, (path, weight) in enumerate(zip(paths, (0.75, 0.5), strict=True)):
        part = read_lora(path)
        alphas = {name: alpha * weight for name, alpha in part.alphas.items()}
        adapter_like(expected, part.state, alphas, family=family, name=f"part{number}")
    assert torch.allclose(output(family, model), output(family, expected), atol=1e-6)
    assert merged.metadata["modelspec.trigger_phrase"] == "word0, word1"
    assert merged.metadata["emotrain.parents"].count("sha256") == 2


def test_convolutions_that_are_cut_to_a_rank_can_be_read_by_diffusers(tmp_path: Path) -> None:
    state, alphas = weights("sd15", "all")
    save_lora(tmp_path / "a.safetensors", state, alphas=alphas, family="sd15", dtype="fp32", metadata={})
    parts = [(tmp_path / "a.safetensors", 0.5)] * 2
    written, merged = merge_files(parts, tmp_path / "less.safetensors", rank=2)
    assert {key: value.shape for key, value in read_lora(written.path).state.items()} == {
        key: torch.Size((2, *value.shape[1:]) if ".lora_A." in key else (len(value), 2, *value.shape[2:]))
        for key, value in state.items()
    }


def test_a_merge_keeps_float16_only_where_it_is_exact(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.safetensors" for n in "ab"]
    state, alphas = weights("sd15", "attn", alpha=4.0)
    for path in paths:
        save_lora(path, state, alphas=alphas, family="sd15", dtype="fp16", metadata={})
    exact, _ = merge_files([(path, 0.5) for path in paths], tmp_path / "exact.safetensors")
    wide, _ = merge_files([(path, 0.8) for path in paths], tmp_path / "wide.safetensors")
    assert (exact.dtype, wide.dtype) == ("fp16", "fp32")
