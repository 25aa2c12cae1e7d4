"""LoKr: what a file says by the published formula is what the live model computes; read, written, stacked, merged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emotrain.batch import Conditioning
from emotrain.errors import ConfigError, ModelError
from emotrain.families.loading import load_family
from emotrain.families.quantize import quantize_linears
from emotrain.families.registry import FAMILIES
from emotrain.lora import names, targets
from emotrain.lora.adapter import Adapter, LokrAdapter, adapter_like, add_adapter, join, stack_frozen
from emotrain.lora.check import read_as_diffusers, self_check
from emotrain.lora.convert import convert, merge_files
from emotrain.lora.file import read_lora, save_lora
from emotrain.lora.kron import Kron, krons, sizes
from emotrain.lora.lokr import HalfLokr, attach
from emotrain.lora.summary import summarise

sys.path.insert(0, str(Path(__file__).parent.parent / "families"))

from newer_models import denoiser_of  # noqa: E402

NEWER = ["zimage", "flux2", "krea2", "anima", "qwen", "chroma", "qwen21", "flux3"]
FLUX, FLUX2 = ({"emotrain.family": name} for name in ("flux", "flux2"))
WHOLE = "unet.mid_block.resnets.0.conv1"


def new_lokr(model: nn.Module, family: str, part: str | None = None, **words: Any) -> Adapter:
    adapter = add_adapter(
        model, rank=1, factor=4, family=family, seed=5, part=part, **{"targets": "all", **words}
    )  # fmt: skip
    assert isinstance(adapter, LokrAdapter)
    return tiny.randomised(adapter, size=0.1)


def saved(adapter: Adapter, path: Path, family: str, format: str = "auto") -> Path:
    state, alphas = adapter.file_state(), adapter.file_alphas()
    save_lora(path, state, alphas=alphas, family=family, format=format, dtype="fp32", metadata={})
    self_check(path, state, alphas, family)
    return path


def updates_of(path: Path) -> dict[str, Tensor]:
    """Delta W of every module of a file, by LyCORIS's formula, from the file's own tensors."""
    tensors = load_file(path)
    stems = {key.rpartition(".")[0] for key in tensors}
    return {
        stem: torch.kron(
            tensors[f"{stem}.lokr_w1"][(...,) + (None,) * (tensors[f"{stem}.lokr_w2"].ndim - 2)],
            tensors[f"{stem}.lokr_w2"],
        )
        for stem in stems
    }  # fmt: skip


def patched(model: nn.Module, updates: dict[str, Tensor], weight: float = 1.0) -> nn.Module:
    """The model with the updates added to its weights."""
    with torch.no_grad():
        for path, update in updates.items():
            model.get_submodule(path).weight += weight * update
    return model


def own_paths(family: str, updates: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's stems in diffusers' or kohya's layout -> the model's paths."""
    prefix = "lora_unet_" if FAMILIES[family].lora.layout == "kohya" else f"{targets.part_of(family)}."
    flat = {path.replace(".", "_"): path for path in targets.layers(tiny.tiny(family))}
    if family == "sdxl":
        flat = {str(FAMILIES[family].lora.originals.to_original(p).name).replace(".", "_"): p for p in flat.values()}  # type: ignore[union-attr]
    paths = {stem: stem.removeprefix(prefix) for stem in updates}
    return {flat[path] if prefix == "lora_unet_" else path: updates[stem] for stem, path in paths.items()}


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_the_file_by_the_published_formula_is_the_live_model(family: str, lora_path: Path) -> None:
    model = tiny.tiny(family)
    base = tiny.output(family, model)
    adapter = new_lokr(model, family)
    live = tiny.output(family, model)
    assert (live - base).abs().max() > 1e-3
    updates = own_paths(family, updates_of(saved(adapter, lora_path, family)))
    assert len(updates) == adapter.num_modules
    assert any(update.ndim == 4 for update in updates.values()) == (family in ("sd15", "sdxl"))
    expected = tiny.output(family, patched(tiny.tiny(family), updates))
    assert torch.allclose(live, expected, atol=1e-5 * float(expected.abs().max()))
    with adapter.off():
        assert torch.equal(tiny.output(family, model), base)


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-flux"])
def test_the_built_in_models_compute_what_the_file_says(name: str, lora_path: Path) -> None:
    family = load_family(f"builtin:{name}", device="cpu")
    sizes = torch.full((2, 2), 64)
    noisy = torch.randn((2, *latents_of(family)), generator=torch.Generator().manual_seed(1))
    text = family.encode_texts(["a red cat", "two birds"])
    times = torch.tensor([0.3, 0.7]) if family.prediction == "flow" else torch.tensor([300, 700])

    def predicted() -> Tensor:
        with torch.no_grad():
            return family.predict(noisy, times, text, Conditioning(sizes, sizes * 0, sizes))

    base = predicted()
    adapter = new_lokr(family.denoiser, family.name)
    live = predicted()
    saved(adapter, lora_path, family.name, "diffusers")
    part = targets.part_of(family.name)
    updates = {stem.removeprefix(f"{part}."): value for stem, value in updates_of(lora_path).items()}
    assert len(updates) == adapter.num_modules
    with adapter.off():
        assert torch.equal(predicted(), base)
        patched(family.denoiser, updates)
        expected = predicted()
    assert (live - base).abs().max() > 1e-3
    assert torch.allclose(live, expected, atol=1e-5 * float(expected.abs().max()))


