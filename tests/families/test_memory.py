"""Choosing means to fit, and layers that are away while they are not needed."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from emotrain.errors import ConfigError
from emotrain.families import memory
from emotrain.families.fitting import _NoNumbers as on_meta
from emotrain.families.flux.spec import FLUX as FLUX_FAMILY
from emotrain.families.memory import EncoderNeeds, Needs, choose_memory, installed_backends, require_backend
from emotrain.families.offload import offload_blocks
from emotrain.families.tiles import in_tiles, starts

ENCODERS = (EncoderNeeds("t5", 9 * 2**29, 9 * 2**29), EncoderNeeds("clip", 2**27))  # 9 GiB and a quarter
FLUX = Needs(
    11_901_408_320, 2, (38.0, 2.6), trained=0.5, encoders=ENCODERS, encode=(2.5, 0.63), decode=(3.0, 0.75),
    sample=1.0, resident=1.5,
)  # fmt: skip


def test_nothing_is_done_where_everything_fits() -> None:
    plan = choose_memory(FLUX, free_gib=80.0)
    assert (plan.quantize, plan.gradient_checkpointing, plan.offload) == ("none", False, False)
    assert plan.fits


@pytest.mark.parametrize(
    ("free", "backends", "expected"),
    [
        (40.0, frozenset(), ("none", True, False)),
        (24.0, frozenset({"nf4"}), ("int8", True, False)),
        (24.0, frozenset(), ("int8", True, False)),
        (12.0, frozenset({"nf4"}), ("nf4", True, False)),
        (12.0, frozenset(), ("none", True, True)),
    ],
)
def test_means_come_in_one_after_the_other(free: float, backends: Any, expected: Any) -> None:
    plan = choose_memory(FLUX, free_gib=free, backends=backends)
    assert (plan.quantize, plan.gradient_checkpointing, plan.offload) == expected
    assert plan.fits


def test_the_sentence_says_what_was_chosen() -> None:
    plan = choose_memory(FLUX, memory="12gb", backends=frozenset({"nf4"}))
    assert plan.sentence.startswith("memory: the base in nf4, gradient checkpointing, captions encoded in int8; about ")
    assert plan.sentence.endswith("of 11.4 GiB")
    small = choose_memory(FLUX, free_gib=3.0)
    assert "which is more than the 3.0 GiB" in small.sentence
    assert not small.fits


def test_what_the_preset_sets_is_kept() -> None:
    plan = choose_memory(
        FLUX, free_gib=12.0, quantize="int8", gradient_checkpointing=False,
        backends=frozenset({"nf4"}),
    )  # fmt: skip
    assert (plan.quantize, plan.gradient_checkpointing) == ("int8", False)
    assert not plan.fits


def test_a_smaller_budget_never_needs_more() -> None:
    sizes = [choose_memory(FLUX, free_gib=gib, backends=frozenset({"nf4"})) for gib in range(2, 90)]
    needed = [plan.needed_gib for plan in sizes]
    assert all(one <= two for one, two in itertools.pairwise(needed))


def test_every_stage_has_its_peak_and_the_largest_is_what_is_needed() -> None:
    plan = choose_memory(FLUX, free_gib=80.0)
    stages = dict(plan.stages)
    assert list(stages) == ["encode", "train", "validate", "sample", "save"]
    assert plan.needed_gib == max(stages.values()) == stages["train"]
    passes = plan.pictures_at_once * 2.5
    assert plan.pictures_at_once > 1
    assert stages["encode"] == pytest.approx(0.6 + 0.19 + 0.13 + passes + 9.25)  # no denoiser beside the encoders
    assert stages["sample"] - stages["save"] == pytest.approx(3.0 * 1.08)
    assert not plan.tile_encode
    assert not plan.tile_decode


def test_where_room_is_short_the_vae_works_in_tiles_and_a_large_text_encoder_in_fewer_bits_or_on_the_cpu() -> None:
    plan = choose_memory(FLUX, free_gib=10.4, backends=frozenset({"nf4"}))
    stages = dict(plan.stages)
    assert (plan.quantize, plan.tile_decode, plan.tile_encode, plan.fits) == ("nf4", True, False, True)
    assert stages["encode"] == pytest.approx(0.6 + 0.19 + 0.13 + 2.5 + 0.25 + 4.5 * 1.03)
    assert dict(plan.encoders) == {"clip": "none", "t5": "int8"}
    assert "the VAE in tiles" in plan.sentence
    tight = choose_memory(FLUX, free_gib=3.0, backends=frozenset({"nf4"}))
    assert tight.tile_encode
    assert dict(tight.stages)["encode"] <= 3.0
    assert dict(tight.encoders) == {"clip": "none", "t5": "cpu"}


def test_the_vae_works_in_tiles_before_a_text_encoder_goes_to_the_cpu() -> None:
    plan = choose_memory(FLUX, free_gib=6.5)
    assert (plan.tile_encode, dict(plan.encoders)["t5"]) == (True, "int8")
    assert dict(plan.stages)["encode"] <= 6.5
    for free, expected in ((8.5, (False, "int8")), (7.0, (True, "int8")), (5.0, (True, "nf4"))):
        plan = choose_memory(FLUX, free_gib=free, backends=frozenset({"nf4"}))
        assert (plan.tile_encode, dict(plan.encoders)["t5"]) == expected


def test_what_leaves_with_the_encoders_is_room_for_blocks_that_stay() -> None:
    """T5 and the VAE's pass have gone when the denoiser comes; a tenth of what it needs stays free."""
    plan = choose_memory(FLUX, free_gib=12.0)
    stages = dict(plan.stages)
    later = max(gib for name, gib in stages.items() if name != "encode")
    assert plan.offload
    assert stages["encode"] > later + 2.0
    assert plan.spare_gib == pytest.approx(12.0 - 1.1 * later)
    assert choose_memory(FLUX).spare_gib == choose_memory(FLUX, free_gib=3.0).spare_gib == 0.0


