"""Do newer families learn? Small ones with random weights overfit four pictures, through the command line.

    python tests/bench/new_family.py [--families zimage klein klein-64 chroma krea2 qwen qwen21 anima flux3 sd3]
        [--steps 500] [--seeds 1] [--work DIR] [--report docs/benchmarks]

The denoiser (128 wide, 5 or 6 blocks) and the text encoders are random (32 wide, SD3's 48 to 128); the VAE is the
built-in models', so that a latent is a picture. Those of Qwen-Image's build (Krea 2, Anima, both Qwen-Images) are small
ones, trained on the four pictures first. klein-64 is klein with captions filled up to 64 tokens in place of 512.
Nothing pretrained helps: all that is learned is in the LoRA (rank 64, every layer that the family's may have).
`emotrain run` trains it at LR 1.0 on four of the built-in pictures, each with its name for a caption, and draws these
names. Distances are root mean squares over the pixels, in 0..1, to the pictures as the VAE shows them. A model that had
learned one mean picture for all captions would be as near to the others as to its own. The validation is that of
flipped training pictures, since none are held out, so that it does not show overfitting (where flipping is found
unfair, as with Qwen-Image 2.1, it is that of the pictures as they are).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_assets
import numpy as np
import torch
import torch.nn.functional as F
from by_hand import write_report
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "families"))

from newer_models import modular_pipeline_of, pipeline_of, save_folder  # noqa: E402

from emotrain.batch import Conditioning  # noqa: E402
from emotrain.cli.app import main as emotrain  # noqa: E402
from emotrain.families.krea2 import model as krea2  # noqa: E402
from emotrain.families.loading import load_family  # noqa: E402
from emotrain.families.qwen import model as qwen  # noqa: E402
from emotrain.families.table import ASSETS  # noqa: E402
from emotrain.lora.adapter import adapter_like  # noqa: E402
from emotrain.lora.file import read_lora  # noqa: E402

FAMILIES = ("zimage", "klein", "klein-64", "chroma", "krea2", "qwen", "qwen21", "anima", "flux3", "sd3")
MODULAR = ("qwen21", "flux3", "anima")  # kinds that diffusers has as modular blocks alone
VAE_WORDS = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "latent_channels", "norm_num_groups", "sample_size", "mid_block_add_attention",
)  # fmt: skip
PICTURES = ("balloon", "camera", "rose", "watermelon")


def denoiser(family: str) -> Any:
    """A random denoiser, 128 wide."""
    import diffusers

    if family.startswith("klein"):
        return diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=32, num_layers=2, num_single_layers=3, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=96, timestep_guidance_channels=32, mlp_ratio=3.0,
            axes_dims_rope=(8, 8, 8, 8), rope_theta=2000, guidance_embeds=False,
        )  # fmt: skip
    if family == "chroma":
        return diffusers.ChromaTransformer2DModel(
            in_channels=32, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=4,
            joint_attention_dim=32, axes_dims_rope=(8, 12, 12), approximator_num_channels=32,
            approximator_hidden_dim=64, approximator_layers=2,
        )  # fmt: skip
    if family == "krea2":
        return diffusers.Krea2Transformer2DModel(
            in_channels=32, num_layers=5, attention_head_dim=32, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=256, timestep_embed_dim=32, text_hidden_dim=32, num_text_layers=3,
            text_num_attention_heads=4, text_num_key_value_heads=4, text_intermediate_size=64,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
    if family == "qwen":
        return diffusers.QwenImageTransformer2DModel(
            in_channels=32, out_channels=8, num_layers=5, attention_head_dim=32, num_attention_heads=4,
            joint_attention_dim=32, axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
    if family == "qwen21":
        return diffusers.QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=5, attention_head_dim=32, num_attention_heads=4,
            context_in_dim=32, axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
    if family == "anima":
        return diffusers.CosmosTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=32, num_layers=5,
            text_embed_dim=32, adaln_lora_dim=64, max_size=(4, 64, 64), patch_size=(1, 2, 2),
            rope_scale=(1.0, 4.0, 4.0), concat_padding_mask=True, extra_pos_embed_type=None,
        )  # fmt: skip
    if family == "flux3":
        return diffusers.Flux3Transformer2DModel(
            in_channels=32, cond_in_channels=32, num_layers=2, num_single_layers=3, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=256, timestep_channels=32, axes_dims_rope=(8, 8, 8, 8),
        )  # fmt: skip
    if family == "sd3":
        return diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=5, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=128,
            pooled_projection_dim=48 + 64, pos_embed_max_size=24, qk_norm="rms_norm",
        )  # fmt: skip
    return diffusers.ZImageTransformer2DModel(
        in_channels=8, dim=128, n_layers=4, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32,
        axes_dims=[8, 12, 12], axes_lens=[1024, 64, 64],
    )  # fmt: skip


def vae(family: str) -> Any:
    """The built-in VAE; as FLUX.2's, which has statistics of patches in place of a scale."""
    import diffusers

    if family in ("krea2", "qwen", "anima"):
        return trained_vae(diffusers.AutoencoderKLQwenImage, 4, 3)
    if family == "qwen21":
        return trained_vae(diffusers.AutoencoderKLQwenImage21, 5, 4, decoder_base_dim=8)
    built_in = diffusers.AutoencoderKL.from_pretrained(ASSETS / "tiny-flux" / "vae")
    if not family.startswith(("klein", "flux3")):
        return built_in
    words = {key: built_in.config[key] for key in VAE_WORDS}
    own = diffusers.AutoencoderKLFlux2(**words, use_quant_conv=False, use_post_quant_conv=False)
    missing, odd = own.load_state_dict(built_in.state_dict(), strict=False)
    assert not odd, odd
    assert all(name.startswith("bn.") for name in missing), missing
    own.bn.running_var.fill_(1 / built_in.config.scaling_factor**2)
    return own


