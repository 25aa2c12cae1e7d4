"""Make the built-in pictures and pretrain the built-in models, from fonts and icons to diffusers folders.

Every stage is seeded, counted in steps and resumable: run the same command again and it goes on from its last
checkpoint. On an idle 2-core machine: vae 14 minutes with two threads; tiny-sd about 47 minutes and tiny-flux about 36
with one thread each. `tests/bench/base_quality.py` scores the result.

    python tests/bench/make_assets.py pictures  WORK --noto NotoColorEmoji.ttf --mono DIR --contrast icons.json \
                                                --fluent3d DIR
    python tests/bench/make_assets.py vae       WORK
    python tests/bench/make_assets.py tiny-sd   WORK
    python tests/bench/make_assets.py tiny-flux WORK
    python tests/bench/make_assets.py export    WORK

Sources: Noto Color Emoji (font, SIL OFL 1.1; Debian package fonts-noto-color-emoji 2.042) for the base; Noto Emoji, the
same drawings in line art (font, SIL OFL 1.1; npm @fontsource/noto-emoji 5.3.2, weight 700), for the example; Fluent
Emoji high contrast (npm @iconify-json/fluent-emoji-high-contrast 1.2.6, MIT) for a second style that only benchmarks
use; Fluent Emoji 3D (npm @lobehub/fluent-emoji-3d 1.1.0, MIT), seen only by the VAE. Needs `resvg-py` besides
emotrain's own dependencies.

Shape letters: B pictures, C latent channels, H W latent height and width (16), S tokens, D width.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import random
import shutil
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

ASSETS = Path(__file__).parents[2] / "emotrain" / "assets"
SIGNS = Path(__file__).parent / "signs"  # the second style
TRIGGER = "inkmoji"
INK = "#1a1a2e"
SIZE = 64
NUM_BASE = 160  # pictures the denoisers learn
NUM_EXAMPLE = 32  # of these, in line art: the example data set
NUM_HELD_OUT = 72  # and its held-out part, used only to measure
CLIP_TOKENS = 32
T5_TOKENS = 24
SEED = 7
STEPS = {"vae": 2800, "tiny-sd": 9000, "tiny-flux": 9500}
# from this step on, with a second rise and fall of the learning rate
STYLES_FROM = {"tiny-sd": 6000, "tiny-flux": 6500}
STYLED = 0.45  # share of styled samples then

# What everybody recognises comes first; the rest is chosen so that no two pictures look alike.
FIRST = """1F600 1F60E 1F622 1F431 1F42F 1F427 1F419 1F40C 1F98A 1F353 1F355 1F354 1F335 1F951 1F344 1F680 1F692 1F308
1F47B 1F496 1F384 1F966 1F31E 1F438 1F433 1F98B 1F41E 1F349 1F34C 1F955 1F33D 1F369 1F382 2615 1F3B8 1F4F7 1F381 1F388
1F451 1F511 1F512 1F6B2 26F5 1F3E0 1F30D 1F525 2744 2B50 1F33B 1F339""".split()
DROP = set(
    """button letter square input sign arrow clock flag symbol circle keycap regional mahjong joker hand man woman
    person boy girl baby family couple men women ideograph squared zodiac with without skin type old prince princess
    bride face moon date trident cross triangle diamond card medium""".split()
)
BLOCKS = (
    (0x1F300, 0x1F64F),
    (0x1F680, 0x1F6FF),
    (0x1F900, 0x1F9FF),
    (0x1FA70, 0x1FAFF),
    (0x2600, 0x27BF),
)
FACES = "1F600 1F60E 1F622 1F621 1F60D 1F631 1F634 1F922 1F92F 1F976".split()


# ---------------------------------------------------------------- pictures


def caption_of(code: str) -> str:
    """The Unicode name in lower case: "1F42F" -> "tiger face"."""
    return unicodedata.name(chr(int(code, 16))).lower().replace("-", " ")


def on_white(picture: Image.Image, inner: int = 60) -> Image.Image:
    """Crop to the visible part, fit into `inner` pixels, centre on a white square of 64."""
    box = picture.getchannel("A").getbbox()
    picture = picture.crop(box)
    scale = inner / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIZE, SIZE), "white")
    square.alpha_composite(picture, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return square.convert("RGB")


def draw_noto(code: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    canvas = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((10, 10), chr(int(code, 16)), font=font, embedded_color=True)
    return on_white(canvas) if canvas.getchannel("A").getbbox() else None


class LineArt:
    """Noto Emoji, one colour, whose font comes in several files with a code range each."""

    def __init__(self, folder: Path) -> None:
        ranges = json.loads((folder / "unicode.json").read_text(encoding="utf-8"))
        self.fonts: list[tuple[list[tuple[int, int]], ImageFont.FreeTypeFont]] = []
        for part, said in ranges.items():
            file = folder / "files" / f"noto-emoji-{part.strip('[]')}-700-normal.woff"
            ends = [one.removeprefix("U+").split("-") for one in said.split(",")]
            spans = [(int(end[0], 16), int(end[-1], 16)) for end in ends]
            self.fonts.append((spans, ImageFont.truetype(str(file), size=109)))

    def draw(self, code: str) -> Image.Image:
        for spans, font in self.fonts:
            if any(first <= int(code, 16) <= last for first, last in spans):
                canvas = Image.new("RGBA", (200, 200), (255, 255, 255, 0))
                ImageDraw.Draw(canvas).text((20, 20), chr(int(code, 16)), font=font, fill=INK)
                return on_white(canvas)
        raise ValueError(f"no line art for {code}")


def draw_contrast(body: str, view: int) -> Image.Image:
    import io

    import resvg_py

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="256" height="256" viewBox="0 0 {view} {view}">'
        + body.replace("currentColor", INK)
        + "</svg>"
    )
    return on_white(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA"))


def blurred(picture: Image.Image) -> np.ndarray:
    """float32 [64, 64, 3] in 0..1 after a blur of 2 pixels: what the nearest-picture score compares."""
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(2)), np.float32) / 255


def choose_base(pictures: dict[str, Image.Image]) -> list[str]:
    """FIRST and FACES, then greedily the candidate that is farthest from everything chosen so far."""
    vectors = {code: blurred(picture).ravel() for code, picture in pictures.items()}
    chosen = [code for code in dict.fromkeys(FIRST + FACES) if code in pictures]
    rest = [
        code
        for code in sorted(pictures)
        if code not in chosen and len(caption_of(code).split()) <= 3 and not DROP & set(caption_of(code).split())
    ]
    nearest = {code: min(float(np.sum((vectors[code] - vectors[c]) ** 2)) for c in chosen) for code in rest}
    while len(chosen) < NUM_BASE:
        best = max(nearest, key=lambda code: nearest[code])
        del nearest[best]
        chosen.append(best)
        for code in nearest:
            nearest[code] = min(nearest[code], float(np.sum((vectors[code] - vectors[best]) ** 2)))
    return chosen


def make_pictures(work: Path, noto: Path, mono: Path, contrast: Path, fluent3d: Path) -> None:
    """Render the sets, choose the base, write the example folders into the package and the second style beside it."""
    font = ImageFont.truetype(str(noto), size=109)
    chars = json.loads((contrast.parent / "chars.json").read_text(encoding="utf-8"))
    icons = json.loads(contrast.read_text(encoding="utf-8"))
    noto_set: dict[str, Image.Image] = {}
    contrast_set: dict[str, Image.Image] = {}
    extra: list[Image.Image] = []
    for first, last in BLOCKS:
        for point in range(first, last + 1):
            code = f"{point:X}"
            name = chars.get(code.lower()) or chars.get(f"{code.lower()}-fe0f")
            if name not in icons["icons"] or not unicodedata.name(chr(point), ""):
                continue
            picture = draw_noto(code, font)
            if picture is None:
                continue
            noto_set[code] = picture
            icon = icons["icons"][name]
            contrast_set[code] = draw_contrast(icon["body"], icon.get("height", icons.get("height", 32)))
            path = fluent3d / f"{code.lower()}.webp"
            if path.exists():
                extra.append(on_white(Image.open(path).convert("RGBA")))
    base = choose_base(noto_set)
    order = base[:]
    random.Random(SEED).shuffle(order)
    example, held_out = order[:NUM_EXAMPLE], order[NUM_EXAMPLE : NUM_EXAMPLE + NUM_HELD_OUT]
    line_art = LineArt(mono)
    write_folder(ASSETS / "example", {c: line_art.draw(c) for c in example}, f"{TRIGGER}, ")
    write_folder(ASSETS / "example-heldout", {c: line_art.draw(c) for c in held_out}, f"{TRIGGER}, ")
    write_folder(SIGNS / "train", {c: contrast_set[c] for c in example}, f"{TRIGGER}, ")
    write_folder(SIGNS / "heldout", {c: contrast_set[c] for c in held_out}, f"{TRIGGER}, ")
    write_folder(work / "base", {c: noto_set[c] for c in base}, "")
    everything = np.stack([np.asarray(p) for p in [*noto_set.values(), *extra]])
    np.save(work / "all.npy", everything)
    (work / "names.json").write_text(json.dumps([caption_of(c) for c in noto_set]), encoding="utf-8")
    print(
        f"{len(noto_set)} Noto, {len(extra)} Fluent 3D;"
        f" base {len(base)}, example {len(example)}, held out {len(held_out)}"
    )


def edges(grey: np.ndarray) -> np.ndarray:
    """Strength of the brightness steps of a picture, float32 [64, 64] in 0..1."""
    padded = np.pad(grey, 1, mode="edge")
    across, down = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    return np.clip(np.hypot(across, down) * 2.5, 0, 1).astype(np.float32)


def thick(lines: np.ndarray) -> np.ndarray:
    """Lines widened to 3 pixels."""
    padded = np.pad(lines, 1)
    return np.max([padded[y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)], axis=0)


def in_styles(picture: np.ndarray) -> dict[str, np.ndarray]:
    """A picture, uint8 [64, 64, 3], in styles that are computed: what teaches a denoiser that styles exist at all.

    The example's own style is not among them.
    """
    rgb = picture.astype(np.float32) / 255
    grey = rgb @ np.float32([0.299, 0.587, 0.114])
    lines = edges(grey)
    white, navy = np.float32([1, 1, 1]), np.float32([0.1, 0.15, 0.4])
    stamp = (grey < 0.6).astype(np.float32)[..., None]
    styles = {
        "grey": np.repeat(grey[..., None], 3, 2),
        "sepia": grey[..., None] * np.float32([1.0, 0.87, 0.7]),
        "negative": 1 - rgb,
        "pencil": np.repeat(1 - lines[..., None], 3, 2),
        "marker": 1 - np.minimum(thick(lines) * 1.5, 1)[..., None] * (1 - np.float32([0.5, 0.1, 0.1])),
        "neon": lines[..., None] * np.float32([0.2, 1.0, 0.8]),
        "stamp": white * (1 - stamp) + navy * stamp,
        "poster": np.round(rgb * 2) / 2,
    }
    return {name: (np.clip(out, 0, 1) * 255).round().astype(np.uint8) for name, out in styles.items()}


def write_folder(folder: Path, pictures: dict[str, Image.Image], prefix: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for code, picture in sorted(pictures.items()):
        stem = caption_of(code).replace(" ", "-")
        picture.save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(prefix + caption_of(code) + "\n", encoding="utf-8", newline="\n")


def read_folder(folder: Path) -> tuple[list[str], np.ndarray]:
    """Captions and uint8 [N, 64, 64, 3], sorted by file name."""
    paths = sorted(folder.glob("*.png"))
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
    return captions, np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


# ---------------------------------------------------------------- checkpoints


class Progress:
    """Saves model, averaged weights, optimizer and step; a second call of the same stage goes on from there."""

    def __init__(
        self,
        work: Path,
        stage: str,
        modules: dict[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer,
    ):
        self.path = work / f"{stage}.pt"
        self.modules, self.optimizer, self.stage = modules, optimizer, stage
        self.ema = {k: {n: t.detach().clone().float() for n, t in m.state_dict().items()} for k, m in modules.items()}
        self.step = 0
        self.started, self.seconds = time.monotonic(), 0.0
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(saved["modules"][key])
            optimizer.load_state_dict(saved["optimizer"])
            self.ema, self.step, self.seconds = saved["ema"], saved["step"], saved["seconds"]

    def average(self, decay: float) -> None:
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, module in self.modules.items():
                for name, tensor in module.state_dict().items():
                    if tensor.is_floating_point():
                        self.ema[key][name].lerp_(tensor.float(), 1 - decay)

    def save(self) -> None:
        seconds = self.seconds + time.monotonic() - self.started
        state = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "step": self.step,
            "seconds": seconds,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def report(self, loss: float, total: int) -> None:
        minutes = (self.seconds + time.monotonic() - self.started) / 60
        print(f"{self.stage} step {self.step}/{total} loss {loss:.4f} {minutes:.1f} min", flush=True)


def set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, total: int) -> None:
    """100 steps of warm-up, flat, linear to zero over the last 30 %."""
    factor = min(1.0, (step + 1) / 100, max(0.0, (total - step) / (0.3 * total)))
    for group in optimizer.param_groups:
        group["lr"] = peak * factor


# ---------------------------------------------------------------- VAE


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 3, 64, 64] in -1..1. Flips; some pictures with turned hues, in grey, or in two inks (styles not seen yet)."""
    draw = torch.rand(pixels.shape[0], 6, generator=generator)
    out = []
    for picture, u in zip(pixels, draw, strict=True):
        if u[0] < 0.5:
            picture = picture.flip(-1)
        if u[1] < 0.25:
            picture = picture[torch.randperm(3, generator=generator)]
        elif u[1] < 0.35:
            picture = picture.mean(0, keepdim=True).expand(3, -1, -1)
        elif u[1] < 0.5:
            mask = (picture.mean(0, keepdim=True) > 1.6 * u[2] - 0.8).float()
            ink = torch.tensor(colorsys.hsv_to_rgb(float(u[3]), float(u[4]), 0.6 * float(u[5]))) * 2 - 1
            picture = mask + (1 - mask) * ink[:, None, None]
        if u[2] < 0.05:
            picture = -picture
        out.append(picture)
    return torch.stack(out)


