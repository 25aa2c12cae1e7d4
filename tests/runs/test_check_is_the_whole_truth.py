"""What `run` refuses before it trains, `check` and `plan` refuse in the same words and with the same exit code."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from emotrain.cli.app import main
from emotrain.families import memory
from emotrain.families.table import ASSETS
from emotrain.runs import folder

BASE = """
model: {model}
dataset: {{folders: [{folder}], resolution: 64, buckets: {{step: 8, min: 64, max: 64}}}}
trigger: inkmoji
network: {{{rank}}}
train: {{max_steps: 2, micro_batch_size: 2}}
sample: {{every: 0, at_start: false}}
{more}
"""
GOOD = {"model": "builtin:tiny-sd", "folder": "{path: ./good}", "rank": "rank: 2", "more": ""}
ALL = ("check", "plan", "run")
CASES: dict[str, tuple[dict[str, str], int]] = {
    "no model": ({"model": "./none.safetensors"}, 4),
    "a text file as model": ({"model": "./words.safetensors"}, 4),
    "no pictures": ({"folder": "{path: ./empty}"}, 3),
    "only regularisation pictures": ({"folder": "{path: ./one, prior: 0.5}"}, 3),
    "a folder named 0_": ({"folder": "{path: ./zero}"}, 3),
    "a cut mask": ({"folder": "{path: ./one, mask: ./cut}"}, 3),
    "a black mask": ({"folder": "{path: ./one, mask: ./black}"}, 3),
    "masks that are the pictures": ({"folder": "{path: ./one, mask: ./one}"}, 3),
    "a damaged picture": ({"folder": "{path: ./cut}"}, 3),
    "a run that is not there": ({"more": "start_from: {continue: nobody}"}, 4),
    "a text file as LoRA": ({"more": "start_from: {continue: ./words.safetensors}"}, 4),
    "a LoRA of another family": ({"more": "start_from: {stack: [./flux-lora.safetensors]}"}, 4),
    "a text file as VAE": ({"model": "{base: builtin:tiny-sd, vae: ./words.safetensors}"}, 4),
    "a VAE of other channels": ({"model": "{base: builtin:tiny-sd, vae: ./other}"}, 4),
    "a VAE that is not there": ({"model": "{base: builtin:tiny-sd, vae: ./none}"}, 4),
    "a text encoder that is not read": ({"model": "{base: builtin:tiny-sd, text_encoder: ./one}"}, 2),
    "a tokenizer that is not read": ({"model": "{base: builtin:tiny-sd, tokenizer: ./one}"}, 2),
    "another family": ({"model": "{base: builtin:tiny-sd, family: sdxl}"}, 2),
    "a prediction it does not have": ({"model": "{base: builtin:tiny-sd, prediction: flow}"}, 2),
    "a layer of CLIP that is not there": ({"model": "{base: builtin:tiny-sd, clip_skip: 9}"}, 2),
    "a layer of CLIP of a model that takes none": ({"model": "{base: builtin:tiny-flux, clip_skip: 2}"}, 2),
    "a rank too large": ({"rank": "rank: 4000"}, 2),
    "a LoKr in a layout that joins q, k and v": (
        {"model": "builtin:tiny-flux", "rank": "type: lokr", "more": "save: {format: kohya}"},
        2,
    ),
    "LoKr and LoRA in one file to continue": ({"more": "start_from: {continue: ./mixture.safetensors}"}, 4),
    "a file as VAE with other channels": ({"model": "{base: builtin:tiny-sd, vae: ./sixteen.safetensors}"}, 4),
    "a file as VAE that lacks a tensor": ({"model": "{base: builtin:tiny-sd, vae: ./holes.safetensors}"}, 4),
    "a loss of diffusion models on a flow": ({"model": "builtin:tiny-flux", "more": "min_snr_gamma: 5"}, 2),
    "a shift of flows on a diffusion model": ({"more": "discrete_flow_shift: 3"}, 2),
    "zero terminal SNR with epsilon": ({"model": "{base: builtin:tiny-sd, prediction: epsilon}"}, 4),
    "a step that the model does not take": ({"set": "dataset.buckets.step=12"}, 2),
    "a size that is no multiple": ({"set": "sample.size=65"}, 2),
    "a colour that is none": ({"set": "dataset.background=reddish"}, 2),
    "a vision model that is not there": ({"set": "sample.every=1 validate.likeness=./none"}, 4),
    "a package that is not installed": ({"set": "model.quantize=nf4"}, 2),
    "a model of another family to draw on": ({"set": "sample.every=1 sample.base=builtin:tiny-flux"}, 4),
    "a held-out folder that is trained on": ({"more": "validate: {folder: ./good}"}, 3),
    "targets that match nothing": ({"rank": "targets: ['nothing.*']"}, 2),
    "a rank pattern that matches nothing": ({"rank": "rank_pattern: {nothing: 3}"}, 2),
    "a LoRA of other sizes to continue": ({"more": "start_from: {continue: ./wide.safetensors}"}, 4),
    "a LoRA of other sizes in the stack": ({"more": "start_from: {stack: [./wide.safetensors]}"}, 4),
    "a LoRA that trains CLIP too": ({"more": "start_from: {continue: ./clip.safetensors}"}, 2),
    "a layer that diffusers does not read back": (
        {"model": "builtin:tiny-flux", "rank": "targets: [norm_out.linear]", "more": "save: {format: kohya}"},
        4,
    ),
    "a LoKr with a factor missing": ({"more": "start_from: {stack: [./half.safetensors]}"}, 4),
}


# A copy of the model: a file of it, and what is changed in it.
SPOILED_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "a size as text": ("unet/config.json", {"norm_num_groups": "16"}),
    "a factor that is a list": ("vae/config.json", {"scaling_factor": [0.5]}),
    "a sample size of null": ("vae/config.json", {"sample_size": None, "block_out_channels": None}),
    "a million layers": ("unet/config.json", {"layers_per_block": 10**6}),
    "an activation of no name": ("text_encoder/config.json", {"hidden_act": "swosh"}),
    "a beta as text": ("scheduler/scheduler_config.json", {"beta_end": "0.012"}),
    "an unknown schedule": ("scheduler/scheduler_config.json", {"beta_schedule": "steep"}),
    "more tokens than the encoder takes": ("tokenizer/tokenizer_config.json", {"model_max_length": 70}),
}


@pytest.mark.parametrize("case", SPOILED_MODELS)
def test_a_spoiled_model_is_refused_alike(case: str, here: Path, capsys: Any) -> None:
    file, fields = SPOILED_MODELS[case]
    path = Path(shutil.copytree(ASSETS / "tiny-sd", here / "m")) / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")
    (here / "p.yaml").write_text(BASE.format(**{**GOOD, "model": "./m"}), encoding="utf-8")
    code, line = refused_alike(["p.yaml"], capsys, ALL)
    assert code == 4
    part = "text_encoder" if file.startswith("tokenizer") else file.partition("/")[0]
    assert f"m/{part}" in line


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with all of `made`, whose files nobody changes."""
    shutil.copytree(made, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and files that are no good."""
    import torch

    tmp_path = tmp_path_factory.mktemp("made")
    for name in ("empty", "good", "one", "zero/0_x", "cut", "black"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(ASSETS / "tiny-sd" / "vae", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "latent_channels": 3}), encoding="utf-8")
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    picture.save(tmp_path / "one" / "a.png")
    for index in range(4):
        Image.effect_noise((64, 64), 40 + 9 * index).convert("RGB").save(tmp_path / "good" / f"{index}.png")
        (tmp_path / "good" / f"{index}.txt").write_text("a square")
    picture.save(tmp_path / "zero" / "0_x" / "a.png")
    (tmp_path / "cut" / "a.png").write_bytes((tmp_path / "one" / "a.png").read_bytes()[:900])
    Image.new("L", (64, 64), 0).save(tmp_path / "black" / "a.png")
    (tmp_path / "words.safetensors").write_text("these are words", encoding="utf-8")
    name = "transformer.transformer_blocks.0.attn.to_q"
    lora = {f"{name}.lora_A.weight": torch.zeros(2, 3072), f"{name}.lora_B.weight": torch.zeros(3072, 2)}
    save_file(lora, tmp_path / "flux-lora.safetensors")
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    half = {f"{stem}.lokr_w1": torch.ones(2, 2)}
    save_file(half, tmp_path / "half.safetensors")
    wide = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    layer = {f"{wide}.lora_down.weight": torch.ones(2, 320), f"{wide}.lora_up.weight": torch.ones(320, 2)}
    save_file(layer, tmp_path / "wide.safetensors")
    clip = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    both = {f"{clip}.lora_down.weight": torch.ones(2, 128), f"{clip}.lora_up.weight": torch.ones(128, 2)}
    both |= {f"{wide}.lora_down.weight": torch.ones(2, 96), f"{wide}.lora_up.weight": torch.ones(96, 2)}
    save_file(both, tmp_path / "clip.safetensors")
    vae = load_file(ASSETS / "tiny-sd" / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: value for name, value in vae.items() if name != "encoder.conv_in.bias"}, tmp_path / "holes.safetensors"
    )
    vae["decoder.conv_in.weight"] = torch.ones(64, 16, 3, 3)
    save_file(vae, tmp_path / "sixteen.safetensors")
    other = stem.replace("proj_in", "proj_out")
    mixture = {**half, f"{stem}.lokr_w2": torch.ones(64, 64)}
    mixture |= {f"{other}.lora_down.weight": torch.ones(2, 128), f"{other}.lora_up.weight": torch.ones(128, 2)}
    save_file(mixture, tmp_path / "mixture.safetensors")
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_run_check_and_plan_refuse_alike(case: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    changes, expected = CASES[case]
    (here / "p.yaml").write_text(BASE.format(**{**GOOD, **changes}), encoding="utf-8")
    words = [word for one in changes.get("set", "").split() for word in ("--set", one)]
    monkeypatch.setattr(memory, "is_installed", lambda package: False)
    code, line = refused_alike(["p.yaml", *words], capsys, ALL)
    assert code == expected, line
    assert line
    assert not (here / "runs").exists()


def refused_alike(words: list[str], capsys: Any, commands: tuple[str, ...] = ("check", "run")) -> tuple[int, str]:
    """The exit code and first line with which the commands refuse; all that they say must be the same."""
    said = []
    for command in commands:
        code = main([command, *words, "--json"])
        said.append((code, json.loads(capsys.readouterr().out.splitlines()[-1])["error"]))
    assert said == said[:1] * len(commands)
    return said[0][0], said[0][1]["message"]


@pytest.mark.parametrize(
    ("base", "word", "refusal"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "model.clip_skip=13", "its text encoder has 12 layers"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "model.prediction=flow", "is sd15 (Stable Diffusion 1.x"),
        ("black-forest-labs/FLUX.1-dev", "model.clip_skip=2", "FLUX.1 takes no layer of CLIP"),
        ("black-forest-labs/FLUX.1-dev", "dataset.buckets.step=24", "the model takes multiples of 16"),
        ("black-forest-labs/FLUX.1-dev", "network.rank=4000", "more than the 3072"),
    ],
)
def test_plan_refuses_the_settings_of_a_model_that_is_not_here(
    base: str, word: str, refusal: str, here: Path, capsys: Any
) -> None:
    (here / "p.yaml").write_text(f"model: {base}\ndataset: ./good\n", encoding="utf-8")
    assert main(["plan", "p.yaml", "--set", word]) == 2
    assert refusal in capsys.readouterr().err.splitlines()[0]


def test_a_name_that_is_taken_is_refused_by_check_too(here: Path, capsys: Any) -> None:
    (here / "p.yaml").write_text(BASE.format(**GOOD), encoding="utf-8")
    (here / "runs" / "p").mkdir(parents=True)
    assert refused_alike(["p.yaml"], capsys) == (5, "runs/p exists already")
    assert main(["check", "p.yaml", "--name", "p-2"]) == 0
    assert main(["check", "p.yaml", "--runs-dir", "others"]) == 0
    assert not (here / "others").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_runs_folder_that_cannot_be_made_is_refused_by_check_too(place: str, here: Path, capsys: Any) -> None:
    (here / "p.yaml").write_text(BASE.format(**GOOD), encoding="utf-8")
    (here / "file").write_text("x", encoding="utf-8")
    code, line = refused_alike(["p.yaml", "--runs-dir", place], capsys)
    assert (code, line) == (6, f"{place}/p cannot be made: Not a directory")


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_a_runs_folder_where_no_folder_can_be_made_is_refused_by_check_too(
    reason: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (here / "p.yaml").write_text(BASE.format(**GOOD), encoding="utf-8")
    (here / "theirs").mkdir()
    make = os.mkdir

    def mkdir(path: Any, *words: Any, **more: Any) -> None:
        if "theirs" in str(path):
            raise OSError(reason, os.strerror(reason))
        make(path, *words, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)
    said = refused_alike(["p.yaml", "--runs-dir", "theirs"], capsys)
    assert said == (6, f"theirs/p cannot be made: {os.strerror(reason)}")


def test_a_full_disk_is_refused_by_check_too_and_nothing_is_left(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (here / "p.yaml").write_text(BASE.format(**GOOD), encoding="utf-8")
    before = sorted(here.iterdir())

    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, "write_synced", full)
    assert refused_alike(["p.yaml"], capsys) == (6, f"runs/p cannot be made: {os.strerror(errno.ENOSPC)}")
    assert sorted(here.iterdir()) == before
