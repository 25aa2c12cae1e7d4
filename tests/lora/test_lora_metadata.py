"""The header: what the readers look for, strings only, nothing of the machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save
from tiny_models import weights

from emotrain.lora.file import read_lora, save_lora
from emotrain.lora.metadata import About, build_metadata, without_paths

FULL = About(
    family="sdxl",
    variant="sdxl",
    name="mika_v1",
    rank=16,
    alpha=8.0,
    network_args={"targets": "attn-mlp"},
    base_name="/home/mika/models/base.safetensors",
    base_sha256="ab" * 32,
    prediction="epsilon",
    trigger="mika_ch",
    tag_frequency={"mika": {"1girl": 3}},
    folders={"mika": (2, 10)},
    buckets=[(1024, 1024, 7), (832, 1216, 3)],
    num_images=10,
    num_reg_images=0,
    resolution=(1024, 1024),
    steps=400,
    max_steps=3000,
    epochs=12.5,
    micro_batch_size=2,
    gradient_accumulation_steps=3,
    seed=42,
    optimizer="emosens",
    lr=1.0,
    dtype="bf16",
    dataset_sha256="cd" * 32,
    parents=[{"kind": "stack", "sha256": "ef" * 32, "weight": 0.8}],
    preset={
        "model": {"base": "/home/mika/models/base.safetensors"},
        "dataset": {"folders": [{"path": "C:\\Users\\mika\\pics"}]},
        "sample": {"prompts": ["[trigger], 1/2 portrait, by /u/someone"]},
    },
    stop_reason="signal",
    best_step=375,
    version="0.1.0",
)


def test_the_readers_keys_are_there() -> None:
    found = build_metadata(FULL)
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "16", "ss_network_alpha": "8.0",
        "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False", "ss_output_name": "mika_v1",
        "ss_sd_model_name": "base.safetensors", "ss_learning_rate": "1.0", "ss_optimizer": "emosens", "ss_steps": "400",
        "ss_num_train_images": "10", "ss_total_batch_size": "6", "ss_resolution": "(1024, 1024)", "ss_seed": "42",
        "ss_num_epochs": "13", "ss_epoch": "12",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "mika_v1", "modelspec.resolution": "1024x1024",
        "modelspec.trigger_phrase": "mika_ch", "modelspec.prediction_type": "epsilon",
        "emotrain.stop_reason": "signal", "emotrain.best_step": "375", "emotrain.dataset_sha256": "cd" * 32,
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert json.loads(found["ss_tag_frequency"]) == {"mika": {"1girl": 3}}
    assert json.loads(found["ss_dataset_dirs"]) == {"mika": {"n_repeats": 2, "img_count": 10}}
    assert json.loads(found["ss_bucket_info"])["buckets"]["1"] == {"resolution": [832, 1216], "count": 3}
    assert json.loads(found["emotrain.parents"])[0]["sha256"] == "ef" * 32
    assert json.loads(found["emotrain.preset"])["model"]["base"] == "base.safetensors"


def test_every_value_is_a_string_and_no_path_or_user_name_gets_out() -> None:
    found = build_metadata(FULL)
    assert all(isinstance(value, str) for value in found.values())
    text = json.dumps(found)
    assert "/home" not in text
    assert "Users" not in text
    assert "/u/someone" in text


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("/home/mika/data/pics/", "pics"),
        ("C:\\Users\\mika\\pics", "pics"),
        ("\\\\server\\share\\pics", "pics"),
        ("~/pics", "pics"),
        ("file:///home/mika/x.png", "x.png"),
        ("see /home/mika/notes.txt, please", "see notes.txt, please"),
        ("owner/name", "owner/name"),
        ("1/2", "1/2"),
        (["/a/b", {"k": "/c/d"}], ["b", {"k": "d"}]),
        (3.5, 3.5),
    ],
)
def test_absolute_paths_become_their_last_part(value: object, clean: object) -> None:
    assert without_paths(value) == clean


@pytest.mark.parametrize(
    ("family", "variant", "version", "v2", "architecture"),
    [
        ("sd15", "", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd21", "", "sd_v2", "True", "stable-diffusion-v2/lora"),
        ("sdxl", "", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
        ("sd3", "sd35-large", "sd3", "False", "stable-diffusion-3-5-large/lora"),
        ("flux", "flux1-schnell", "flux1", "False", "flux-1-schnell/lora"),
    ],
)
def test_web_interfaces_recognise_the_family(
    family: str, variant: str, version: str, v2: str, architecture: str
) -> None:
    found = build_metadata(About(family=family, variant=variant))
    assert (found["ss_base_model_version"], found["ss_v2"]) == (version, v2)
    assert found["modelspec.architecture"] == architecture


def test_the_hashes_are_those_of_a_file_with_kohyas_metadata_alone(lora_path: Path) -> None:
    state, alphas = weights("sd15", "all", rank=64)
    save_lora(lora_path, state, alphas=alphas, family="sd15", dtype="fp32", metadata=build_metadata(FULL))
    metadata = read_lora(lora_path).metadata
    raw = lora_path.read_bytes()
    assert len(raw) > 0x110000
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    assert len(metadata["sshs_legacy_hash"]) == 8
    assert metadata["emotrain.family"] == "sd15"
    assert len(save(load_file(lora_path))) > 0


def test_the_legacy_hash_covers_64_kib_at_1_mib(lora_path: Path) -> None:
    state, alphas = weights("sd15", "all", rank=64)
    save_lora(lora_path, state, alphas=alphas, family="sd15", dtype="fp32", metadata={"ss_steps": "3"})
    plain = lora_path.with_name("plain.safetensors")
    from emotrain.lora import container

    tensors, metadata = container.read(lora_path)
    container.write(plain, tensors, {"ss_steps": "3"})
    expected = hashlib.sha256(plain.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert metadata["sshs_legacy_hash"] == expected


def test_lora_adapter_metadata_is_never_written_into_a_kohya_file(lora_path: Path) -> None:
    """diffusers refuses a file that has both alphas and peft settings."""
    state, alphas = weights("sd15", "attn")
    save_lora(lora_path, state, alphas=alphas, family="sd15", metadata=build_metadata(FULL))
    assert "lora_adapter_metadata" not in read_lora(lora_path).metadata