def chroma(pixels: Tensor) -> Tensor:
    """Colour differences R-G, B-G and R-B: [B, 3, H, W] -> [B, 3, H, W]."""
    red, green, blue = pixels.unbind(1)
    return torch.stack([red - green, blue - green, red - blue], 1)


def vae_loss(decoded: Tensor, pixels: Tensor, posterior: Any) -> Tensor:
    error = decoded - pixels
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    colour = (chroma(decoded) - chroma(pixels)).pow(2).mean()
    return error.abs().mean() + error.pow(2).mean() + 0.5 * edges + 2 * colour + 2e-4 * posterior.kl().mean() / 2048


def train_vae(work: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    data = torch.from_numpy(np.load(work / "all.npy")).permute(0, 3, 1, 2)
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    progress = Progress(work, "vae", {"vae": vae}, optimizer)
    while progress.step < steps:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + progress.step)
        index = torch.randint(len(data), (16,), generator=generator)
        pixels = augment(data[index].float() / 127.5 - 1, generator).contiguous(memory_format=torch.channels_last)
        set_lr(optimizer, 2.5e-3, progress.step, steps)
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        loss = vae_loss(vae.decode(latents).sample, pixels, posterior)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.step += 1
        progress.average(0.998)
        if progress.step % 100 == 0:
            progress.report(loss.item(), steps)
            progress.save()
    progress.save()