def test_without_gradient_checkpointing_nothing_is_offloaded_since_the_backward_pass_would_hold_it_all() -> None:
    plan = choose_memory(FLUX, free_gib=12.0, gradient_checkpointing=False)
    assert (plan.offload, plan.gradient_checkpointing, plan.fits) == (False, False, False)


@pytest.mark.parametrize("name", ["sdxl", "flux2", "qwen", "qwen21"])
def test_what_a_vae_holds_is_what_is_counted(name: str) -> None:
    """One family of each class of VAE, at its public size, by its own methods."""
    import diffusers

    from emotrain.families.common import Parts
    from emotrain.families.loading import family_class
    from emotrain.families.registry import FAMILIES, configs
    from emotrain.runs.activation_memory import count_living

    assert {spec.vae_class for spec in FAMILIES.values()} == set(memory.VAES)
    spec, config, size = FAMILIES[name], configs(name)["vae"], 256
    counted = memory.VAES[spec.vae_class]
    with torch.device("meta"):
        vae = getattr(diffusers, spec.vae_class).from_config(config)
    scheduler: Any = SimpleNamespace(config={})
    parts = Parts(name, "", "flow", nn.Module(), vae, [], scheduler, torch.device("meta"), torch.float32)
    family = family_class(name)(parts)

    def held() -> float:
        return sum(p.numel() for p in vae.parameters()) * 4 / memory.GIB

    whole = held()
    pixels = torch.empty(1, 3, size, size, device="meta")
    one_map = 4 * (config.get("base_dim") or config["block_out_channels"][0]) * size**2
    with on_meta():
        latents = family.encode_images(pixels).to("meta")
        encoding = count_living(vae, lambda: family.encode_images(pixels))
        family._identities = {"vae": "", "text": ""}
        family.free_encoders()
        decoding = count_living(vae, lambda: family.decode_latents(latents))
    assert held() == pytest.approx(counted.decoder, abs=0.01)
    assert whole - held() == pytest.approx(counted.encoder, abs=0.01)
    assert encoding == pytest.approx(counted.encode_maps * one_map, rel=0.03)
    assert decoding == pytest.approx(counted.decode_maps * one_map, rel=0.03)


