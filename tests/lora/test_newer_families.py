"""LoRA files of Z-Image and FLUX.2: every layout that we write or that others write, read back and by diffusers."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from emotrain.errors import ModelError
from emotrain.families.registry import FAMILIES
from emotrain.lora import names
from emotrain.lora.adapter import Adapter, adapter_like, add_adapter, stack_frozen
from emotrain.lora.check import compare, read_as_diffusers
from emotrain.lora.convert import convert, merge_files
from emotrain.lora.file import canonical, read_lora, save_lora
from emotrain.lora.formats import LAYOUTS, pairs, to_kohya, updates
from emotrain.lora.kron import Kron
from emotrain.lora.origin import require_family
from emotrain.lora.summary import summarise

sys.path.insert(0, str(Path(__file__).parent.parent / "families"))

from newer_models import denoiser_of  # noqa: E402

KINDS = ["zimage", "flux2", "krea2", "anima", "qwen", "chroma", "qwen21", "flux3"]


@cache
def trained(kind: str, targets: str) -> Adapter:
    """An adapter with random weights and an alpha that is not its rank; nobody changes it."""
    adapter = add_adapter(denoiser_of(kind), rank=4, alpha=2.0, targets=targets, family=kind, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def layer_updates(state: dict[str, torch.Tensor], alphas: dict[str, float]) -> dict[str, torch.Tensor]:
    return {path: (pair.up @ pair.down) * pair.strength for path, pair in pairs(state, alphas).items()}


@pytest.mark.parametrize("targets", ["attn", "attn-mlp", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_says_the_live_weights_to_us_and_to_diffusers(
    kind: str, layout: str, targets: str, tmp_path: Path
) -> None:
    adapter = trained(kind, targets)
    path = tmp_path / "lora.safetensors"
    save_lora(
        path, adapter.file_state(), alphas=adapter.file_alphas(), family=kind, format=layout, dtype="fp32", metadata={}
    )
    lora = read_lora(path)
    assert lora.family == kind
    assert len(lora.alphas) == adapter.num_modules
    live = canonical(adapter.file_state(), adapter.file_alphas(), kind)
    compare(path, "read back", live, (lora.state, lora.alphas), "fp32")
    seen = read_as_diffusers(path, lora)
    unread = layout in FAMILIES[kind].lora.unread_layouts
    small = (kind, layout) == ("chroma", "kohya")  # diffusers' converter knows FLUX.1's width alone
    assert (seen is None) == (unread or small)
    if seen is not None:
        compare(path, "in diffusers", live, seen, "fp32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_layout_has_the_names_that_comfyui_and_diffusers_both_read(kind: str, tmp_path: Path) -> None:
    adapter = trained(kind, "attn-mlp")
    path = tmp_path / "lora.safetensors"
    save_lora(path, adapter.file_state(), alphas=adapter.file_alphas(), family=kind, metadata={})
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    double = "transformer.transformer_blocks.0.attn.to_q"
    head = {"zimage": "diffusion_model.layers.0.attention.to_q", "flux2": double, "krea2": double, "chroma": double}
    head["qwen21"], head["qwen"] = double, "diffusion_model.transformer_blocks.0.attn.to_q"
    head["flux3"] = "diffusion_model.single_blocks.0.q_proj"
    head["anima"] = "diffusion_model.blocks.0.self_attn.q_proj"
    assert {head[kind] + names.DOWN, head[kind] + names.UP} <= keys
    assert not any(key.endswith(".alpha") for key in keys)  # FLUX.2's reader refuses them


def others(kind: str, adapter: Adapter) -> dict[str, dict[str, torch.Tensor]]:
    """The same LoRA as other programs write it."""
    state, alphas = canonical(adapter.file_state(), adapter.file_alphas(), kind)
    kohya = to_kohya(state, alphas, kind)
    ai_toolkit = {}
    for key, value in kohya.items():
        stem, _, role = key.partition(".")
        if role == "alpha":
            continue
        group = FAMILIES[kind].lora.originals.from_original(dotted_original(kind, stem.removeprefix("lora_unet_")))
        assert group is not None, stem
        half = ".lora_A.weight" if "down" in role else ".lora_B.weight"
        strength = float(kohya[f"{stem}.alpha"]) / kohya[f"{stem}.lora_down.weight"].shape[0]
        ai_toolkit[f"diffusion_model.{group.name}{half}"] = value if "down" in role else value * strength
    plain = {key.removeprefix("transformer."): value for key, value in state.items()}
    onetrainer = {}
    for key, value in plain.items():
        path, down, _ = key.partition(names.DOWN)
        path = path if down else key.partition(names.UP)[0]
        onetrainer[f"transformer.{path}.lora_{'down' if down else 'up'}.weight"] = value
        onetrainer[f"transformer.{path}.alpha"] = torch.tensor(alphas[f"transformer.{path}"])
    return {"kohya": kohya, "ai-toolkit": ai_toolkit, "onetrainer": onetrainer}


def dotted_original(kind: str, name: str) -> str:
    from emotrain.lora.origin import dotted

    return dotted(name)


@pytest.mark.parametrize("program", ["kohya", "ai-toolkit", "onetrainer"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_programs_are_the_same_update(kind: str, program: str, tmp_path: Path) -> None:
    adapter = trained(kind, "all")
    path = tmp_path / "theirs.safetensors"
    save_file({k: v.contiguous() for k, v in others(kind, adapter)[program].items()}, path)
    lora = read_lora(path)
    assert lora.family == (FAMILIES[kind].lora.alike or kind)  # Chroma's names are FLUX.1's
    require_family(lora.family, kind, "it")
    ours = layer_updates(*canonical(adapter.file_state(), adapter.file_alphas(), kind))
    theirs = layer_updates(lora.state, lora.alphas)
    assert ours.keys() == theirs.keys()
    for name, update in ours.items():
        assert torch.allclose(update, theirs[name], atol=1e-5), name


def named(kind: str, adapter: Adapter, head: str, dot: str, roles: str) -> dict[str, torch.Tensor]:
    """The same LoRA under diffusers' names, with an alpha."""
    state, alphas = canonical(adapter.file_state(), adapter.file_alphas(), kind)
    found: dict[str, torch.Tensor] = {}
    for path, pair in pairs(state, alphas).items():
        stem = head + path.removeprefix("transformer.").replace(".", dot)
        for role, value in zip(roles.split(), (pair.down, pair.up), strict=True):
            found[f"{stem}.lora_{role}.weight"] = value.contiguous()
        found[f"{stem}.alpha"] = torch.tensor(pair.alpha)
    return found


