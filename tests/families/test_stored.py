"""A base in scaled fp8: kept so from the plan to the LoRA, in half the memory, away between turns too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from newer_models import pipeline_of, separate_files
from original_files import in_scaled_fp8
from safetensors.torch import load_file, save_file

from emotrain.batch import Conditioning
from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.families import quantize
from emotrain.families.loading import load_family
from emotrain.families.memory import Needs, choose_memory
from emotrain.families.offload import offload_blocks
from emotrain.families.quantize import RoundedLinear
from emotrain.families.registry import FAMILIES
from emotrain.lora.file import read_lora
from emotrain.runs.plan import make_plan

PRESET = """
model: {{base: {denoiser}, vae: {vae}, text_encoder: {text_encoder}, tokenizer: {tokenizer}, dtype: bf16}}
dataset: {{trigger: rkt, resolution: 64, buckets: {{step: 64, min: 64}}, folders: [{{path: "builtin:example"}}]}}
network: {{rank: 2}}
train: {{max_steps: 2, loss: {{baseline: raw}}}}
sample: {{every: 0}}
stop: {{mode: "off"}}
validate: {{every: 9, probe_images: 1, fraction: 0.0}}
"""


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a small Qwen-Image in scaled fp8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize, "SMALLEST", 32)
    files = separate_files("qwen", pipeline_of("qwen"), tmp_path / "comfy")
    save_file(in_scaled_fp8(load_file(files["denoiser"]))[0], files["denoiser"])
    path = tmp_path / "p.yaml"
    path.write_text(PRESET.format(**files))
    return path


@pytest.mark.slow
def test_a_lora_trains_on_it_in_the_memory_that_plan_says(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "p.yaml"]) == 0
    assert main(["run", "p.yaml", "--plain"]) == 0
    assert "layers of the base stay as its file stores them, " in capsys.readouterr().err
    state = read_lora(tmp_path / "runs" / "p" / "lora-last.safetensors").state
    ups = [bool(value.any()) for key, value in state.items() if "lora_B" in key]
    assert sum(ups) > 0.8 * len(ups) > 10  # the last block's captions lead nowhere
    plan = make_plan(load_preset("p.yaml"))
    words = {name: getattr(load_preset("p.yaml").model, name) for name in ("vae", "text_encoder", "tokenizer")}
    model = load_family(str(tmp_path / "comfy" / "denoiser.safetensors"), device="cpu", dtype="bf16", **words).denoiser
    held = sum(weight.nbytes for weight in model.parameters())
    assert dict(plan.parts)["frozen base, in 8 bits as its file has it"] == pytest.approx(held / 2**30)
    wide = make_plan(load_preset("p.yaml", ["model.quantize=int8"]))
    assert dict(wide.parts)["frozen base"] > dict(plan.parts)["frozen base, in 8 bits as its file has it"] * 0.5


def test_a_weight_that_is_no_number_is_refused(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "comfy" / "denoiser.safetensors"
    tensors = load_file(path)
    name = next(key for key, value in tensors.items() if value.dtype == torch.float8_e4m3fn and min(value.shape) > 32)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, path)
    assert main(["run", "p.yaml", "--plain"]) == 4
    assert "not finite" in capsys.readouterr().err


def test_its_layers_may_wait_in_the_computers_memory(preset: Path, tmp_path: Path) -> None:
    words = {name: getattr(load_preset("p.yaml").model, name) for name in ("vae", "text_encoder", "tokenizer")}
    family = load_family(str(tmp_path / "comfy" / "denoiser.safetensors"), device="cpu", dtype="bf16", **words)
    text = family.encode_texts(["a pear"])
    sizes = Conditioning(*[torch.zeros(1, 2, dtype=torch.int64)] * 3)
    inputs: Any = (torch.randn(1, 4, 8, 8), torch.tensor([500.0]), text, sizes)
    expected = family.predict(*inputs)
    moving = offload_blocks(family.denoiser, torch.device("cpu"), FAMILIES["qwen"].blocks)
    assert moving is not None
    assert torch.equal(family.predict(*inputs), expected)
    stored = {id(layer) for layer in family.denoiser.modules() if isinstance(layer, RoundedLinear)}
    assert any(id(module) in stored for home in moving.homes for module, _ in home.places)


def test_twelve_gigabytes_of_fp8_fit_where_24_of_bf16_do_not() -> None:
    """FLUX.1's 11.9 billion parameters; int8 is no way to save, for it is 8 bits already."""
    needs = Needs(11_900_000_000, 2, (40.0, 2.0), trained=0.8, resident=4.0)
    stored = Needs(11_900_000_000, 2, (40.0, 2.0), trained=0.8, resident=4.0, stored=11_800_000_000)
    backends = frozenset(("nf4",))
    assert choose_memory(stored, free_gib=16.0, backends=backends).quantize == "none"
    assert choose_memory(stored, free_gib=16.0, backends=backends).needed_gib < 15.0
    assert choose_memory(needs, free_gib=16.0, backends=backends).quantize == "int8"
    assert choose_memory(stored, free_gib=12.0, backends=backends).quantize == "nf4"
    assert choose_memory(stored, free_gib=16.0, quantize="nf4").quantize == "nf4"