def latents_of(family: Any) -> tuple[int, int, int]:
    return tuple(family.encode_images(torch.zeros(1, 3, 64, 64)).shape[1:])


@pytest.mark.parametrize("family", NEWER)
def test_the_newer_families_compute_what_the_file_says(family: str, lora_path: Path) -> None:
    """Layer by layer: an input through the live layer, and through one whose weight has the file's update added."""
    model = denoiser_of(family).requires_grad_(False)
    before = {path: layer.weight.clone() for path, layer in targets.layers(model).items()}
    adapter = new_lokr(model, family)
    state = read_lora(saved(adapter, lora_path, family)).state
    held = targets.layers(model)
    assert len(krons(state)) == adapter.num_modules
    for name, kron in krons(state).items():
        path = name.removeprefix("transformer.")
        layer = held[path]
        x = torch.randn(3, layer.in_features)
        expected = x @ (before[path] + kron.dense()).t() + (0 if layer.bias is None else layer.bias)
        assert torch.allclose(layer(x), expected, atol=1e-5 * float(expected.abs().max())), path


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", *NEWER])
def test_a_lokr_has_the_stems_of_a_lora_so_that_the_same_readers_find_it(family: str, tmp_path: Path) -> None:
    old = family not in NEWER
    stems = []
    for number, factor in enumerate((None, 4)):
        model = tiny.tiny(family) if old else denoiser_of(family)
        adapter = add_adapter(model, rank=2, factor=factor, targets="all", family=family, seed=0)
        tiny.randomised(adapter)
        path = tmp_path / f"{number}.safetensors"
        save_lora(path, adapter.file_state(), alphas=adapter.file_alphas(), family=family, metadata={})
        roles = (".lora_down.weight", ".lora_A.weight", ".lokr_w1")
        stems.append({key.removesuffix(role) for key in load_file(path) for role in roles if key.endswith(role)})
    assert stems[0] == stems[1]
    assert stems[0]


@pytest.mark.parametrize(("family", "format"), [("zimage", "comfyui"), ("zimage", "diffusers"), ("flux2", "diffusers")])
def test_diffusers_reads_the_lokrs_that_it_knows(family: str, format: str, lora_path: Path) -> None:
    model = denoiser_of(family)
    adapter = add_adapter(model, rank=1, factor=2, targets="attn-mlp", family=family, seed=5)
    tiny.randomised(adapter)
    lora = read_lora(saved(adapter, lora_path, family, format))
    seen = read_as_diffusers(lora_path, lora)
    assert seen is not None
    assert krons(dict(seen[0])).keys() == krons(lora.state).keys()
    broken = {key: value * 2 if key.endswith("w2") else value for key, value in adapter.file_state().items()}
    with pytest.raises(ModelError, match="differs from the trained weights"):
        self_check(lora_path, broken, adapter.file_alphas(), family)