@pytest.mark.parametrize("kind", ["qwen", "qwen21"])
def test_a_vae_of_films_gives_the_same_picture_without_room_for_the_next_frame(kind: str) -> None:
    from newer_models import vae_of

    from emotrain.families.qwen_vae import keep_no_frames

    vae, channels = vae_of(kind), 4 if kind == "qwen21" else 3
    pixels = torch.randn(2, channels, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        picture = vae.decode(latents).sample
        keep_no_frames(vae)
        assert torch.equal(vae.encode(pixels).latent_dist.mean, latents)
        vae.encoder = None
        assert torch.equal(vae.decode(latents).sample, picture)


def test_tiles_are_of_one_size_and_evenly_spread() -> None:
    assert starts(512, 512, 8) == [0]
    assert starts(520, 512, 8) == [0, 8]
    assert starts(832, 512, 8) == [0, 320]  # diffusers' would be 0, 384, 768: the last one is 64 wide
    assert starts(1152, 512, 8) == [0, 320, 640]
    for length in range(513, 2000, 31):
        found = starts(length, 512, 1)
        assert (found[0], found[-1]) == (0, length - 512)
        assert all(0 < after - before <= 385 for before, after in itertools.pairwise(found))


@pytest.mark.parametrize(("height", "width"), [(48, 40), (41, 33), (32, 70), (32, 32), (8, 90)])
def test_tiles_of_what_needs_no_neighbours_are_the_whole(height: int, width: int) -> None:
    whole = torch.randn(2, 3, height * 4, width * 4, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Size] = []

    def smaller(piece: torch.Tensor) -> torch.Tensor:
        seen.append(piece.shape[-2:])
        return nn.functional.avg_pool2d(piece, 4) - 1.0

    assert torch.allclose(in_tiles(smaller, whole, 128, 4), smaller(whole), atol=1e-6)
    assert set(seen[:-1]) == {(min(height * 4, 128), min(width * 4, 128))}
    larger = nn.Upsample(scale_factor=3)
    assert torch.allclose(in_tiles(larger, whole, 128), larger(whole), atol=1e-6)


def test_a_vae_in_tiles_gives_nearly_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at its edge, where diffusers' tiles end in a strip, whose latents would be off by 0.07."""
    from emotrain.families import common
    from emotrain.families.loading import load_family
    from emotrain.families.table import ASSETS

    monkeypatch.setattr(common, "TILE", 128)
    family = load_family("builtin:tiny-sd", device="cpu")
    picture = Image.open(ASSETS / "example" / "rose.png").convert("RGB").resize((304, 208))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = family.encode_images(pixels)
    plain = family.decode_latents(latents)

    def off(found: torch.Tensor, whole: torch.Tensor) -> float:
        assert found.shape == whole.shape
        return float((found - whole).square().mean().sqrt() / whole.std())

    family.vae_in_tiles = True
    tiled = family.encode_images(pixels)
    assert 0.0 < off(tiled, latents) < 0.05
    assert off(tiled[..., -8:], latents[..., -8:]) < 0.035
    assert 0.0 < off(family.decode_latents(latents), plain) < 0.03


def test_unknown_sizes_and_absent_libraries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="model.memory"):
        choose_memory(FLUX, memory="9gb")
    monkeypatch.setattr(memory, "is_installed", lambda module: False)
    assert installed_backends() == frozenset()
    require_backend("fp8")
    with pytest.raises(ConfigError) as refused:
        require_backend("nf4")
    assert "emotrain[quantize]" in str(refused.value.hint)


@pytest.mark.parametrize("library", [SimpleNamespace(compiled_with_cuda=False), SimpleNamespace(), None])
def test_a_library_that_does_not_know_the_gpu_is_not_chosen_and_refused_with_the_way_out(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bitsandbytes is where it is built for another CUDA: it would fail at its first layer."""
    monkeypatch.setattr(memory, "is_installed", lambda module: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    found = None if library is None else SimpleNamespace(lib=library)
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert installed_backends() == {"nf4"}  # on the CPU it works
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert installed_backends() == frozenset()
    with pytest.raises(
        ConfigError, match="which needs `bitsandbytes`, which is installed without what this GPU needs"
    ) as refused:
        require_backend("nf4")
    assert str(refused.value.hint).startswith("`python -m bitsandbytes` says why")
    if found is not None:
        library.compiled_with_cuda = True
        assert installed_backends() == {"nf4"}


class Block(nn.Module):
    """Two Linear layers with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.norm(self.one(x))))


