"""Memory counted on the meta device: against real tensors, and at the models' real size."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import make_assets as maker
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from emotrain.config.load import load_preset
from emotrain.families.registry import FAMILIES, configs
from emotrain.families.sniff_file import public_model
from emotrain.lora.adapter import add_adapter
from emotrain.lora.targets import select
from emotrain.runs import activation_memory
from emotrain.runs.activation_memory import build_on_meta, count_saved, measure
from emotrain.runs.plan_memory import Memory

WORDS: dict[str, Any] = {"rank": 4, "alpha": 4, "targets": "attn-mlp"}
VARIANTS = [(family, name) for family, info in FAMILIES.items() for name in info.variants]


def test_the_count_on_meta_is_that_of_real_tensors() -> None:
    unet = maker.build_unet().requires_grad_(False)
    counted = measure("sd15", dict(unet.config), latents=(2, 8, 16, 16), num_tokens=32, low=None, adapter_kwargs=WORDS)
    add_adapter(unet, family="sd15", seed=0, **WORDS)
    noisy, text = torch.randn(2, 8, 16, 16), torch.randn(2, 32, 128)
    times = torch.tensor([10, 500])
    real, *_ = count_saved(unet, lambda: unet(noisy, times, text).sample)
    assert counted.saved == pytest.approx(real, rel=0.05)


def test_one_pass_counts_what_stays_where_blocks_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = maker.build_unet().requires_grad_(False)
    add_adapter(unet, family="sd15", seed=0, **WORDS)
    words = (torch.randn(2, 8, 16, 16), torch.tensor([10, 500]), torch.randn(2, 32, 128))
    passes: list[Any] = []
    unet.register_forward_hook(lambda *_: passes.append(None))
    whole, stays, block = count_saved(unet, lambda: unet(*words).sample)
    assert len(passes) == 1
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    monkeypatch.setattr(activation_memory._Count, "block", lambda self, *words: again(*words))
    assert count_saved(unet, lambda: unet(*words).sample) == (stays, stays, 0)
    assert stays + block < 0.9 * whole
    passes.clear()
    monkeypatch.setattr(activation_memory, "_forward", lambda *_, **__: lambda: passes.append(None))
    measure("sd15", dict(unet.config), latents=(2, 8, 16, 16), num_tokens=32, low=None, adapter_kwargs=WORDS)
    assert len(passes) == 2  # with gradients and without


def test_sd3_s_table_of_places_counts_beside_its_parameters() -> None:
    """0.42 GiB of SD3.5 medium in bf16, which loads it so."""
    config = {**configs("sd3")["denoiser"]["sd35-medium"], "num_layers": 1, "dual_attention_layers": ()}
    words: Any = {"num_tokens": 24, "low": torch.bfloat16, "adapter_kwargs": WORDS}
    counted = measure("sd3", config, latents=(1, 16, 8, 8), **words)
    assert counted.tables * 2 / 2**30 == pytest.approx(0.42, abs=0.01)
    found = public_model("stabilityai/stable-diffusion-3.5-medium")
    assert found is not None
    memory = Memory(load_preset("quickstart"), found, counted, torch.bfloat16, None)
    plan = memory.choose()
    memory.kept = replace(counted, tables=0)
    assert dict(plan.stages)["train"] - dict(memory.choose().stages)["train"] == pytest.approx(0.42, abs=0.01)
    memory.kept = counted
    assert dict(plan.stages)["train"] == pytest.approx(sum(gib for _, gib in memory.parts(plan)))


def test_memory_grows_with_the_batch_and_halves_with_half_the_precision() -> None:
    config = dict(maker.build_flux().config) | {"num_layers": 1, "num_single_layers": 1}

    def saved(batch: int, low: torch.dtype | None) -> int:
        words: Any = {"num_tokens": 24, "low": low, "adapter_kwargs": WORDS}
        return measure("flux", config, latents=(batch, 8, 32, 32), **words).saved

    one = saved(1, None)
    assert saved(2, None) == pytest.approx(2 * one, rel=0.02)
    assert saved(1, torch.bfloat16) < 0.8 * one


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_parameters_and_modules_at_real_size_are_the_tables(family: str, variant: str) -> None:
    known = FAMILIES[family].variants[variant]
    model = build_on_meta(family, configs(family)["denoiser"][variant], torch.float32)
    assert sum(p.numel() for p in model.parameters()) == known.parameters
    for targets, count in known.modules.items():
        assert len(select(model, targets, family)) == count