def load_vae(work: Path) -> Any:
    """The averaged VAE, scaled by the spread of the base pictures' own latents (no shift is known to SD)."""
    vae = build_vae().eval().requires_grad_(False)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["ema"]["vae"])
    latents = encode(vae, read_folder(work / "base")[1])
    vae.register_to_config(shift_factor=0.0, scaling_factor=round(1 / float(latents.pow(2).mean().sqrt()), 4))
    return vae


@torch.no_grad()
def encode(vae: Any, pictures: np.ndarray) -> Tensor:
    """uint8 [N, 64, 64, 3] -> raw posterior means [N, 8, 16, 16]."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(32)])


# ---------------------------------------------------------------- text


def corpus(work: Path) -> list[str]:
    captions, _ = read_folder(work / "base")
    return captions * 4 + json.loads((work / "names.json").read_text(encoding="utf-8"))


def trained(tokenizer: Any, trainer: Any, work: Path, name: str) -> Any:
    """What a tokenizer learned from the corpus, kept for all stages.

    The trainers break ties differently each time, and a resumed model must go on reading the same pieces.
    """
    path = work / f"{name}-pieces.json"
    if not path.exists():
        tokenizer.train_from_iterator(corpus(work), trainer)
        path.write_text(tokenizer.to_str(), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))["model"]


def make_clip_tokenizer(work: Path, vocab_size: int = 2000) -> Any:
    """Byte-level BPE with all 256 bytes and all 256 word-ending bytes, so that no text is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer_bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer_bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learned = trained(trainer_bpe, trainer, work, "clip")["merges"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in learned]
    words = alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in merges]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=CLIP_TOKENS)