def pixels_of(path: Path) -> torch.Tensor:
    """A picture [1, 3, H, W] in -1..1."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1)
    return pixels.permute(2, 0, 1)[None]


def trained_vae(build: Any, levels: int, channels: int, steps: int = 250, **words: Any) -> Any:
    """A small one of Qwen-Image's build that shows the four pictures: in a random one they are nearly the same."""
    torch.manual_seed(0)
    words |= {"base_dim": 8, "z_dim": 8, "dim_mult": [1] * levels, "num_res_blocks": 1}
    own = build(**words, latents_mean=[0.0] * 8, latents_std=[1.0] * 8)
    films = torch.cat([pixels_of(ASSETS / "example" / f"{name}.png") for name in PICTURES])[:, :, None]
    films = F.pad(films, (0, 0) * 3 + (0, channels - 3), value=1.0)  # a fourth channel says that they are opaque
    optimizer = torch.optim.Adam(own.parameters(), lr=3e-3)
    for _ in range(steps):
        shown = own.decode(own.encode(films).latent_dist.mode()).sample
        (shown - films).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        latents = own.encode(films).latent_dist.mode().transpose(0, 1).flatten(1)
    own.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    return own.eval()


def without_template(tokenizer: Any) -> None:
    """Have the template left out of what the denoiser is given: 34 tokens of the release's, 149 of one a byte."""
    krea2.LEFT_OUT, krea2.SUFFIX = (len(tokenizer(text).input_ids) for text in (krea2.BEFORE, krea2.AFTER))
    qwen.LEFT_OUT = len(tokenizer(qwen.TEMPLATE.partition("{}")[0]).input_ids)


def stock(family: str) -> Any:
    """The stock pipeline around small random text encoders."""
    if family == "sd3":
        return sd3()
    if family in MODULAR:
        return modular_pipeline_of(family)
    return pipeline_of("flux2" if family.startswith("klein") else family)