@pytest.mark.parametrize("family", ["sd3", "flux", "flux2", "zimage"])
def test_layouts_that_join_layers_are_refused_by_name(family: str, lora_path: Path) -> None:
    model = denoiser_of(family) if family in NEWER else tiny.tiny(family)
    adapter = new_lokr(model, family)
    with pytest.raises(ModelError, match=r"no LoKr fits it: `.*to_q`"):
        saved(adapter, lora_path, family, "kohya")
    assert not lora_path.exists()
    assert FAMILIES[family].lora.joins("kohya")
    assert not FAMILIES[family].lora.joins(FAMILIES[family].lora.layout)


def lycoris(**factors: Tensor) -> dict[str, Tensor]:
    return {f"lora_unet_mid_block_resnets_0_conv1.{key}": value for key, value in factors.items()}


def test_factors_that_are_products_are_multiplied_out(lora_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    w1, a, b = torch.randn(4, 2, generator=g), torch.randn(8, 3, generator=g), torch.randn(3, 16 * 9, generator=g)
    save_file(lycoris(lokr_w1=w1, lokr_w2_a=a, lokr_w2_b=b, alpha=torch.tensor(6.0)), lora_path)
    kron = krons(read_lora(lora_path).state)[WHOLE]
    expected = torch.kron(w1, a @ b).reshape(32, 32, 3, 3) * 6.0 / 3
    assert torch.allclose(kron.dense(), expected, atol=1e-5)

    left, right = torch.randn(4, 2, generator=g), torch.randn(2, 2, generator=g)
    whole = torch.randn(8, 16, 3, 3, generator=g)
    save_file(lycoris(lokr_w1_a=left, lokr_w1_b=right, lokr_w2=whole, alpha=torch.tensor(1.0)), lora_path)
    kron = krons(read_lora(lora_path).state)[WHOLE]
    expected = torch.kron((left @ right)[..., None, None], whole) * 1.0 / 2
    assert torch.allclose(kron.dense(), expected, atol=1e-5)

    core, one, two = (torch.randn(*s, generator=g) for s in ((3, 3, 3, 3), (3, 8), (3, 16)))
    save_file(lycoris(lokr_w1=w1, lokr_t2=core, lokr_w2_a=one, lokr_w2_b=two, alpha=torch.tensor(3.0)), lora_path)
    kron = krons(read_lora(lora_path).state)[WHOLE]
    tucker = torch.einsum("ijkl,ip,jr->prkl", core, one, two)
    assert torch.allclose(kron.dense(), torch.kron(w1[..., None, None], tucker.contiguous()), atol=1e-5)


def test_a_product_without_an_alpha_is_said_to_have_its_rank_for_one(lora_path: Path) -> None:
    w1, a, b = torch.ones(4, 2), torch.ones(8, 3), torch.ones(3, 16 * 9)
    save_file(lycoris(lokr_w1=w1, lokr_w2_a=a, lokr_w2_b=b), lora_path)
    lora = read_lora(lora_path)
    assert lora.notes == ("alpha is missing for 1 of its modules: taken as their rank",)
    assert torch.equal(krons(lora.state)[WHOLE].dense(), torch.full((32, 32, 3, 3), 3.0))
    save_file(lycoris(lokr_w1=w1, lokr_w2=torch.ones(8, 16, 3, 3)), lora_path)
    assert not read_lora(lora_path).notes


def test_whole_factors_have_strength_one_whatever_alpha_says(lora_path: Path) -> None:
    w1, w2 = torch.ones(4, 2), torch.ones(8, 16, 3, 3)
    save_file(lycoris(lokr_w1=w1, lokr_w2=w2, alpha=torch.tensor(float("inf"))), lora_path)  # as ai-toolkit marks it
    kron = krons(read_lora(lora_path).state)[WHOLE]
    assert torch.equal(kron.dense(), torch.ones(32, 32, 3, 3))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lycoris(lokr_w1=torch.ones(4, 2)), "only one factor"),
        (lycoris(lokr_w2_a=torch.ones(4, 2), lokr_w2_b=torch.ones(3, 4), lokr_w1=torch.ones(2, 2)), "do not fit"),
        (lycoris(lokr_w1=torch.ones(4), lokr_w2=torch.ones(4, 4)), "which is no LoKr"),
        (lycoris(lokr_w1=torch.ones(2**10, 1), lokr_w2=torch.ones(2**10, 1)), "which none is"),
        (
            lycoris(
                lokr_w1=torch.ones(2, 2), lokr_w2_a=torch.ones(2, 2), lokr_w2_b=torch.ones(2, 2),
                alpha=torch.tensor(-1.0),
            ),
            "alpha of",
        ),
        (lycoris(lokr_w1=torch.ones(2, 2), lokr_w2=torch.ones(2, 2), dora_scale=torch.ones(4)), "a DoRA"),
        (
            {
                **lycoris(lokr_w1=torch.ones(2, 2), lokr_w2=torch.ones(2, 2)),
                "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(2, 4),
            },
            "a LoRA and a LoKr at once",
        ),
        (
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(8, 8),
                "lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": torch.ones(1152, 384),
            },
            "in blocks of 1152 rows across 3 layers that are apart here, which cut through a block",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_applied_is_refused_by_name(tensors: dict[str, Tensor], words: str, lora_path: Path) -> None:
    save_file(tensors, lora_path)
    with pytest.raises(ModelError, match=words):
        read_lora(lora_path)