STEMS = [
    ("transformer.", ".", "A B"), ("diffusion_model.", ".", "A B"), ("diffusion_model.", ".", "down up"),
    ("", ".", "A B"), ("lora_unet_", "_", "down up"), ("lora_transformer_", "_", "down up"),
    ("lycoris_", "_", "down up"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_names_under_every_head_are_the_same_update(kind: str, tmp_path: Path) -> None:
    """As diffusers, ai-toolkit, diffusion-pipe, OneTrainer, musubi-tuner and LyCORIS have them."""
    adapter = trained(kind, "attn-mlp")
    expected = layer_updates(*canonical(adapter.file_state(), adapter.file_alphas(), kind))
    for head, dot, roles in STEMS:
        save_file(named(kind, adapter, head, dot, roles), tmp_path / "theirs.safetensors")
        lora = read_lora(tmp_path / "theirs.safetensors")
        require_family(lora.family, kind, head)
        assert_same(layer_updates(lora.state, lora.alphas), expected)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_another_programs_file_goes_through_every_command(kind: str, tmp_path: Path) -> None:
    """Counted, continued, stacked, brought to our layout, and merged with our file: one update."""
    adapter = trained(kind, "attn-mlp")
    theirs, ours, out = (tmp_path / f"{name}.safetensors" for name in ("theirs", "ours", "out"))
    save_file({k: v.contiguous() for k, v in others(kind, adapter)["ai-toolkit"].items()}, theirs)
    save_lora(ours, adapter.file_state(), alphas=adapter.file_alphas(), family=kind, dtype="fp32", metadata={})
    expected = layer_updates(*canonical(adapter.file_state(), adapter.file_alphas(), kind))
    lora = read_lora(theirs)
    assert summarise(lora)["modules"] == len(expected)
    continued = adapter_like(denoiser_of(kind), *lora.of_part("transformer"), family=kind)
    assert_same(layer_updates(*canonical(continued.file_state(), continued.file_alphas(), kind)), expected)
    stacked = denoiser_of(kind)
    paths = stack_frozen(stacked, [(lora.state, lora.alphas, 1.0)], part="transformer")
    layers = {f"transformer.{path}": stacked.get_submodule(path) for path in paths}
    with torch.no_grad():
        unit = {path: torch.eye(layer.in_features) for path, layer in layers.items()}
        added = {path: (layer(unit[path]) - layer.base_layer(unit[path])).T for path, layer in layers.items()}
    assert_same(added, expected)
    assert convert(theirs, FAMILIES[kind].lora.layout, out).modules == len(expected)
    for parts in ([(theirs, 0.7), (ours, 0.3)], [(ours, 0.3), (theirs, 0.7)]):
        written, _ = merge_files(parts, out, overwrite=True)
        assert written.family == kind
        merged = read_lora(out)
        assert_same(layer_updates(merged.state, merged.alphas), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_convert_goes_there_and_back(kind: str, tmp_path: Path) -> None:
    adapter = trained(kind, "attn-mlp")
    first = tmp_path / "first.safetensors"
    save_lora(first, adapter.file_state(), alphas=adapter.file_alphas(), family=kind, dtype="fp32", metadata={})
    for i, layout in enumerate(LAYOUTS):
        written = convert(first, layout, tmp_path / f"{i}.safetensors")
        assert (written.family, written.modules) == (kind, adapter.num_modules)


def test_a_flux1_lora_is_not_taken_for_flux2(tmp_path: Path) -> None:
    """Their double blocks have the same names; the single blocks and the feed-forward widths tell."""
    width = 64
    shapes = {"single_blocks.0.linear1": (width, 7 * width), "double_blocks.0.img_mlp.0": (width, 4 * width)}
    for wanted, factors in (("flux", (7, 4)), ("flux2", (9, 6))):
        tensors: dict[str, torch.Tensor] = {}
        for (name, (inner, _)), factor in zip(shapes.items(), factors, strict=True):
            tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.ones(2, inner)
            tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.ones(factor * inner, 2)
        path = tmp_path / f"{wanted}.safetensors"
        save_file(tensors, path)
        assert read_lora(path).family == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_no_module_are_named(kind: str, tmp_path: Path) -> None:
    adapter = trained(kind, "attn")
    tensors: dict[str, Any] = {k: v.contiguous() for k, v in others(kind, adapter)["kohya"].items()}
    tensors["lora_unet_nowhere_1.lora_down.weight"] = torch.ones(4, 8)
    tensors["lora_unet_nowhere_1.lora_up.weight"] = torch.ones(8, 4)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match="2 of its keys belong to no module"):
        read_lora(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("network", ["lora", "lokr"])
def test_krea2s_queries_keys_and_values_in_one_layer_are_taken_apart(network: str, tmp_path: Path) -> None:
    """SimpleTuner writes LyCORIS so, with untrained layers of the three beside it; keys have fewer heads."""
    generator = torch.Generator().manual_seed(5)
    stem, width, rows = "lycoris_transformer_blocks_0_attn_to_qkv", 64, 64 + 32 + 32
    if network == "lora":
        factors = {"lora_down.weight": (4, width), "lora_up.weight": (rows, 4)}
    else:
        factors = {"lokr_w1": (4, 4), "lokr_w2": (rows // 4, width // 4)}
    tensors = {f"{stem}.{name}": torch.randn(shape, generator=generator) for name, shape in factors.items()}
    first, second = tensors.values()
    whole = second @ first if network == "lora" else torch.kron(first, second)
    tensors |= {f"{stem}.alpha": torch.tensor(4.0)}
    for letter, size in (("q", 64), ("k", 32), ("v", 32)):
        own = stem.replace("qkv", letter)
        tensors |= {f"{own}.lora_down.weight": torch.randn(4, width), f"{own}.lora_up.weight": torch.zeros(size, 4)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    lora = read_lora(tmp_path / "theirs.safetensors")
    assert lora.family == "krea2"
    found = {
        path.rsplit(".", 1)[1]: part.dense() if isinstance(part, Kron) else part.up @ part.down * part.strength
        for path, part in updates(lora.state, lora.alphas).items()
    }
    assert torch.allclose(torch.cat([found.pop(f"to_{letter}") for letter in "qkv"]), whole, atol=1e-5)
    assert not found
    tensors["lycoris_transformer_blocks_0_attn_to_q.lora_up.weight"] = torch.ones(64, 4)
    save_file(tensors, tmp_path / "both.safetensors")
    with pytest.raises(ModelError, match="two sets of weights"):
        read_lora(tmp_path / "both.safetensors")


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model."])
def test_names_of_whole_checkpoints_stand_before_loras_too(prefix: str, tmp_path: Path) -> None:
    stem = f"{prefix}blocks.0.self_attn.q_proj"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 64), f"{stem}.lora_B.weight": torch.ones(64, 2)}, tmp_path / "a")
    lora = read_lora(tmp_path / "a")
    assert (lora.family, *lora.alphas) == ("anima", "transformer.transformer_blocks.0.attn1.to_q")