class Stack(nn.Module):
    """Blocks between two layers that are not in any, in another order than that of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.checkpointed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in reversed(self.blocks):
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return self.last(x)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_offloaded_blocks_give_the_same_gradients_though_their_weights_went_home(checkpointed: bool) -> None:
    """What is at home is spoilt before the backward pass where nothing is computed again: it must not be used there."""
    torch.manual_seed(0)
    plain = Stack().requires_grad_(False)
    moved = Stack().requires_grad_(False)
    moved.load_state_dict(plain.state_dict())
    plain.checkpointed = moved.checkpointed = checkpointed
    moving = offload_blocks(moved, torch.device("cpu"), ["Block"])
    assert moving is not None
    x = torch.randn(3, 5, 4)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = plain(one)
    expected.square().sum().backward()
    output = moved(two)
    assert torch.equal(output, expected)
    if not checkpointed:
        for home in moving.homes:
            home.packed.fill_(255)
    output.square().sum().backward()
    assert torch.equal(one.grad, two.grad)
    assert moved.blocks[0].one.weight.data_ptr() == moving.homes[0].parameters[0].data_ptr()


def test_every_block_is_sent_for_before_its_turn_and_the_last_one_stays_for_the_way_back() -> None:
    stack = Stack().requires_grad_(False)
    moving = offload_blocks(stack, torch.device("cpu"), ["Block"])
    assert moving is not None
    ready: list[bool] = []
    come = moving._come

    def watched(index: int) -> None:
        ready.append(index in moving.there)
        come(index)

    moving._come = watched  # type: ignore[method-assign]
    x = torch.randn(2, 4, requires_grad=True)
    for _ in range(2):
        ready.clear()
        before = moving.copies
        stack(x).sum().backward()
    assert moving.order == [3, 2, 1, 0]
    assert ready == [True] * 8  # forwards, and once more each on the way back
    assert moving.copies - before == 5  # where the pass turns round, what is next has not left yet


def test_blocks_stay_where_there_is_room_and_only_frozen_weights_of_the_base_move() -> None:
    stack = Stack().requires_grad_(False)
    assert offload_blocks(stack, torch.device("cpu"), ["Block"], room_gib=1.0) is None
    size = sum(p.numel() * 4 for p in stack.blocks[0].parameters())
    moving = offload_blocks(stack, torch.device("cpu"), ["Block"], room_gib=2.5 * size / 2**30)
    assert moving is not None
    assert len(moving.homes) == 2
    one = Stack().requires_grad_(False)
    one.blocks[1].one.weight.requires_grad_()
    one.blocks[1].lora_A = nn.ModuleDict({"stack": nn.Linear(4, 2).requires_grad_(False)})
    moving = offload_blocks(one, torch.device("cpu"), ["Block"])
    assert moving is not None
    assert [len(home.places) for home in moving.homes] == [5, 4, 5, 5]


def test_group_offloading_of_diffusers_takes_weights_home_before_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why offload.py exists: the backward pass finds what is at home, which is spoilt here as another device spoils it.

    If this fails, diffusers keeps weights until they are used, and its group offloading may replace ours.
    """
    from diffusers.hooks import group_offloading

    class Spoilt(group_offloading.ModuleGroup):  # type: ignore[misc]
        def onload_(self) -> None:
            for parameter, value in getattr(self, "kept", {}).items():
                parameter.data = value
            super().onload_()

        def offload_(self) -> None:
            super().offload_()
            held = [p for module in self.modules for p in module.parameters()] + list(self.parameters)
            self.kept = {p: p.data for p in held if not p.requires_grad}
            for parameter in self.kept:
                parameter.data = torch.full_like(parameter.data, float("nan"))

    monkeypatch.setattr(group_offloading, "ModuleGroup", Spoilt)
    device = torch.device("cpu")
    expected = flux_gradients(lambda model: None)
    theirs = flux_gradients(
        lambda model: group_offloading.apply_group_offloading(model, device, device, offload_type="leaf_level")
    )
    ours = flux_gradients(lambda model: offload_blocks(model, device, FLUX_FAMILY.blocks))
    assert all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))
    assert any(not gradient.isfinite().all() for gradient in theirs)


def flux_gradients(prepare: Any) -> list[torch.Tensor]:
    """Of a small FLUX's LoRA, with gradient checkpointing, after `prepare` has had the model."""
    import make_assets as maker

    from emotrain.lora.adapter import add_adapter

    torch.manual_seed(0)
    model = maker.build_flux().requires_grad_(False)
    model.enable_gradient_checkpointing()
    prepare(model)
    adapter = add_adapter(model, rank=2, targets="attn", family="flux", seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    config = model.config
    generator = torch.Generator().manual_seed(1)
    output = model(
        hidden_states=torch.randn(1, 16, config.in_channels, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, config.joint_attention_dim, generator=generator),
        pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=generator),
        timestep=torch.tensor([0.5]), guidance=torch.tensor([3.5]) if config.guidance_embeds else None,
        img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3),
    ).sample  # fmt: skip
    output.square().sum().backward()
    return [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