def test_a_lokr_of_joined_layers_is_taken_apart_where_its_blocks_allow(lora_path: Path) -> None:
    w1, w2 = torch.randn(6, 8), torch.randn(1536, 384)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(1.0)}, lora_path)
    found = krons(read_lora(lora_path).state)
    parts = [found[f"transformer.transformer_blocks.0.attn.{name}"].dense() for name in ("to_q", "to_k", "to_v")]
    assert torch.allclose(torch.cat(parts), torch.kron(w1, w2))


QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
APART = [f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]


@pytest.mark.parametrize(("a", "c"), [(4, 8), (8, 2)])
def test_one_of_products_that_a_cut_goes_through_is_a_lora_of_each_layer(a: int, c: int, tmp_path: Path) -> None:
    """FLUX.2's q, k and v in one, whose blocks of 48 or 24 rows do not fit into 64."""
    torch.manual_seed(0)
    w1, left, right = torch.randn(a, c), torch.randn(192 // a, 3), torch.randn(3, 64 // c)
    tensors = {f"{QKV}.lokr_w1": w1, f"{QKV}.lokr_w2_a": left, f"{QKV}.lokr_w2_b": right}
    save_file({**tensors, f"{QKV}.alpha": torch.tensor(6.0)}, tmp_path / "a.safetensors", FLUX2)
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.notes == ("1 of its LoKrs lie across layers that are apart here: there they are LoRAs, exactly",)
    found = names.modules(lora.state)
    assert {down.shape[0] for down, _ in found.values()} == {min(a, c) * 3}
    parts = [up @ down * lora.alphas[path] / len(down) for path, (down, up) in found.items()]
    assert list(found) == APART
    assert torch.allclose(torch.cat(parts), torch.kron(w1, left @ right) * 6.0 / 3, atol=1e-4)
    written = convert(tmp_path / "a.safetensors", "comfyui", tmp_path / "b.safetensors")
    assert written.warnings == (f"{tmp_path / 'a.safetensors'}: {lora.notes[0]}",)
    again = load_file(tmp_path / "b.safetensors")
    joined = again[f"{QKV}.lora_B.weight"] @ again[f"{QKV}.lora_A.weight"]
    assert torch.allclose(joined, torch.kron(w1, left @ right) * 6.0 / 3, atol=1e-4)


def test_a_whole_one_that_a_cut_goes_through_merges_into_the_nearest_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    w1, w2 = torch.randn(4, 4), torch.randn(48, 16) @ torch.diag(0.7 ** torch.arange(16.0))
    path = tmp_path / "a.safetensors"
    save_file({f"{QKV}.lokr_w1": w1, f"{QKV}.lokr_w2": w2}, path, FLUX2)
    with pytest.raises(ModelError, match="blocks of 48 rows across 3 layers") as refused:
        read_lora(path)
    assert "emotrain lora merge FILE --rank" in str(refused.value.hint)
    parts = torch.kron(w1, w2).chunk(3)
    lost = sum(float(torch.linalg.svdvals(part)[2:].square().sum()) for part in parts)
    best = (lost / sum(float(part.square().sum()) for part in parts)) ** 0.5
    for large in (1536, 8):  # all singular values, or the largest alone
        monkeypatch.setattr("emotrain.lora.kron.LARGE", large)
        _, merged = merge_files([(path, -0.5)], tmp_path / f"{large}.safetensors", rank=2, dtype="fp32")
        assert merged.error == pytest.approx(best, rel=1e-3)
        assert 0.05 < merged.error < 0.9
        for name, part in zip(APART, parts, strict=True):
            product = merged.state[name + names.UP] @ merged.state[name + names.DOWN]
            assert float((product + 0.5 * part).norm() / (0.5 * part).norm()) < merged.worst[1] + 1e-3


def test_halves_that_are_the_other_way_round_here_are_taken_apart_too(tmp_path: Path) -> None:
    """The last modulation of FLUX.1, shift and scale, in three blocks."""
    torch.manual_seed(0)
    stem, path = "diffusion_model.final_layer.adaLN_modulation.1", "transformer.norm_out.linear"
    w1, left, right = torch.randn(3, 2), torch.randn(64, 2), torch.randn(2, 48)
    save_file(
        {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2_a": left, f"{stem}.lokr_w2_b": right},
        tmp_path / "a.safetensors", FLUX,
    )  # fmt: skip
    down, up = names.modules(read_lora(tmp_path / "a.safetensors").state)[path]
    wanted = torch.kron(w1, left @ right)
    assert torch.allclose(up @ down, wanted.roll(96, 0), atol=1e-4)
    save_file({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": left @ right}, tmp_path / "b.safetensors", FLUX)
    with pytest.raises(ModelError, match="halves that are the other way round here"):
        read_lora(tmp_path / "b.safetensors")
    kron = krons(read_lora(tmp_path / "b.safetensors", whole=True).state)[path]
    assert torch.allclose(kron.dense(), wanted.roll(96, 0), atol=1e-4)


def test_inspect_says_that_it_is_a_lokr(lora_path: Path) -> None:
    model = tiny.tiny("sd15")
    adapter = new_lokr(model, "sd15", targets="attn")
    told = summarise(read_lora(saved(adapter, lora_path, "sd15")))
    assert (told["network"], told["ranks"], told["modules"]) == ("lokr", {}, adapter.num_modules)
    assert told["lokr_w1"] == {"4 x 4": adapter.num_modules}
    assert told["parameters"] == adapter.num_parameters
    norms = sum(kron.dense().norm() ** 2 for kron in krons(adapter.file_state()).values())
    assert told["norm"] == pytest.approx(float(norms) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_convert_keeps_every_update(family: str, tmp_path: Path) -> None:
    adapter = new_lokr(tiny.tiny(family), family)
    first = saved(adapter, tmp_path / "a.safetensors", family)
    convert(first, "diffusers", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", "kohya", tmp_path / "c.safetensors")
    assert {k: v.tolist() for k, v in load_file(tmp_path / "c.safetensors").items()} == {
        k: v.tolist() for k, v in load_file(first).items()
    }


def test_merging_gives_the_nearest_lora_and_says_its_error(tmp_path: Path) -> None:
    adapter = new_lokr(tiny.tiny("sd15"), "sd15")
    path = saved(adapter, tmp_path / "lokr.safetensors", "sd15")
    with pytest.raises(ConfigError, match="no LoRA is exactly the same"):
        merge_files([(path, 1.0)], tmp_path / "none.safetensors")
    _, merged = merge_files([(path, 0.5)], tmp_path / "lora.safetensors", rank=6, dtype="fp32")
    whole = lost = 0.0
    for name, kron in krons(read_lora(path).state).items():
        exact = 0.5 * kron.dense().flatten(1)
        values = torch.linalg.svdvals(exact)
        product = merged.state[name + names.UP].flatten(1) @ merged.state[name + names.DOWN].flatten(1)
        assert float((exact - product).norm()) == pytest.approx(
            float(values[6:].norm()), abs=1e-4 * float(exact.norm())
        )
        whole, lost = whole + float(exact.norm()) ** 2, lost + float((exact - product).norm()) ** 2
    assert merged.error == pytest.approx((lost / whole) ** 0.5, abs=1e-4)
    assert 0.05 < merged.error < 0.9
    assert read_lora(tmp_path / "lora.safetensors").is_lokr is False


def test_merging_a_lokr_with_a_lora_counts_its_error_on_the_sum(tmp_path: Path) -> None:
    first = saved(new_lokr(tiny.tiny("sd15"), "sd15", targets="attn"), tmp_path / "lokr.safetensors", "sd15")
    lora = tiny.trained("sd15", targets="attn").adapter
    second = saved(lora, tmp_path / "lora.safetensors", "sd15")
    _, merged = merge_files([(first, 1.0), (second, -2.0)], tmp_path / "both.safetensors", rank=8, dtype="fp32")
    products, pairs = krons(read_lora(first).state), names.modules(read_lora(second).state)
    whole = lost = best = 0.0
    for name, kron in products.items():
        down, up = pairs[name]
        exact = kron.dense() - 2.0 * 0.5 * up.flatten(1) @ down.flatten(1)  # alpha / rank is a half
        product = merged.state[name + names.UP].flatten(1) @ merged.state[name + names.DOWN].flatten(1)
        whole, lost = whole + float(exact.norm()) ** 2, lost + float((exact - product).norm()) ** 2
        best += float(torch.linalg.svdvals(exact)[8:].norm()) ** 2
    assert merged.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert lost < 1.02 * best  # of the nearest of all


def test_continuing_gives_the_same_model(lora_path: Path) -> None:
    model = tiny.tiny("sd15")
    adapter = new_lokr(model, "sd15")
    live = tiny.output("sd15", model)
    lora = read_lora(saved(adapter, lora_path, "sd15"))
    again = tiny.tiny("sd15")
    other = adapter_like(again, *lora.of_part("unet"), family="sd15")
    assert torch.allclose(tiny.output("sd15", again), live, atol=1e-6)
    assert {k: v.shape for k, v in other.state().items()} == {k: v.shape for k, v in adapter.state().items()}
    assert (other.factor, other.num_modules) == (4, adapter.num_modules)
    assert all(parameter.requires_grad for parameter in other.parameters())
    wider = {key: torch.cat([value, value]) if key.endswith(names.W2) else value for key, value in lora.state.items()}
    with pytest.raises(ModelError, match="the model's layer is"):
        adapter_like(tiny.tiny("sd15"), wider, lora.alphas, family="sd15")


def test_a_mixture_is_stacked_but_not_trained_on(tmp_path: Path) -> None:
    adapter = new_lokr(tiny.tiny("sd15"), "sd15", targets="attn")
    lora = tiny.trained("sd15", targets=["proj_in"]).adapter
    path = tmp_path / "both.safetensors"
    save_lora(
        path, {**adapter.file_state(), **lora.file_state()}, alphas={**adapter.file_alphas(), **lora.file_alphas()},
        family="sd15", dtype="fp32", metadata={},
    )  # fmt: skip
    file = read_lora(path)
    with pytest.raises(ModelError, match="modules are LoKr and the others LoRA"):
        file.refuse_mixture()
    assert len(stack_frozen(tiny.tiny("sd15"), [(file.state, file.alphas, 1.0)], part="unet")) == len(file.alphas)


@pytest.mark.parametrize("trained", ["lora", "lokr"])
def test_lokrs_and_loras_are_stacked_under_either(trained: str, tmp_path: Path) -> None:
    """The output is that of the base with all updates added, and only the new adapter gets gradients."""
    words: dict[str, Any] = {"targets": ["mid_block", "up_blocks"]}
    first = read_lora(saved(new_lokr(tiny.tiny("sd15"), "sd15", **words), tmp_path / "a.safetensors", "sd15"))
    second = read_lora(saved(tiny.trained("sd15", **words).adapter, tmp_path / "b.safetensors", "sd15"))
    model = tiny.tiny("sd15")
    stack = [(first.state, first.alphas, 0.5), (second.state, second.alphas, 1.0), (first.state, first.alphas, -0.2)]
    assert len(stack_frozen(model, stack, part="unet")) == len(first.alphas)
    under = tiny.output("sd15", model)
    dense = {path.removeprefix("unet."): kron.dense() for path, kron in krons(first.state).items()}
    expected = patched(tiny.tiny("sd15"), dense, 0.3)
    stack_frozen(expected, [(second.state, second.alphas, 1.0)], part="unet")
    assert torch.allclose(under, tiny.output("sd15", expected), atol=1e-5)
    adapter = add_adapter(model, rank=2, factor=4 if trained == "lokr" else None, family="sd15", seed=0, **words)
    assert torch.allclose(tiny.output("sd15", model), under, atol=1e-6)
    tiny.randomised(adapter)
    assert (tiny.output("sd15", model) - under).abs().max() > 1e-3
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    with pytest.raises(ValueError, match="already"):
        stack_frozen(model, stack, part="unet")


@pytest.mark.parametrize("trained", ["lora", "lokr"])
def test_a_stack_goes_on_under_the_half_precision_forward(trained: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"targets": ["mid_block", "up_blocks"]}
    first = read_lora(saved(new_lokr(tiny.tiny("sd15"), "sd15", **words), tmp_path / "a.safetensors", "sd15"))
    second = read_lora(saved(tiny.trained("sd15", **words).adapter, tmp_path / "b.safetensors", "sd15"))
    stack = [(first.state, first.alphas, 1.0), (second.state, second.alphas, 1.0)]
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.tiny("sd15").to(dtype)
        stack_frozen(model, stack, part="unet")
        factor = 4 if trained == "lokr" else None
        adapter = add_adapter(model, rank=2, factor=factor, family="sd15", seed=0, **words)
        tiny.randomised(adapter, size=0.1)
        adapter.use_half_precision(dtype)
        g = torch.Generator().manual_seed(7)
        x, text = torch.randn(1, 4, 8, 8, generator=g).to(dtype), torch.randn(1, 5, 24, generator=g).to(dtype)
        with torch.no_grad():
            answers.append(model(x, 10, text).sample.float())
            with adapter.off():
                answers.append(model(x, 10, text).sample.float())
    for exact, low in zip(answers[:2], answers[2:], strict=True):
        assert float((low - exact).norm() / exact.norm()) < 0.03
    assert float((answers[0] - answers[1]).norm() / answers[1].norm()) > 0.05


class Net(nn.Module):
    """Two linear layers and a convolution; the second input asks for no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.conv = nn.Linear(24, 32), nn.Linear(32, 16, bias=False), nn.Conv2d(4, 8, 3, 2, 1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).float().sum(-1).mean() + self.conv(image).float().pow(2).mean()


def made(dtype: torch.dtype, *, half: bool) -> tuple[Net, LokrAdapter]:
    torch.manual_seed(0)
    net = Net().requires_grad_(False).to(dtype)
    g = torch.Generator().manual_seed(1)
    shapes = {"first": ((4, 3), (8, 8)), "second": ((2, 4), (8, 8)), "conv": ((2, 2), (4, 2, 3, 3))}
    factors = {
        path: Kron(*(0.3 * torch.randn(s, generator=g) for s in both))
        for path, both in shapes.items()
    }  # fmt: skip
    lokrs = attach(dict(net.named_children()), factors, "default", trained=True)
    adapter = LokrAdapter(lokrs, factor=4, name="default", part="unet", family="sd15", models=[(net, lokrs)])
    if half:
        adapter._halves = [HalfLokr(net, lokrs, dtype)]
    return net, adapter


def step(net: Net, adapter: LokrAdapter, dtype: torch.dtype, *, again: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    x, image = torch.randn(3, 5, 24, generator=g).to(dtype), torch.randn(2, 4, 6, 6, generator=g).to(dtype)
    for _ in range(2):  # two micro-batches
        loss = checkpoint(net, x, image, use_reentrant=False) if again else net(x, image)
        loss.backward()
        adapter.collect_gradients()
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("again", [False, True])
def test_the_half_precision_product_has_the_gradients_of_autograd(again: bool) -> None:
    plain, half = made(torch.float32, half=False), made(torch.float32, half=True)
    expected, found = step(*plain, torch.float32), step(*half, torch.float32, again=again)
    assert expected.keys() == found.keys()
    assert len(expected) == 6
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_bfloat16_gradients_are_float32s_within_its_rounding() -> None:
    expected = step(*made(torch.float32, half=False), torch.float32)
    net, adapter = made(torch.bfloat16, half=True)
    for name, gradient in step(net, adapter, torch.bfloat16).items():
        assert gradient.dtype == torch.float32
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 0.03, name
    assert len(adapter.gradients()) == 3  # one buffer for both linear layers, and the convolution's two
    assert net.first.weight.dtype == torch.bfloat16


def test_convolutions_alone_train_in_half_precision_lora_and_lokr_alike() -> None:
    for factor in (None, 4):
        model = tiny.tiny("sd15").to(torch.bfloat16)
        adapter = add_adapter(model, rank=2, factor=factor, targets=["conv1"], family="sd15", seed=0)
        adapter.use_half_precision(torch.bfloat16)
        text, x = torch.randn(1, 5, 24, dtype=torch.bfloat16), torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
        model(x, 10, text).sample.float().pow(2).mean().backward()
        adapter.collect_gradients()
        assert any(float(gradient.abs().max()) > 0 for gradient in adapter.gradients() if gradient.numel())


def test_a_lokr_stays_on_layers_that_are_quantised() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(320, 512, bias=False)).requires_grad_(False)
    lokr = attach({"0": net[0]}, {"0": Kron(torch.randn(4, 4), torch.randn(128, 80))}, "default", trained=True)["0"]
    x = torch.randn(3, 320)
    expected = net(x).detach()
    assert quantize_linears(net, "fp8", torch.device("cpu")) == 1
    assert type(net[0]) is not nn.Linear
    assert float((net(x).detach() - expected).norm() / expected.norm()) < 0.05
    lokr.active = False
    assert float((net(x) - expected).norm() / expected.norm()) > 0.5
    assert any(p is lokr.w1.weight for p in net.parameters())


@pytest.mark.parametrize("projected", [False, True])
def test_text_encoders_take_part(projected: bool, lora_path: Path) -> None:
    model, clip = tiny.tiny("sd15"), tiny.clip(projected=projected)
    both = join(
        new_lokr(model, "sd15", targets="attn"), [new_lokr(clip, "sd15", part="text_encoder", targets="attn-mlp")]
    )
    assert isinstance(both, LokrAdapter)
    lora = read_lora(saved(both, lora_path, "sd15"))
    assert set(lora.parts) == {"unet", "text_encoder"}
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lokr_w1" in load_file(lora_path)
    before = both.state()
    both.load_state(lora.state)
    assert all(torch.equal(value, before[key]) for key, value in both.state().items())


def test_small_factors_survive_float16(lora_path: Path) -> None:
    adapter = new_lokr(tiny.tiny("sd15"), "sd15", targets="attn")
    state = {key: value * 1e-6 if key.endswith(names.W2) else value for key, value in adapter.file_state().items()}
    save_lora(lora_path, state, alphas=adapter.file_alphas(), family="sd15", dtype="fp16", metadata={})
    self_check(lora_path, state, adapter.file_alphas(), "sd15")


@pytest.mark.parametrize(
    ("features", "factor", "expected"),
    [(1280, 8, (8, 160)), (1280, 1280, (32, 40)), (64, 16, (8, 8)), (36, 8, (6, 6)), (7, 8, (1, 7)), (9, 1, (1, 9))],
)  # fmt: skip
def test_the_small_factor_is_the_largest_divisor_up_to_the_factor(
    features: int, factor: int, expected: tuple[int, int]
) -> None:
    assert sizes(features, factor) == expected


def test_distance_is_that_of_the_dense_updates() -> None:
    one, two = Kron(torch.randn(3, 4), torch.randn(5, 2)), Kron(torch.randn(3, 4), torch.randn(5, 2))
    assert one.distance(two) == pytest.approx(float((one.dense() - two.dense()).norm()), rel=1e-5)
    assert one.distance(Kron(one.w1 * 8, one.w2 / 8)) == pytest.approx(0.0, abs=1e-6)
    assert one.distance(Kron(torch.randn(5, 4), torch.randn(3, 2))) == float("inf")