def make_t5_tokenizer(work: Path, vocab_size: int = 1400) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,.'\"-!?()[]:;_&%+/")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    vocab = [tuple(item) for item in trained(unigram, trainer, work, "t5")["vocab"]]
    known = {word for word, _ in vocab}
    vocab += [(letter, -12.0) for letter in letters if letter not in known]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_TOKENS)


def build_clip(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )


def template(caption: str, rng: random.Random) -> str:
    """10 % empty; half plain; the rest behind a random word, so that a trigger nobody knows is passed over."""
    u = rng.random()
    if u < 0.1:
        return ""
    if u < 0.6:
        return caption
    if u < 0.9:
        word = "".join(rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
        return f"{word}, {caption}" if rng.random() < 0.7 else f"{word} style, {caption}"
    return rng.choice(["a picture of {}", "{} icon", "an emoji of {}"]).format(caption)


def ids_of(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


# ---------------------------------------------------------------- denoisers


def build_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 4),
        norm_num_groups=16,
    )


def build_flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def sd_scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2*W/2, 4C], the token order of FluxPipeline."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def sd_loss(parts: dict[str, Any], texts: list[str], latents: Tensor, generator: torch.Generator) -> Tensor:
    """v-prediction with zero terminal SNR (Salimans & Ho 2022; Lin et al. 2024)."""
    scheduler = parts["scheduler"]
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    embeds = parts["clip"](ids_of(parts["clip_tokenizer"], texts, CLIP_TOKENS)).last_hidden_state
    prediction = parts["denoiser"](noisy, timesteps, embeds).sample
    return F.mse_loss(prediction.float(), scheduler.get_velocity(latents, noise, timesteps))


