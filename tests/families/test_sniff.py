"""A model is recognised from its small files or its header, and refused in words."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emotrain.errors import ConfigError, EmotrainError, ModelError
from emotrain.families.headers import read_header
from emotrain.families.loading import load_family
from emotrain.families.table import is_hub_id, resolve_base, sniff

UNET = "model.diffusion_model."


def header_file(path: Path, shapes: dict[str, list[int]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file with empty tensors of these names; only first sides are kept small."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)
    return path


def unet_file(path: Path, width: int, channels: int = 4, **words: Any) -> Path:
    extra = words.pop("extra", {})
    shapes = {
        UNET + "input_blocks.0.0.weight": [320, channels, 3, 3],
        UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight": [1280, width],
        **extra,
    }
    return header_file(path, shapes, **words)


@pytest.mark.parametrize(
    ("width", "family", "prediction", "resolution"),
    [
        (768, "sd15", "epsilon", 512),
        (1024, "sd21", "v_prediction", 768),
        (2048, "sdxl", "epsilon", 1024),
    ],
)
def test_unet_files_are_told_apart_by_their_text_width(
    tmp_path: Path, width: int, family: str, prediction: str, resolution: int
) -> None:
    found = sniff(str(unet_file(tmp_path / "a.safetensors", width)))
    assert (found.family, found.prediction, found.resolution) == (family, prediction, resolution)
    assert (found.kind, found.vae_scale, found.bucket_step, found.max_rank) == ("file", 8, 64, 1280)
    assert "vae" in found.missing


def test_what_a_file_predicts_comes_from_marker_tensors_or_metadata(tmp_path: Path) -> None:
    marker = unet_file(tmp_path / "a.safetensors", 2048, extra={"v_pred": [1], "ztsnr": [1]})
    assert sniff(str(marker)).prediction == "v_prediction"
    assert sniff(str(marker)).scheduler_config["rescale_betas_zero_snr"] is True
    said = unet_file(tmp_path / "b.safetensors", 1024, metadata={"modelspec.prediction_type": "epsilon"})
    assert (sniff(str(said)).prediction, sniff(str(said)).resolution) == ("epsilon", 512)


def flux_shapes(double: int = 19, single: int = 38, inputs: int = 64) -> dict[str, list[int]]:
    """A tensor of each block and the first layer, as FLUX.1 has them."""
    blocks = [f"double_blocks.{i}.img_attn.qkv.weight" for i in range(double)]
    blocks += [f"single_blocks.{i}.linear1.weight" for i in range(single)]
    return {"img_in.weight": [3072, inputs], **{name: [4, 4] for name in blocks}}


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "guidance_in.in_layer.weight"], "flux1-dev"),
        (["double_blocks.0.img_attn.qkv.weight"], "flux1-schnell"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "sd3-medium"),
        (
            ["joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.x_block.attn2.qkv.weight"],
            "sd35-medium",
        ),
        (["joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.37.x_block.attn.ln_q.weight"], "sd35-large"),
    ],
)
@pytest.mark.parametrize("prefix", ["", UNET])
def test_transformer_files_are_told_apart(tmp_path: Path, names: list[str], variant: str, prefix: str) -> None:
    shapes = {name: [4, 4] for name in names}
    if variant.startswith("flux"):
        shapes = {**flux_shapes(), **shapes}
    found = sniff(str(header_file(tmp_path / "a.safetensors", {prefix + n: shape for n, shape in shapes.items()})))
    assert found.variant == variant
    assert found.prediction == "flow"
    assert found.latent_channels == 16


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lora_unet_x.lora_down.weight": [4, 4]}, "is a LoRA, not a model"),
        ({"down_blocks.0.resnets.0.conv1.weight": [4, 4]}, "denoiser of a diffusers folder alone"),
        ({"something.else": [4, 4]}, "is not a model that emotrain knows"),
    ],
)
def test_other_files_are_named(tmp_path: Path, shapes: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        sniff(str(header_file(tmp_path / "a.safetensors", shapes)))


def test_inpainting_and_unknown_unets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="9 input channels instead of 4: an inpainting"):
        sniff(str(unet_file(tmp_path / "a.safetensors", 768, channels=9)))
    with pytest.raises(ModelError, match=r"text width is \[1280\]"):
        sniff(str(unet_file(tmp_path / "b.safetensors", 1280)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.ckpt", b"PK\x03\x04", "pickled file"),
        ("a.safetensors", b"\x80\x02}q", "pickle"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS pointer"),
        ("a.safetensors", b"\n<!DOCTYPE html><html>", "web page"),
        ("a.safetensors", b"", "not a safetensors file"),
        ("a.safetensors", struct.pack("<Q", 10**12) + b"{}", "damaged one"),
        ("a.safetensors", struct.pack("<Q", 4) + b"{{{{", "damaged one"),
        ("a.gguf", b"GGUF", "GGUF"),
    ],
)
def test_damaged_files_are_named_in_words(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=words) as refused:
        sniff(str(tmp_path / name))
    assert refused.value.hint


def test_a_cut_off_file_says_how_much_is_there(tmp_path: Path) -> None:
    path = unet_file(tmp_path / "a.safetensors", 768)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 10)
    with pytest.raises(ModelError, match=r"cut off: [\d,]+ of [\d,]+ bytes"):
        read_header(path)


def test_a_wrong_family_is_refused_with_what_was_found(tmp_path: Path, sd_folder: Path) -> None:
    path = unet_file(tmp_path / "a.safetensors", 2048)
    with pytest.raises(ModelError) as refused:
        sniff(str(path), "sd15")
    assert "model.family is `sd15`" in str(refused.value)
    assert "sdxl (Stable Diffusion XL, epsilon)" in str(refused.value)
    assert refused.value.hint == "write `family: sdxl`, or leave it out"
    with pytest.raises(ModelError, match="is sd15"):
        load_family(str(sd_folder), family="flux", device="cpu")


def test_names_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_base("builtin:tiny-s")
    assert refused.value.hint == "did you mean `builtin:tiny-sd`?"
    assert refused.value.exit_code == 2
    with pytest.raises(ModelError) as missing:
        resolve_base("./nowhere/x.safetensors")
    assert missing.value.exit_code == 4
    with pytest.raises(ConfigError, match="model.family"):
        sniff("builtin:tiny-sd", "sd16")


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_id("owner/some-model_1.5")
    assert not is_hub_id("models/x.safetensors")
    assert not is_hub_id("/models/x")
    assert not is_hub_id("./models")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert not is_hub_id("owner/here")


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="not in the local cache and the hub cannot be reached"):
        sniff("nobody/no-such-model")


def test_folders_that_are_not_complete_name_what_is_missing(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ModelError, match="not complete: text_encoder missing"):
        sniff(str(folder))
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        sniff(str(folder))


def test_a_folder_of_another_pipeline_is_refused(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    with pytest.raises(ModelError, match="is a KandinskyPipeline, which emotrain does not train"):
        sniff(str(folder))


def test_pickled_and_damaged_weights_in_a_folder_are_refused(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="LFS pointer"):
        load_family(str(folder), device="cpu")
    weights.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load_family(str(folder), device="cpu")


def test_weights_of_another_shape_are_refused(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [48, 144]}))
    with pytest.raises(EmotrainError, match="cannot be loaded"):
        load_family(str(folder), device="cpu")


def test_the_table_is_read_without_torch() -> None:
    code = (
        "import sys, emotrain.families.table as t; t.sniff('builtin:tiny-sd');"
        "print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False False", done.stderr


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({**flux_shapes(), "distilled_guidance_layer.in_proj.bias": [4], "nerf_blocks.0.x": [4]}, "is Chroma Radiance"),
        ({**flux_shapes(double=8), "distilled_guidance_layer.in_proj.bias": [4]}, "8 double_blocks, and Chroma has 19"),
        (
            {**flux_shapes(), "double_stream_modulation_img.lin.weight": [4, 4]},
            "4 channels, and FLUX.2 has 5",
        ),
        (flux_shapes(inputs=384), "is FLUX.1 Fill"),
        (flux_shapes(inputs=128), "is FLUX.1 Canny or Depth"),
        (flux_shapes(double=8), "8 double_blocks, and FLUX.1 has 19"),
        (flux_shapes(double=20, single=40), "another kind"),
        ({**flux_shapes(), "single_blocks.0.linear1.weight.quant_state.bitsandbytes__nf4": [4]}, "quantised form"),
        ({**flux_shapes(), "single_blocks.0.linear1.comfy_quant": [4]}, "quantised form"),
        ({**flux_shapes(), "controlnet_blocks.0.weight": [4, 4]}, "1 tensors that a flux model does not have"),
    ],
)
@pytest.mark.parametrize("prefix", ["", UNET])
def test_a_model_that_only_shares_names_with_flux_is_refused_by_name(
    tmp_path: Path, shapes: dict[str, list[int]], says: str, prefix: str
) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        sniff(str(header_file(tmp_path / "a.safetensors", {prefix + n: shape for n, shape in shapes.items()})))
    assert refused.value.exit_code == 4


@pytest.mark.parametrize("marker", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_unet_that_predicts_as_edm_does_is_refused(tmp_path: Path, marker: str) -> None:
    with pytest.raises(ModelError, match="EDM"):
        sniff(str(unet_file(tmp_path / "a.safetensors", 2048, extra={marker: [4]})))


def test_tables_of_the_training_program_are_no_reason_to_refuse(tmp_path: Path) -> None:
    extra = {"alphas_cumprod": [1000], "model_ema.decay": [1], "sqrt_one_minus_alphas_cumprod": [1000]}
    assert sniff(str(unet_file(tmp_path / "a.safetensors", 768, extra=extra))).family == "sd15"


def test_check_says_which_pieces_a_lone_transformer_lacks_and_what_brings_them(tmp_path: Path, capsys: Any) -> None:
    from emotrain.cli.app import main

    header_file(tmp_path / "flux1-dev.safetensors", {**flux_shapes(), "guidance_in.in_layer.weight": [4, 4]})
    preset = tmp_path / "p.yaml"
    preset.write_text("model: ./flux1-dev.safetensors\ndataset: builtin:example\ntrigger: t\n", encoding="utf-8")
    assert main(["check", str(preset)]) == 4
    said = capsys.readouterr().err
    assert "does not hold vae and text_encoder and text_encoder_2" in said
    assert "model.vae" in said


def test_what_lies_beside_a_file_says_what_it_predicts_and_the_preset_may_insist(tmp_path: Path) -> None:
    path = unet_file(tmp_path / "a.safetensors", 2048)
    assert sniff(str(path)).prediction == "epsilon"
    (tmp_path / "a.yaml").write_text('model:\n  params:\n    parameterization: "v"\n', encoding="utf-8")
    assert sniff(str(path)).prediction == "v_prediction"
    assert sniff(str(path), prediction="epsilon").prediction == "epsilon"
    (tmp_path / "a.yaml").unlink()
    (tmp_path / "a" / "scheduler").mkdir(parents=True)
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (tmp_path / "a" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert sniff(str(path)).prediction == "v_prediction"
    assert sniff(str(path)).scheduler_config["rescale_betas_zero_snr"] is True
    with pytest.raises(ConfigError, match="model.prediction"):
        sniff(str(path), prediction="flow")


def test_a_prediction_that_is_insisted_on_reaches_training_and_samples(sd_folder: Path) -> None:
    from emotrain.families.loading import load_family

    family = load_family(str(sd_folder), device="cpu", prediction="v")
    assert family.prediction == "v_prediction"
    assert family.scheduler_config["prediction_type"] == "v_prediction"
    assert family.fresh_scheduler().config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
@pytest.mark.parametrize("value", [{}, "0.18", [0.18], True, float("nan")])
def test_a_vae_whose_factor_is_no_number_is_refused(sd_folder: Path, tmp_path: Path, name: str, value: object) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ModelError, match=f"{name} is" if value == value else "NaN|nan"):
        sniff(str(folder))


def test_a_tokenizer_that_knows_more_than_its_encoder_is_refused(sd_folder: Path) -> None:
    family = load_family(str(sd_folder), device="cpu")
    part = family.text_encoders[0]
    known = part.encoder.get_input_embeddings().num_embeddings
    part.encoder.get_input_embeddings().num_embeddings = known // 8
    with pytest.raises(ModelError, match=rf"makes token \d+, but the encoder knows {known // 8} tokens"):
        family.encode_texts(["red apple and a green pear"])
