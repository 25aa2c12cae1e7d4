"""From a folder of photographs and a model's file to a finished run, with two commands and no editing.

    python tests/bench/two_commands.py [--photographs 24] [--report FILE]

Three layouts: a folder of pictures with captions (`init`); kohya's, a folder `10_mika` and a TOML (`import`);
ai-toolkit's, a folder and a YAML (`import`). Each then runs for 3 steps of 512 pixels by `--set train.max_steps=3`;
its samples are of 256 pixels and 4 denoising steps, since the way is timed here and not the drawing on a CPU. The
photographs are blurred noise of 2,000 x 1,500 pixels, as JPEGs. The model is one SD 1.5 file in the original layout,
of random weights: a UNet of the real shape but 32 to 64 channels wide, a text encoder of two layers with 768
channels, a VAE of 16 channels. Seconds are wall clock and CPU of each command, the start of Python and its imports in
them.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import make_assets
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from report_page import picture

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

from original_files import clip_of, small_vae
from test_single_file import write_sd

KOHYA = """pretrained_model_name_or_path = "model.safetensors"
train_data_dir = "pictures"
output_name = "kohya"
network_module = "networks.lora"
network_dim = 16
network_alpha = 8
resolution = "512,512"
caption_extension = ".txt"
learning_rate = 1e-4
optimizer_type = "AdamW8bit"
lr_scheduler = "cosine"
max_train_epochs = 10
gradient_checkpointing = true
"""
AI_TOOLKIT = """job: extension
config:
  name: ai_toolkit
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: m1ka
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250}
      datasets:
        - {folder_path: pictures, caption_ext: txt, caption_dropout_rate: 0.05, resolution: [512]}
      train: {batch_size: 1, steps: 2000, optimizer: adamw8bit, lr: 1e-4, dtype: float32, noise_scheduler: ddpm}
      model: {name_or_path: model.safetensors, arch: sd15}
      sample: {sampler: ddpm, sample_every: 250, width: 512, height: 512, prompts: ["[trigger], a street"]}
"""
LAYOUTS = {
    "a folder": ("mika", [], "init mika model.safetensors -o run.yaml"),
    "kohya's": ("pictures/10_mika", ["kohya.toml", KOHYA], "import kohya.toml -o run.yaml"),
    "ai-toolkit's": ("pictures", ["job.yaml", AI_TOOLKIT], "import job.yaml -o run.yaml"),
}

RUN = "run run.yaml --set train.max_steps=3 --set sample.size=256 --set sample.steps=4 --plain"


def make_model(path: Path) -> None:
    """The file, and its tokenizer beside it."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as words:
        shutil.copytree(make_assets.ASSETS / "example", Path(words) / "base")
        (Path(words) / "names.json").write_text('["red apple", "green pear"]', encoding="utf-8")
        tokenizer = make_assets.make_clip_tokenizer(Path(words), 700)
    vae: Any = small_vae()
    levels = {"block_out_channels": (16,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
              "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
    vae = type(vae)(**{**dict(vae.config), **levels})
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 64, 64, 64), layers_per_block=2, cross_attention_dim=768,
        attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    parts = {"unet": unet, "vae": vae, "tokenizer": tokenizer, "text_encoder": clip_of(768, tokenizer, False)}
    write_sd(path, parts)


def timed(words: str, folder: Path) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command in `folder`."""
    environment = {**os.environ, "EMOTRAIN_CACHE": str(folder / "cache")}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "emotrain", *words.split()], cwd=folder, env=environment, capture_output=True, text=True
    )
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Make each layout and run its two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=24)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    machine = f"{platform.machine()}, load {os.getloadavg()[0]:.1f} before the start, {args.photographs} photographs"
    lines = ["# Two commands", "", "`python tests/bench/two_commands.py`", "", about, "", f"{machine}.", ""]
    lines += ["| layout | commands | wall clock | CPU |", "| --- | --- | --- | --- |"]
    rng = np.random.default_rng(4)
    for name, (pictures, config, first) in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            make_model(folder / "model.safetensors")
            (folder / pictures).mkdir(parents=True)
            for k in range(args.photographs):
                picture(rng, 2000, 1500).save(folder / pictures / f"{k:02d}.jpg", quality=90)
                (folder / pictures / f"{k:02d}.txt").write_text(f"m1ka, a street with {k} lamps", encoding="utf-8")
            if config:  # name, text
                (folder / config[0]).write_text(config[1], encoding="utf-8")
            for words in (first, RUN):
                wall, cpu = timed(words, folder)
                lines.append(f"| {name} | `emotrain {words}` | {wall:.0f} s | {cpu:.0f} s |")
                print(lines[-1], flush=True)
            assert (folder / "runs").is_dir()
            assert list(folder.glob("runs/*/lora.safetensors")), "no LoRA was handed over"
            assert list(folder.glob("runs/*/report.html")), "no page was written"
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
