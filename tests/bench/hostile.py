"""Thousands of inputs that no honest program writes, through the command line: does any of them break it?

    python tests/bench/hostile.py [--trials 3000] [--seed 0] [--kind NAME]... [--only KIND:NUMBER] [--out FILE]

A trial writes a small good input, spoils it, and calls one command in this process. It fails by a traceback, by exit
code 1, by more than 10 s of CPU time (or 120 s of waiting), or by what its own kind says (one bad run must not break
`runs list` for the others). A trial is found again by `--only`, whatever came before it. Prints each failure and a
table by kind.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import faulthandler
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, PngImagePlugin

LIMIT_S, WAIT_S = 10, 120
GIVE_UP_S = 240  # C code that no signal stops: the stacks are printed and the process ends

Random = random.Random
Check = Callable[[str, str], str | None]
Make = Callable[[Random, Path], "Trial"]


@dataclass(frozen=True)
class Trial:
    """A command's words, and what else must hold: (stdout, stderr) -> a complaint."""

    words: list[str]
    check: Check | None = None


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; `fault` is None where it held."""

    kind: str
    number: int
    words: list[str]
    code: int | None
    seconds: float
    fault: str | None
    first: str


# ------------------------------------------------------------ values that no key means

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
TEXTS = [
    "", " ", "x" * 300, "x" * 70_000, "~", "~nouser/x", "..", "../..", "\0", "a\0b", "\u202eabc", "\ud800", "é",
    "e\u0301",
    "²", "٣", "1" * 5000, "-1", "0", "1e400", "nan", "inf", "-inf", ".inf", "0x10", "1_000", "1/0", "0/2", "true",
    "null",
    "%s%n", "{0}", "{__class__}", "$(id)", "; ls", "`id`", "[", "]", "{", "*", "**", "(", ")", "\\", "(a+)+$",
    "((a*)*)*b",
    "(" * 5000, "a{1000}{1000}", "(?P<x>)(?P<x>)", "[trigger]" * 500, "<lora:a:1>", "\x1b[31m", "\n", "\r\n\t", "#",
    "&a",
    "*a", "!!python/object:os.system", "---", "builtin:", "builtin:../x", "hf://x", "http://[", "C:\\x", "\\\\host\\x",
    "con", "aux.txt", "a" * 255, "a/" * 2000, "1024,1024", "--help", "--n --w x", "auto", "none", "None",
    "emosens.EmoSens",
]  # fmt: skip
NUMBERS: list[Any] = [
    0, 1, -1, 2, 7, 2**31, -(2**31), 2**63, 2**64, 10**18, 10**30, 10**300, 10**400, 0.0, -0.0, 1e-320, 1e308,
    -1e308, 0.5,
    math.inf, -math.inf, math.nan, True, False,
]  # fmt: skip
SHAPES: list[Any] = [None, [], {}, [[]], [None], [0], [1, 2, 3], {"a": 1}, {"": {}}, [{}], DEEP, list(range(3000))]


def nasty(rng: Random) -> Any:
    """A value of any type."""
    kind = rng.randrange(3)
    return copy.deepcopy(rng.choice((TEXTS, NUMBERS, SHAPES)[kind]))


def spots(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below `tree`."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from spots(value, (*path, key))


def spoil_tree(rng: Random, tree: Any, times: int) -> Any:
    """Swap, drop, double or wrap values anywhere in JSON-like data."""
    tree = copy.deepcopy(tree)
    for _ in range(times):
        places = list(spots(tree))
        if not places or rng.random() < 0.02:
            return nasty(rng)
        *above, last = rng.choice(places)
        parent = tree
        for key in above:
            parent = parent[key]
        old, what = parent[last], rng.randrange(9)
        if what <= 3:
            parent[last] = nasty(rng)
        elif what == 4 and isinstance(old, int | float) and math.isfinite(old):
            parent[last] = rng.choice((-old, old * 1000, old + 1, str(old), float(old), [old], old * 10**9, old / 3))
        elif what == 5:
            parent.pop(last)
        elif what == 6:
            parent[last] = rng.choice(([old], {"x": old}, [old] * 50, str(old)))
        elif what == 7 and isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = old
        else:
            other = tree
            for key in rng.choice(places):
                other = other[key] if isinstance(other, dict | list) and key_in(other, key) else other
            parent[last] = copy.deepcopy(other)
        if len(list(spots(tree))) > 200_000:
            return tree
    return tree


def key_in(tree: Any, key: Any) -> bool:
    return key in tree if isinstance(tree, dict) else isinstance(key, int) and key < len(tree)


def spoil_bytes(rng: Random, data: bytes, times: int) -> bytes:
    """Cut, flip, insert, double and blank bytes."""
    for _ in range(times):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 8, 64, 1000)))
        what = rng.randrange(8)
        if what == 0:
            data = data[:at]
        elif what == 1:
            data = data[:at] + rng.randbytes(rng.choice((1, 2, 16))) + data[at:]
        elif what == 2:
            data = data[:at] + data[end:]
        elif what == 3:
            data = data[:at] + data[at:end] * rng.choice((2, 3, 200)) + data[end:]
        elif what == 4:
            data = data[:at] + bytes(end - at) + data[end:]
        elif what == 5:
            data = data[:at] + rng.choice(TEXTS).encode("utf-8", "surrogatepass")[:2000] + data[at:]
        else:
            data = data[:at] + bytes(b ^ (1 << rng.randrange(8)) for b in data[at : at + 1]) + data[at + 1 :]
    return data


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def spoil_json(rng: Random, tree: Any) -> bytes:
    """A spoiled tree as JSON, or its text spoiled."""
    what = rng.randrange(12)
    if what == 0:
        return spoil_bytes(rng, as_json(tree), rng.randint(1, 4))
    if what == 1:
        return rng.choice(
            (b"", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b'"x"', b"1" * 9000, b"\xff\xfe", b"{}")
        )
    if what == 2:
        text = as_json(tree).decode()
        return re.sub(
            r"-?\d+(\.\d+)?", lambda m: rng.choice((m[0], m[0], "1e999", "9" * 5000, "-0", "NaN")), text
        ).encode()
    return as_json(spoil_tree(rng, tree, rng.randint(1, 3)))


# ------------------------------------------------------------ presets

PRESET: dict[str, Any] = {
    "name": "mika_v1",
    "model": {"base": "builtin:tiny-sd", "family": "auto", "vae": None, "dtype": "auto", "quantize": "none",
              "memory": "auto", "prediction": "auto", "revision": None},
    "dataset": {
        "trigger": "mika_ch", "resolution": 64, "buckets": {"step": 8, "min": 64, "max": 64, "upscale": False},
        "captions": {"extension": ".txt", "shuffle": True, "keep_tokens": 1, "dropout": 0.05, "tag_dropout": 0.0,
                     "variants": 8, "prefix": "", "suffix": "", "default": None},
        "folders": [{"path": "./pictures", "repeats": 1, "flip": False, "mask": None}],
        "background": "white", "shard": None,
    },
    "network": {"type": "lora", "rank": 4, "alpha": 4, "targets": "attn-mlp", "conv_rank": 0, "text_encoder": False,
                "rank_pattern": {"to_q": 2}},
    "start_from": {"continue": None, "stack": []},
    "train": {"optimizer": {"name": "emosens", "generation": "3.9", "use_shadow": False, "eps": 1e-8, "betas": [0.9,
    0.995],
                            "weight_decay": 0.01, "stopcoef": 0.04, "sensor": "faithful", "notify": True},
              "lr": 1.0, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 30, "max_grad_norm": 1.0,
              "seed": 42, "loss": {"min_snr_gamma": None, "noise_offset": 0.0, "timesteps": "auto", "shift": "auto"}},
    "stop": {"mode": "trusted", "min_steps": "auto"},
    "validate": {"every": 50, "probe_images": 1, "folder": None, "fraction": 0.0},
    "sample": {"every": 250, "at_start": True, "seed": 42, "steps": 20, "guidance": "auto",
               "prompts": ["[trigger], a"]},
    "save": {"every": 250, "keep_last": 3, "format": "auto", "dtype": "fp16"},
    "log": {"tensorboard": True, "every": 10},
}  # fmt: skip
LEAVES = [".".join(map(str, spot)) for spot in spots(PRESET) if not any(isinstance(part, int) for part in spot)]
WORDS = ("extends", "trigger", "network_dim", "learning_rate", "output_dir", "caption_ext", "optimizer", "resolution")


def pictures(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        shutil.copyfile(good_picture("PNG", index), folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a square, number {index}", encoding="utf-8")
    return folder


def preset_command(rng: Random) -> str:
    return rng.choices(("check", "plan", "lint"), (8, 1, 3))[0]


def write_yaml(path: Path, tree: Any) -> None:
    text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def preset_text(rng: Random, here: Path) -> Trial:
    pictures(here / "pictures")
    lines = yaml.safe_dump(PRESET, sort_keys=False).splitlines(keepends=True)
    for _ in range(rng.randint(1, 4)):
        at, what = rng.randrange(len(lines)), rng.randrange(8)
        line = lines[at]
        if what == 0:
            lines[at] = line.replace(":", rng.choice((" :", "::", "=", "")), 1)
        elif what == 1:
            lines[at] = " " * rng.choice((1, 3, 40)) + line
        elif what == 2:
            lines[at] = line * rng.choice((2, 3, 4000))
        elif what == 3:
            key = line.partition(":")[0]
            lines[at] = f"{key}: {rng.choice(TEXTS)}\n"
        elif what == 4:
            lines.insert(
                at, rng.choice(("---\n", "...\n", "%YAML 1.2\n", "<<: *a\n", "\t- x\n", "? [a]\n: b\n", "{" * 3000))
            )
        elif what == 5:
            lines[at], lines[-at] = lines[-at], lines[at]
        elif what == 6:
            lines[at] = f"{rng.choice(WORDS)}: {rng.choice(TEXTS)}\n"
        else:
            lines = lines[:at] or lines
    data = "".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        data = spoil_bytes(rng, data, rng.randint(1, 3))
    (here / "p.yaml").write_bytes(data)
    return Trial([preset_command(rng), str(here / "p.yaml")])


def preset_tree(rng: Random, here: Path) -> Trial:
    pictures(here / "pictures")
    write_yaml(here / "p.yaml", spoil_tree(rng, PRESET, rng.choice((1, 1, 1, 2, 3))))
    return Trial([preset_command(rng), str(here / "p.yaml")])


def preset_set(rng: Random, here: Path) -> Trial:
    pictures(here / "pictures")
    write_yaml(here / "p.yaml", PRESET)
    words = [rng.choices(("check", "plan"), (8, 1))[0], str(here / "p.yaml")]
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(LEAVES)
        if rng.random() < 0.15:
            key = rng.choice(
                (key + ".0", key + ".x", "dataset.folders.0.path", "dataset.folders.²", key.upper(), "", "..", key[:-1])
            )
        value = nasty(rng)
        text = value if isinstance(value, str) else str(value) if rng.random() < 0.5 else json.dumps(value)
        words += ["--set", f"{key}={text}"]
    return Trial(words)


# ------------------------------------------------------------ LoRA and model files


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length & (2**64 - 1)).to_bytes(8, "little") + header + data


def split_header(content: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def spoil_container(rng: Random, content: bytes) -> bytes:
    """A safetensors file whose header lies, or whose bytes are damaged."""
    header, data = split_header(content)
    what = rng.randrange(10)
    if what == 0:
        return spoil_bytes(rng, content, rng.randint(1, 4))
    if what == 1:
        return with_header(as_json(header), data, rng.choice((0, 1, 2, len(data), 2**31, 2**63, -1, 2**40)))
    if what == 2:
        return with_header(as_json(header), data[: rng.randrange(len(data) + 1)] if rng.random() < 0.7 else data * 2)
    if what == 3:
        names = [name for name in header if name != "__metadata__"]
        one, other = rng.choice(names), rng.choice(names)
        header[one], header[other] = header[other], header[one]
        header[rng.choice(TEXTS)] = header[one]
        return with_header(as_json(header), data)
    if what == 4:
        header["__metadata__"] = {key: rng.choice(TEXTS) for key in rng.sample(METADATA, rng.randint(1, len(METADATA)))}
        return with_header(as_json(header), data)
    if what == 5:
        at = rng.randrange(0, max(len(data) - 4, 1), 2)
        return with_header(
            as_json(header), data[:at] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4)) + data[at + 4 :]
        )
    return with_header(spoil_json(rng, header), data)


METADATA = (
    "ss_base_model_version", "ss_network_dim", "ss_network_alpha", "ss_network_args", "modelspec.architecture",
    "modelspec.prediction_type", "emotrain", "emotrain.parents", "emotrain_parents", "ss_tag_frequency", "format",
    "sshs_model_hash",
)  # fmt: skip


def lora_files() -> dict[str, bytes]:
    """Small LoRA files in several layouts."""
    import torch
    from safetensors.torch import save

    def part(names: list[str], *, width: int = 32, conv: bool = False) -> dict[str, Any]:
        roles = names
        return {
            roles[0]: torch.randn(2, width),
            roles[1]: torch.randn(width, 2),
            **({roles[2]: torch.tensor(2.0)} if len(roles) > 2 else {}),
        }

    generator = torch.random.manual_seed(0)
    assert generator is not None
    unet = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
    kohya, peft, flux, te = {}, {}, {}, {}
    for role in "qkv":
        stem = f"lora_unet_{unet}{role}"
        kohya |= part([f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"])
        dotted = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{role}"
        peft |= part([f"{dotted}.lora_A.weight", f"{dotted}.lora_B.weight"])
        dotted = f"transformer.transformer_blocks.0.attn.to_{role}"
        flux |= part([f"{dotted}.lora_A.weight", f"{dotted}.lora_B.weight"], width=3072)
        stem = f"lora_te_text_model_encoder_layers_0_self_attn_{role}_proj"
        te |= part([f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"])
    meta = {"ss_base_model_version": "sd_v1", "ss_network_dim": "2", "ss_network_alpha": "2"}
    return {"kohya": save(kohya, meta), "peft": save(peft), "flux": save(flux), "te": save({**kohya, **te}, meta)}


def lora(rng: Random, here: Path) -> Trial:
    content = spoil_container(rng, LORAS[rng.choice(sorted(LORAS))])
    path = here / "x.safetensors"
    path.write_bytes(content)
    what = rng.randrange(6)
    if what == 0:
        return Trial(
            [
                "lora",
                "convert",
                str(path),
                "--to",
                rng.choice(("kohya", "diffusers")),
                "-o",
                str(here / "y.safetensors"),
            ]
        )
    if what == 1:
        good = here / "good.safetensors"
        good.write_bytes(LORAS["kohya"])
        return Trial(
            [
                "lora",
                "merge",
                f"{path}:{rng.choice(('1', '0.5', '-1', 'nan', '1e308'))}",
                str(good),
                "-o",
                str(here / "y.safetensors"),
            ]
        )
    if what == 2:
        pictures(here / "pictures")
        start = rng.choice(({"continue": str(path)}, {"stack": [{"path": str(path), "weight": 0.5}]}))
        write_yaml(here / "p.yaml", {**PRESET, "start_from": start})
        return Trial(["check", str(here / "p.yaml")])
    return Trial(["lora", "inspect", str(path), *(["--json"] if what == 3 else [])])


def model_file(rng: Random, here: Path) -> Trial:
    """A single file of a public model, its weights a hole in the disk."""
    from emotrain.files import DTYPE_BYTES

    pictures(here / "pictures")
    header = copy.deepcopy(MODEL_HEADERS[rng.choice(sorted(MODEL_HEADERS))])
    if rng.random() < 0.5:  # a field of one tensor
        name = rng.choice([key for key in header if key != "__metadata__"])
        header[name] = spoil_tree(rng, {"x": header[name]}, 1)
        header[name] = header[name].get("x") if isinstance(header[name], dict) else header[name]
    elif rng.random() < 0.5:  # another shape, told truly
        name = rng.choice([key for key in header if key != "__metadata__"])
        header[name]["shape"] = rng.choice(([], [0], [1], [0, 0], [2**20, 1], [1] * 8, [1] * 9, [-1], [2**62, 2]))
        first = header[name]["data_offsets"][0]
        header[name]["data_offsets"] = [
            first,
            first + math.prod(header[name]["shape"]) * DTYPE_BYTES[header[name]["dtype"]],
        ]
    else:
        names = rng.sample([key for key in header if key != "__metadata__"], rng.choice((1, 5, 200)))
        for name in names:
            header[name + rng.choice(("x", ".scale_weight", ".absmax"))] = header.pop(name)
    text = as_json(header) if rng.random() < 0.8 else spoil_bytes(rng, as_json(header), 1)
    end = max((entry["data_offsets"][1] for entry in header.values() if well_placed(entry)), default=0)
    with (here / "m.safetensors").open("wb") as file:
        file.write(with_header(text, b""))
        file.truncate(8 + len(text) + min(end, 2**34))
    write_yaml(here / "p.yaml", {**PRESET, "model": str(here / "m.safetensors"), "dataset": str(here / "pictures")})
    return Trial(["check", str(here / "p.yaml")])


def well_placed(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(x) is int and 0 <= x < 2**40 for x in offsets)


def model_headers() -> dict[str, Any]:
    """Headers with the names and shapes of a real SD 1.5 file's denoiser, VAE and text encoder."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
    from original_files import clip_tensors, unet_name, vae_name
    from transformers import CLIPTextConfig, CLIPTextModel

    from emotrain.families.registry import configs

    config = dict(configs("sd15")["denoiser"]["sd15"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            {key: value for key, value in config.items() if not key.startswith("_")}
        )
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
        clip = CLIPTextModel(CLIPTextConfig(**dict(configs("sd15")["text_encoders"]["text_encoder"][1])))
    shapes = {
        f"model.diffusion_model.{unet_name(name, 2)}": list(value.shape) for name, value in unet.state_dict().items()
    }
    shapes |= {f"first_stage_model.{vae_name(name, 4)}": list(value.shape) for name, value in vae.state_dict().items()}
    shapes |= {name: list(value.shape) for name, value in clip_tensors(clip, "cond_stage_model.transformer.").items()}
    header: dict[str, Any] = {"__metadata__": {"modelspec.architecture": "stable-diffusion-v1"}}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * 2
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return {"sd15": header}


def model_folder(rng: Random, here: Path) -> Trial:
    """A diffusers folder with one spoiled JSON file; some are loaded as well as looked at."""
    pictures(here / "pictures")
    shutil.copytree(ASSETS / "tiny-sd", here / "m", copy_function=os.link)
    chosen = rng.choice(sorted((here / "m").rglob("*.json")))
    content = chosen.read_bytes()
    chosen.unlink()
    if chosen.name == "tokenizer.json" and rng.random() < 0.7:
        chosen.write_bytes(spoil_bytes(rng, content, 3))
    else:
        chosen.write_bytes(spoil_json(rng, json.loads(content)))
    tree = {**PRESET, "model": str(here / "m"), "train": {"max_steps": 1}, "sample": {"every": 0, "at_start": False}}
    write_yaml(here / "p.yaml", tree)
    if rng.random() < 0.2:
        return Trial(["run", str(here / "p.yaml"), "--runs-dir", str(here / "runs"), "--plain"])
    return Trial([rng.choice(("check", "check", "plan")), str(here / "p.yaml")])


def model_weights(rng: Random, here: Path) -> Trial:
    """A diffusers folder with one spoiled weight file."""
    pictures(here / "pictures")
    shutil.copytree(ASSETS / "tiny-sd", here / "m", copy_function=os.link)
    chosen = rng.choice(sorted((here / "m").rglob("*.safetensors")))
    content = spoil_container(rng, chosen.read_bytes())
    chosen.unlink()
    chosen.write_bytes(content)
    tree = {**PRESET, "model": str(here / "m"), "train": {"max_steps": 1}, "sample": {"every": 0, "at_start": False}}
    write_yaml(here / "p.yaml", tree)
    if rng.random() < 0.5:
        return Trial(["run", str(here / "p.yaml"), "--runs-dir", str(here / "runs"), "--plain"])
    return Trial(["check", str(here / "p.yaml")])


# ------------------------------------------------------------ captions and pictures


def caption_text(rng: Random) -> bytes:
    pieces = [
        lambda: "{" + "|" * rng.choice((10, 60_000)), lambda: "{a|" * 5000, lambda: "}" * 5000,
        lambda: "mika_ch " * 7000,
        lambda: "w" * 32_768, lambda: "," * 60_000, lambda: "a," * 30_000, lambda: "\n%%%\n" * 9000,
        lambda: "__a__" * 5000,
        lambda: "(" * 20_000, lambda: "<lora:x:1>" * 3000, lambda: "é" * 30_000, lambda: "\u0300" * 30_000,
        lambda: "\U0001f468\u200d" * 8000,
        lambda: "\0", lambda: "\x1b]0;x\x07", lambda: "a" + " " * 60_000 + "b", lambda: "[trigger]" * 7000,
        lambda: "\ufeff" * 100,
        lambda: "<a " * 20_000, lambda: "&" * 60_000, lambda: "http://" * 9000, lambda: "|||" * 20_000,
        lambda: "mika_ch" * 9000,
        lambda: "Ã©" * 20_000, lambda: rng.choice(TEXTS), lambda: "a cat, sitting, on a mat",
    ]  # fmt: skip
    text = rng.choice(("", "\n", ", ")).join(rng.choice(pieces)() for _ in range(rng.choice((1, 1, 2, 3))))
    encoding = rng.choice(("utf-8",) * 8 + ("utf-16", "utf-32", "latin-1"))
    data = text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")
    return spoil_bytes(rng, data, 1) if rng.random() < 0.1 else data[: rng.choice((65_536, 65_536, 65_000, 70_000))]


def captions(rng: Random, here: Path) -> Trial:
    folder = pictures(here / "pictures", 3)
    where = rng.randrange(6)
    if where <= 2:
        for index in range(rng.randint(1, 3)):
            (folder / f"{index}.txt").write_bytes(caption_text(rng))
    elif where == 3:
        (folder / "0.txt").unlink()
        entry = {"file_name": "0.png", "text": caption_text(rng).decode("utf-8", "replace")[:5000], "tags": ["a"]}
        lines = [spoil_json(rng, entry), *([as_json(entry)] * rng.choice((0, 3)))]
        (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    elif where == 4:
        (folder / "metadata.csv").write_bytes(
            spoil_bytes(rng, b'file_name,text\n0.png,a\n1.png,"b, c"\n', rng.randint(1, 5))
        )
    else:
        (folder / "0.txt").unlink()
        (folder / "0.json").write_bytes(spoil_json(rng, {"caption": "a", "tags": ["x", "y"], "text": ["b"]}))
    if rng.random() < 0.4:
        return Trial(["lint", str(folder), *rng.choice(([], ["--json"], ["--html", str(here / "page.html")]))])
    tree = spoil_tree(rng, PRESET["dataset"]["captions"], 1) if rng.random() < 0.1 else PRESET["dataset"]["captions"]
    write_yaml(here / "p.yaml", {**PRESET, "dataset": {**PRESET["dataset"], "captions": tree}})
    return Trial([rng.choice(("check", "lint")), str(here / "p.yaml")])


FORMATS = (
    "PNG",
    "JPEG",
    "progressive",
    "CMYK",
    "WEBP",
    "GIF",
    "animated",
    "TIFF",
    "BMP",
    "16-bit",
    "palette",
    "EXIF",
    "AVIF",
    "APNG",
)
_SUFFIX = {"JPEG": "jpg", "progressive": "jpg", "CMYK": "jpg", "EXIF": "jpg", "WEBP": "webp", "GIF": "gif",
           "animated": "gif",
           "TIFF": "tif", "BMP": "bmp", "AVIF": "avif"}  # fmt: skip


def good_picture(kind: str, index: int = 0) -> Path:
    """A picture of 72 x 64 pixels, made once."""
    path = SHELF / f"{kind}-{index}.{_SUFFIX.get(kind, 'png')}"
    if path.exists():
        return path
    picture = Image.fromarray(np.random.default_rng(index).integers(0, 255, (64, 72, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "words", {0x9000: b"0232"}
    more = [picture.rotate(90 * turn) for turn in (1, 2)]
    save: dict[str, Callable[[], None]] = {
        "JPEG": lambda: picture.save(path, quality=90),
        "progressive": lambda: picture.save(path, progressive=True),
        "CMYK": lambda: picture.convert("CMYK").save(path),
        "animated": lambda: picture.save(path, save_all=True, append_images=more),
        "APNG": lambda: picture.save(path, save_all=True, append_images=more),
        "16-bit": lambda: Image.fromarray(np.full((64, 72), 3000, np.uint16)).save(path),
        "palette": lambda: picture.quantize(16).save(path, transparency=3),
        "EXIF": lambda: picture.save(path, exif=exif),
        "PNG": lambda: picture.save(path, pnginfo=png_words()),
    }
    save.get(kind, lambda: picture.save(path))()
    return path


def png_words() -> PngImagePlugin.PngInfo:
    words = PngImagePlugin.PngInfo()
    words.add_text("Comment", "a" * 50)
    words.add_itxt("XML:com.adobe.xmp", "<x/>", zip=True)
    return words


def spoil_png(rng: Random, data: bytes) -> bytes:
    """Chunks spoiled, with their checksums made right again."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    index = rng.randrange(len(chunks))
    name, content = chunks[index]
    what = rng.randrange(5)
    if what == 0:
        content = spoil_bytes(rng, content, 2)
    elif what == 1:
        chunks.insert(index, chunks[index])
    elif what == 2:
        sides = rng.choice(((2**31 - 1, 1), (20_000, 20_000), (0, 0), (8, 2**31 - 1), (3_000, 33_000), (64, 64)))
        name, content = (
            chunks[0][0],
            struct.pack(
                ">IIBBBBB", *sides, rng.choice((1, 8, 16, 99)), rng.choice((0, 2, 3, 6, 9)), 0, 0, rng.choice((0, 1, 7))
            ),
        )
        index = 0
    elif what == 3:
        bomb = zlib.compress(b"\0" * 60_000_000, 9)
        chunks.insert(
            1,
            rng.choice(
                (
                    (b"zTXt", b"a\0\0" + bomb),
                    (b"iCCP", b"x\0\0" + bomb),
                    (b"eXIf", rng.randbytes(900)),
                    (b"tRNS", b"x" * 999),
                )
            ),
        )
    else:
        name = bytes(rng.randrange(65, 91) for _ in range(4))
    if what != 1 and what != 3:
        chunks[index] = (name, content)
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return data[:8] + body


def many_scans(count: int, side: int) -> bytes:
    """A progressive JPEG with one of its scans repeated: each costs a pass over the whole picture."""
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    starts = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    last = data[starts[-1] : data.rindex(b"\xff\xd9")]
    return data[: starts[-1]] + last * count + b"\xff\xd9"


def picture_bytes(rng: Random) -> tuple[str, bytes]:
    kind = rng.choice(FORMATS)
    path = good_picture(kind, rng.randrange(2))
    data = path.read_bytes()
    what = rng.randrange(10)
    if kind in ("PNG", "palette", "16-bit", "APNG") and what < 5:
        data = spoil_png(rng, data)
    elif kind == "progressive" and what < 2:
        data = many_scans(rng.choice((50, 2000)), rng.choice((64, 2000)))
    elif what == 9:
        data = data[: rng.randrange(len(data))]
    else:
        data = spoil_bytes(rng, data, rng.randint(1, 6))
    return path.suffix, data


def picture_files(rng: Random, here: Path) -> Trial:
    folder = pictures(here / "pictures", 1)
    for index in range(rng.randint(1, 4)):
        suffix, data = picture_bytes(rng)
        name = f"{rng.choice(('x', 'y' * 200, 'ü', 'a-masklabel'))}{index}{suffix if rng.random() < 0.9 else '.png'}"
        (folder / name).write_bytes(data)
    mask = None
    if rng.random() < 0.2:
        (here / "masks").mkdir()
        suffix, data = picture_bytes(rng)
        (here / "masks" / f"0{suffix}").write_bytes(data)
        mask = "./masks"
    if rng.random() < 0.5 and mask is None:
        return Trial(["lint", str(folder), *rng.choice(([], ["--json"], ["--html", str(here / "page.html")]))])
    tree = copy.deepcopy(PRESET)
    tree["dataset"]["folders"][0]["mask"] = mask
    write_yaml(here / "p.yaml", tree)
    return Trial([rng.choice(("check", "lint")), str(here / "p.yaml")])


# ------------------------------------------------------------ run folders


def good_run(runs: Path, name: str) -> Path:
    """What a run of four steps leaves, by hand."""
    from emotrain.runs.folder import create_run
    from emotrain.train.checkpoint import Manifest, entry_of

    folder = create_run(runs, name, PRESET, base_sha256="0" * 64, dataset_sha256="1" * 64)
    folder.update_info(
        finished="2026-11-22T09:16:19+00:00",
        steps=4,
        stop_reason="max_steps",
        best_step=2,
        best_loss=0.1,
        lora="lora.safetensors",
    )
    folder.metrics_path.write_text(
        "".join(json.dumps({"step": n, "loss": 0.1, "scalar": 0.0}) + "\n" for n in range(1, 5)), encoding="utf-8"
    )
    losses = [{"step": n, "samples": [[f"{n % 5}.png", 0.2 * (n % 5), 0.1]]} for n in range(1, 41)]
    (folder.path / "picture_losses.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in losses), encoding="utf-8"
    )
    (folder.path / "validation.jsonl").write_text(json.dumps({"step": 2, "loss": 0.1}) + "\n", encoding="utf-8")
    folder.lora_path.write_bytes(LORAS["kohya"])
    step = folder.checkpoints_dir / "step-00000004"
    step.mkdir(parents=True)
    (step / "state.json").write_bytes(b"{}")
    (step / "MANIFEST.json").write_bytes(Manifest(4, {"state.json": entry_of(b"{}")}).to_bytes())
    return folder.path


def run_folder(rng: Random, here: Path) -> Trial:
    runs = here / "runs"
    good_run(runs, "good")
    bad = good_run(runs, "bad")
    (bad / ".lock").write_bytes(as_json({"pid": 1, "host": "elsewhere", "birth": "x/1"}))
    files = sorted(path for path in bad.rglob("*") if path.is_file() and path.name != "lora.safetensors")
    for chosen in rng.sample(files, rng.choice((1, 1, 2))):
        content = chosen.read_bytes()
        if chosen.suffix == ".jsonl":
            lines = content.splitlines()
            lines[rng.randrange(len(lines))] = spoil_json(rng, json.loads(lines[0]))
            chosen.write_bytes(b"\n".join(lines))
        elif chosen.suffix == ".yaml":
            write_yaml(chosen, spoil_tree(rng, PRESET, 2))
        elif rng.random() < 0.1:
            chosen.unlink()
            spoil_place(rng, chosen)
        else:
            chosen.write_bytes(
                forged(spoil_json(rng, json.loads(content)))
                if chosen.name == "MANIFEST.json"
                else spoil_json(rng, json.loads(content))
            )
    where = ["--runs-dir", str(runs)]
    what = rng.randrange(8)
    if what <= 2:
        return Trial(["runs", "list", *where, *rng.choice(([], ["--json"]))], lists_the_good_one)
    commands = [
        ["runs", "show", "bad", *where], ["runs", "compare", "bad", "good", *where, "--json"], ["images", "bad",
        *where],
        ["runs", "compare", "good", "bad", *where], ["resume", str(bad), "--plain"], ["runs", "show", "good", *where],
    ]  # fmt: skip
    return Trial(rng.choice(commands))


def lists_the_good_one(out: str, err: str) -> str | None:
    return None if "good" in out and not err.startswith("error") else "a bad run broke `runs list`"


def spoil_place(rng: Random, path: Path) -> None:
    """A folder, a link or a pipe where a file should be."""
    what = rng.randrange(4)
    if what == 0:
        path.mkdir()
    elif what == 1:
        os.mkfifo(path)
    elif what == 2:
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/zero")


def forged(manifest: bytes) -> bytes:
    """A spoiled manifest with its own sha256 made right."""
    from emotrain.files import encode_json
    from emotrain.train.checkpoint import _digest

    with contextlib.suppress(ValueError, RecursionError, TypeError):
        fields = json.loads(manifest)
        if isinstance(fields, dict):
            fields.pop("sha256", None)
            return encode_json({**fields, "sha256": _digest(fields)})
    return manifest


def loss_log(rng: Random, here: Path) -> Trial:
    rows = [{"step": n, "loss": 1.0 / n, "lr": 1.0} for n in range(1, 30)]
    if rng.random() < 0.5:
        lines = [as_json(row) for row in rows]
        lines[rng.randrange(len(lines))] = spoil_json(rng, rows[0])
        (here / "log.jsonl").write_bytes(b"\n".join(lines))
        return Trial(["replay", str(here / "log.jsonl")])
    text = "step,loss\n" + "".join(f"{row['step']},{row['loss']}\n" for row in rows)
    (here / "log.csv").write_bytes(spoil_bytes(rng, text.encode(), rng.randint(1, 5)))
    return Trial(["replay", str(here / "log.csv"), *rng.choice(([], ["--json"]))])


KINDS: dict[str, tuple[Make, int]] = {  # what is spoiled, and its share
    "preset, as text": (preset_text, 5),
    "preset, its values": (preset_tree, 6),
    "--set": (preset_set, 5),
    "LoRA file": (lora, 6),
    "model file": (model_file, 3),
    "model folder, JSON": (model_folder, 4),
    "model folder, weights": (model_weights, 2),
    "captions": (captions, 5),
    "pictures and masks": (picture_files, 6),
    "run folder": (run_folder, 6),
    "loss log": (loss_log, 2),
}

ASSETS = Path(__file__).parents[2] / "emotrain" / "assets"
SHELF = Path()
LORAS: dict[str, bytes] = {}
MODEL_HEADERS: dict[str, Any] = {}


# ------------------------------------------------------------ trials


class TooLongError(BaseException):
    """Ten seconds are over."""


def run_trial(kind: str, number: int, seed: int, root: Path) -> Outcome:
    """Make the input of a trial in an empty folder and give it to the command line."""
    here = root / "trial"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    rng = Random(f"{seed}/{kind}/{number}")
    trial = KINDS[kind][0](rng, here)
    out, err = io.StringIO(), io.StringIO()
    began, code, fault = time.process_time(), None, None
    previous = [(sign, signal.signal(sign, _ring)) for sign in (signal.SIGPROF, signal.SIGALRM)]
    faulthandler.dump_traceback_later(GIVE_UP_S, exit=True)
    try:
        from emotrain.cli.app import main

        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        signal.setitimer(signal.ITIMER_REAL, WAIT_S)
        with contextlib.chdir(here), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = int(main(trial.words))
    except TooLongError as error:
        fault = f"over {LIMIT_S} s\n{''.join(traceback.format_exception(error)[-8:])}"
    except Exception as error:
        fault = f"traceback: {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for sign, handler in previous:
            signal.signal(sign, handler)
        faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - began
    shown = err.getvalue()
    first = next((line for line in shown.splitlines() if line.startswith("error")), shown.split("\n")[0])
    if fault is None:
        fault = (
            _fault(code, seconds, out.getvalue(), shown) or (trial.check and trial.check(out.getvalue(), shown)) or None
        )
    return Outcome(kind, number, trial.words, code, seconds, fault, first[:300])


def _ring(*_: Any) -> None:
    raise TooLongError


def _fault(code: int | None, seconds: float, out: str, err: str) -> str | None:
    if code == 1:
        kept = re.search(r"please report it with (\S+)", err)
        text = Path(kept[1]).read_text(encoding="utf-8") if kept and Path(kept[1]).is_file() else err
        return f"exit 1\n{text[-3000:]}"
    if "Traceback (most recent" in err + out:
        return f"traceback\n{err[-3000:]}"
    if seconds > LIMIT_S:
        return f"over {LIMIT_S} s"
    return None


def prepare(root: Path) -> None:
    """What many trials share: good LoRAs, headers and pictures; a cache and a temporary folder of their own."""
    global SHELF
    SHELF = root / "shelf"
    SHELF.mkdir(exist_ok=True)
    (root / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(root / "tmp")
    os.environ["EMOTRAIN_CACHE"] = str(root / "cache")
    LORAS.update(lora_files())
    MODEL_HEADERS.update(model_headers())
    from diffusers import StableDiffusionPipeline  # noqa: F401 - what is imported once takes no trial's time

    import emotrain.runs.rehearsal
    import emotrain.runs.start  # noqa: F401


def plan(trials: int, kinds: list[str]) -> list[tuple[str, int]]:
    """(kind, number) of each trial, by the kinds' shares."""
    total = sum(KINDS[kind][1] for kind in kinds)
    return [(kind, number) for kind in kinds for number in range(max(1, round(trials * KINDS[kind][1] / total)))]


def table(outcomes: list[Outcome]) -> list[str]:
    lines = [
        "| what is spoiled | trials | accepted | refused | tracebacks | exit 1 | over 10 s | other | slowest |",
        "|---" * 9 + "|",
    ]
    by_kind = collections.defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome)
    for kind, found in [*by_kind.items(), ("all", outcomes)]:
        faults = collections.Counter((outcome.fault or "held").split("\n")[0].split(":")[0] for outcome in found)
        known = [faults.pop(word, 0) for word in ("traceback", "exit 1", f"over {LIMIT_S} s")]
        faults.pop("held", None)
        accepted = sum(outcome.code == 0 for outcome in found)
        refused = sum(outcome.code not in (0, 1, None) for outcome in found)
        slowest = max(outcome.seconds for outcome in found)
        lines.append(
            f"| {kind} | {len(found):,} | {accepted:,} | {refused:,} | {' | '.join(map(str, known))} "
            f"| {faults.total()} | {slowest:.1f} s |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--only", help="KIND:NUMBER")
    parser.add_argument("--verbose", action="store_true", help="a line for every trial")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", NO_COLOR="1", TOKENIZERS_PARALLELISM="false")
    wanted = plan(options.trials, options.kind or list(KINDS))
    if options.only:
        kind, _, number = options.only.rpartition(":")
        wanted = [(kind, int(number))]
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for index, (kind, number) in enumerate(wanted):
            outcome = run_trial(kind, number, options.seed, Path(name))
            outcomes.append(outcome)
            if outcome.fault or options.only:
                print(
                    f"--only '{kind}:{number}'  {' '.join(outcome.words)[:300]!a}\n"
                    f"    {outcome.code} {outcome.first!a}\n    {outcome.fault}",
                    flush=True,
                )
            elif options.verbose:
                print(
                    f"{kind}:{number} {outcome.seconds:.1f} s {outcome.code} {' '.join(outcome.words)[:150]!a}\n"
                    f"    {outcome.first!a}"
                )
            if index % 100 == 99:
                print(f"{index + 1} of {len(wanted)}", file=sys.stderr, flush=True)
        if options.only and outcomes[0].fault:
            input(f"the input lies in {name}/trial; Enter removes it")
    lines = table(outcomes)
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any(outcome.fault for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