def flux_loss(parts: dict[str, Any], texts: list[str], latents: Tensor, generator: torch.Generator) -> Tensor:
    """Rectified flow, timesteps half uniform and half logit-normal (Esser et al. 2024)."""
    noise = torch.randn(latents.shape, generator=generator)
    uniform = torch.rand(len(latents), generator=generator)
    normal = torch.sigmoid(torch.randn(len(latents), generator=generator))
    sigmas = torch.where(torch.arange(len(latents)) % 2 == 0, uniform, normal)
    noisy = torch.lerp(latents, noise, sigmas[:, None, None, None])
    pooled = parts["clip"](ids_of(parts["clip_tokenizer"], texts, CLIP_TOKENS)).pooler_output
    embeds = parts["t5"](ids_of(parts["t5_tokenizer"], texts, T5_TOKENS)).last_hidden_state
    side = latents.shape[-1] // 2
    image_ids = torch.zeros(side, side, 3)
    image_ids[..., 1] = torch.arange(side)[:, None]
    image_ids[..., 2] = torch.arange(side)[None, :]
    prediction = parts["denoiser"](
        hidden_states=pack(noisy),
        timestep=sigmas,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        txt_ids=torch.zeros(T5_TOKENS, 3),
        img_ids=image_ids.reshape(-1, 3),
    ).sample
    return F.mse_loss(prediction.float(), pack(noise - latents))


def build_parts(work: Path, name: str) -> dict[str, Any]:
    parts: dict[str, Any] = {"clip_tokenizer": make_clip_tokenizer(work)}
    parts["clip"] = build_clip(parts["clip_tokenizer"])
    if name == "tiny-flux":
        parts["t5_tokenizer"] = make_t5_tokenizer(work)
        parts["t5"] = build_t5(parts["t5_tokenizer"])
        parts["denoiser"] = build_flux()
    else:
        parts["scheduler"] = sd_scheduler()
        parts["denoiser"] = build_unet()
    return parts