def sd3() -> Any:
    """CLIPs of 48 and 64, T5 of 128, with the built-in models' tokenizers."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5TokenizerFast

    clip = CLIPTokenizer.from_pretrained(ASSETS / "tiny-flux" / "tokenizer")
    pieces = T5TokenizerFast.from_pretrained(ASSETS / "tiny-flux" / "tokenizer_2")
    config = CLIPTextConfig.from_pretrained(ASSETS / "tiny-flux" / "text_encoder")
    clips = []
    for width in (48, 64):
        own = CLIPTextConfig(**{**config.to_dict(), "hidden_size": width, "projection_dim": width})
        clips.append(CLIPTextModelWithProjection(own))
    return diffusers.StableDiffusion3Pipeline(
        vae=None, transformer=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clips[0], tokenizer=clip, text_encoder_2=clips[1], tokenizer_2=clip,
        text_encoder_3=make_assets.build_t5(pieces), tokenizer_3=pieces,
    )  # fmt: skip


def model(folder: Path, seed: int, family: str) -> Path:
    """The stock pipeline of a family around small random parts."""
    torch.manual_seed(seed)
    pipeline = stock(family)
    if family == "klein-64":
        pipeline.tokenizer.model_max_length = 64
    if family in ("krea2", "qwen"):
        without_template(pipeline.tokenizer)
    torch.manual_seed(seed)
    put = pipeline.update_components if family in MODULAR else pipeline.register_modules
    put(transformer=denoiser(family), vae=vae(family))
    for name, parameter in pipeline.transformer.named_parameters():
        if float(parameter.detach().abs().max()) == 0.0:  # Krea 2's blocks are shut where their gates' table is small
            torch.nn.init.normal_(parameter, std=1.0 if name.endswith("scale_shift_table") else 0.05)
        if "stream_modulations" in name and family == "flux3":  # gates of 0.04 otherwise, and no LoRA is on them
            parameter.data *= 25
    return save_folder(family, pipeline, folder)


def train(work: Path, steps: int, seed: int, family: str) -> Path:
    """One run; its folder."""
    pictures = work / "pictures"
    pictures.mkdir(parents=True)
    for name in PICTURES:
        shutil.copy(ASSETS / "example" / f"{name}.png", pictures)
        (pictures / f"{name}.txt").write_text(name)
    base = model(work / "model", seed, family)
    (work / "overfit.yaml").write_text(
        f"model: {base}\ndataset:\n  resolution: 64\n  buckets: {{step: 64, min: 64}}\n"
        "  captions: {dropout: 0.0, variants: 1}\n  folders: [{path: ./pictures}]\n"
        "network: {rank: 64, targets: all}\n"
        f"train: {{micro_batch_size: 4, max_steps: {steps}, seed: {seed}}}\n"
        f'validate: {{fraction: 0, every: 50}}\nstop: {{mode: "off"}}\nsave: {{every: {steps}}}\n'
        f"sample: {{every: {steps}, steps: 20, guidance: 1.0, prompts: [{', '.join(PICTURES)}]}}\n"
        "log: {tensorboard: false}\n"
    )
    code = emotrain(["run", str(work / "overfit.yaml"), "--plain", "--runs-dir", str(work / "runs")])
    assert code == 0, code
    return work / "runs" / "overfit"


def decoded(work: Path) -> dict[str, np.ndarray]:
    """The pictures as the VAE shows them, the nearest that a sample can come to."""
    family = load_family(str(work / "model"), device="cpu")
    found = {}
    for name in PICTURES:
        shown = family.decode_latents(family.encode_images(pixels_of(work / "pictures" / f"{name}.png")))[0]
        found[name] = ((shown / 2 + 0.5).clamp(0, 1)).permute(1, 2, 0).numpy()
    return found


def drawn(run: Path, step: int) -> dict[str, np.ndarray]:
    """The samples of a step, 0..1."""
    found = {}
    for number, name in enumerate(PICTURES, 1):
        with Image.open(run / "samples" / f"step-{step:08d}-{number}.png") as picture:
            found[name] = np.asarray(picture, dtype=np.float32) / 255
    return found


def distances(samples: dict[str, np.ndarray], pictures: dict[str, np.ndarray]) -> tuple[float, float, int]:
    """Root mean square to the own picture and to the others, in levels of 0..1; how many are nearest to their own."""
    table = np.array([[math.sqrt(((samples[a] - pictures[b]) ** 2).mean()) for b in PICTURES] for a in PICTURES])
    own = table.diagonal()
    others = (table.sum(1) - own) / (len(PICTURES) - 1)
    return float(own.mean()), float(others.mean()), int((table.argmin(1) == np.arange(len(PICTURES))).sum())


@torch.no_grad()
def caption_losses(work: Path, run: Path) -> tuple[float, float]:
    """Loss of the trained model at sigma 0.9 with each picture's own caption, and with the next one's."""
    family = load_family(str(work / "model"), device="cpu")
    clean = torch.cat([family.encode_images(pixels_of(work / "pictures" / f"{name}.png")) for name in PICTURES])
    texts = [family.encode_texts([name]) for name in PICTURES]
    family.free_encoders()
    lora = read_lora(run / "lora-last.safetensors")
    adapter_like(family.denoiser, *lora.of_part("transformer"), family=family.name)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy, at, sizes = 0.1 * clean + 0.9 * noise, torch.full((1,), 0.9), Conditioning(*[torch.zeros(1, 2).long()] * 3)
    found = []
    for shift in (0, 1):
        velocities = [
            family.predict(noisy[i : i + 1], at, texts[(i + shift) % len(texts)], sizes) for i in range(len(texts))
        ]
        found.append(float((torch.cat(velocities) - (noise - clean)).pow(2).mean()))
    return found[0], found[1]


def measure(work: Path, steps: int, seed: int, family: str) -> dict[str, Any]:
    """One row of the table."""
    run = train(work, steps, seed, family)
    pictures, info = decoded(work), json.loads((run / "run.json").read_text())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = (distances(drawn(run, step), pictures) for step in (0, steps))
    few = max(1, len(losses) // 10)
    return {
        "family": family, "seed": seed, "base": info["base_loss"], "best": info["best_loss"],
        "start": info["start_loss"], "last": sum(losses[-few:]) / few, "before": before, "after": after,
        "captions": caption_losses(work, run),
    }  # fmt: skip


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """The table."""
    heads = (
        "family", "seed", "base's training loss", "last tenth's", "validation, base", "validation, best",
        "to its own picture, before", "after", "to the others, after", "nearest to its own",
        "loss at 0.9, own caption", "another's",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        own, others, nearest = row["after"]
        cells = [
            row["family"], str(row["seed"]), f"{row['start']:.3f}", f"{row['last']:.3f}", f"{row['base']:.3f}",
            f"{row['best']:.3f}", f"{row['before'][0]:.3f}", f"{own:.3f}", f"{others:.3f}",
            f"{nearest} of {len(PICTURES)}", *(f"{loss:.3f}" for loss in row["captions"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="new-family-"))
    rows = []
    for family in args.families:
        for seed in range(args.seeds):
            rows.append(measure(work / f"{family}-{seed}", args.steps, seed, family))
            print(rows[-1], flush=True)
    lines = lines_of(rows)
    print("\n".join(lines))
    if args.report:
        about = (__doc__ or "").split("\n\n", 2)[2].splitlines()
        told = f"--families {' '.join(args.families)} --steps {args.steps} --seeds {args.seeds}"
        command = f"`python tests/bench/new_family.py {told}`"
        write_report(args.report / "new_family.md", ["# Newer families learn", "", command, "", *about, "", *lines])


if __name__ == "__main__":
    main()
