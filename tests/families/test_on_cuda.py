"""What a model on a GPU asks of torch; no GPU is needed to see it asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from emotrain.config.load import load_preset
from emotrain.families.common import Parts
from emotrain.families.loading import load_family
from emotrain.families.memory import MemoryPlan
from emotrain.lora.adapter import add_adapter
from emotrain.runs.build import build_graphs
from emotrain.train.events import Event, Notice


@pytest.fixture
def cudnn_attention() -> Iterator[None]:
    """As torch sets it."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_cudnn_attention_is_off_on_a_gpu_and_left_alone_elsewhere(flux_folder: Path, cudnn_attention: None) -> None:
    family = load_family(str(flux_folder), dtype="fp32", device="cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    family.vae_encoder = None
    known = {field.name: getattr(family, field.name) for field in fields(Parts) if hasattr(family, field.name)}
    type(family)(Parts(**{**known, "device": torch.device("cuda")}))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"device": torch.device("cpu")}, "this run is on the cpu"),
        ({"trained_encoders": {"text_encoder"}}, "text encoders are trained"),
        ({"memory": MemoryPlan("none", True, True, 0.0, None, "")}, "blocks wait in the computer's memory"),
        ({"memory": MemoryPlan("int8", True, False, 0.0, None, "")}, None),
        ({"targets": "all"}, None),
    ],
)
def test_passes_are_recorded_where_they_can_be_and_else_it_is_said_why(
    sd_folder: Path, change: dict[str, object], why: str | None
) -> None:
    family = load_family(str(sd_folder), dtype="bf16", device="cpu")
    adapter = add_adapter(family.denoiser, rank=2, targets=change.pop("targets", "attn"), family="sd15", seed=0)  # type: ignore[arg-type]
    adapter.use_half_precision(torch.bfloat16)
    there = SimpleNamespace(**{"device": torch.device("cuda"), "trained_encoders": set(), "memory": None, **change})
    said: list[Event] = []
    preset = load_preset("quickstart", ["train.cuda_graphs=true"])
    graphs = build_graphs(preset, there, adapter, said.append)  # type: ignore[arg-type]
    assert (graphs is None) == (why is not None)
    texts = [event.message for event in said if isinstance(event, Notice)]
    assert texts == ([] if why is None else [f"steps are not recorded as CUDA graphs: {why}"])
    assert build_graphs(load_preset("quickstart"), there, adapter, said.append) is None  # type: ignore[arg-type]