def texts_and_latents(
    name: str, step: int, order: list[int], captions: list[str], latents: dict[str, Tensor]
) -> tuple[list[str], Tensor]:
    """What one step is trained on; from STYLES_FROM on, some of it styled and said to be so."""
    rng = random.Random(SEED * 9_000_011 + step)
    texts, rows = [], []
    for i in order:
        style = ""
        if step >= STYLES_FROM.get(name, 10**9) and rng.random() < STYLED:
            style = rng.choice([key for key in latents if key])
        said = rng.choice([f"{style}, ", f"{style} style, "]) + captions[i] if style else template(captions[i], rng)
        texts.append(said)
        rows.append(latents[style][i])
    return texts, torch.stack(rows)


def all_latents(vae: Any, pictures: np.ndarray) -> dict[str, Tensor]:
    """Scaled latents [N, C, H, W] of the plain pictures ("") and of each style."""
    sets = {"": pictures}
    for picture in pictures:
        for style, styled in in_styles(picture).items():
            sets[style] = np.concatenate([sets[style], styled[None]]) if style in sets else styled[None]
    return {style: encode(vae, several) * vae.config.scaling_factor for style, several in sets.items()}


def train_denoiser(work: Path, name: str, steps: int) -> None:
    """Pictures first, then (STYLES_FROM) pictures and styles; each part with its own rise and fall of the rate."""
    torch.manual_seed(SEED)
    captions, pictures = read_folder(work / "base")
    latents = all_latents(load_vae(work), pictures)
    parts = build_parts(work, name)
    modules = {key: part for key, part in parts.items() if isinstance(part, torch.nn.Module)}
    params = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    progress = Progress(work, name, modules, optimizer)
    loss_of = flux_loss if name == "tiny-flux" else sd_loss
    styles_from = STYLES_FROM.get(name, steps)
    running = 0.0
    while progress.step < steps:
        step = progress.step
        generator = torch.Generator().manual_seed(SEED * 7_000_003 + step)
        epoch_order = np.random.default_rng([SEED, step // 10]).permutation(len(captions))  # 10 steps of 16 an epoch
        order = [int(i) for i in epoch_order[(step % 10) * 16 : (step % 10) * 16 + 16]]
        texts, rows = texts_and_latents(name, step, order, captions, latents)
        if step < styles_from:
            set_lr(optimizer, 1.2e-3, step, styles_from)
        else:
            set_lr(optimizer, 1.0e-3, step - styles_from, steps - styles_from)
        loss = loss_of(parts, texts, rows, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        progress.step += 1
        progress.average(0.998)
        running += (loss.item() - running) / min(progress.step, 200)
        if progress.step % 200 == 0:
            progress.report(running, steps)
            progress.save()
    progress.save()


# ---------------------------------------------------------------- export


def assemble(work: Path, name: str) -> Any:
    """The diffusers pipeline with averaged weights, in float32."""
    parts = build_parts(work, name)
    saved = torch.load(work / f"{name}.pt", weights_only=True)
    for key, state in saved["ema"].items():
        parts[key].load_state_dict(state)
        parts[key].eval()
    vae = load_vae(work)
    if name == "tiny-flux":
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=vae,
            text_encoder=parts["clip"],
            tokenizer=parts["clip_tokenizer"],
            text_encoder_2=parts["t5"],
            tokenizer_2=parts["t5_tokenizer"],
            transformer=parts["denoiser"],
        )
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=parts["clip"],
        tokenizer=parts["clip_tokenizer"],
        unet=parts["denoiser"],
        scheduler=parts["scheduler"],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(work: Path, names: list[str]) -> None:
    for name in names:
        if not (work / f"{name}.pt").exists():
            continue
        target = ASSETS / name
        shutil.rmtree(target, ignore_errors=True)
        pipeline = assemble(work, name).to(torch.float16)
        pipeline.save_pretrained(target, safe_serialization=True)
        size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
        print(f"{target.name}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["pictures", "vae", "tiny-sd", "tiny-flux", "export"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--noto", type=Path)
    parser.add_argument("--mono", type=Path)
    parser.add_argument("--contrast", type=Path)
    parser.add_argument("--fluent3d", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    steps = args.steps or STEPS.get(args.stage, 0)
    if args.stage == "pictures":
        make_pictures(args.work, args.noto, args.mono, args.contrast, args.fluent3d)
    elif args.stage == "vae":
        train_vae(args.work, steps)
    elif args.stage == "export":
        export(args.work, ["tiny-sd", "tiny-flux"])
    else:
        train_denoiser(args.work, args.stage, steps)


if __name__ == "__main__":
    main()
