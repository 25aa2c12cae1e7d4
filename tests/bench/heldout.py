"""Measures on the held-out part of the example style: loss with right and wrong captions, samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from emotrain.config.schema import Folder
from emotrain.dataset.buckets import BucketRules
from emotrain.dataset.encode import prepare
from emotrain.dataset.scan import scan
from emotrain.dataset.settings import LoaderSettings
from emotrain.diffusion import build_objective
from emotrain.families.common import DrawRequest
from emotrain.families.loading import load_family
from emotrain.families.sampling import draw_sample
from emotrain.lora.adapter import adapter_like
from emotrain.lora.file import read_lora
from emotrain.train.losses import GOLDEN, sample_losses, timesteps_at

TRIGGER = "inkmoji"
DRAWS = 8


@dataclass
class Measured:
    """Losses per held-out picture, float64 [N] each."""

    base: np.ndarray
    right: np.ndarray
    wrong: np.ndarray

    def fall(self) -> float:
        """Share of the base's loss that the LoRA takes away."""
        return float(1 - self.right.mean() / self.base.mean())

    def caption_gap(self) -> tuple[float, float]:
        """Mean of wrong - right, and how many standard errors over pictures that is."""
        gap = self.wrong - self.right
        error = gap.std(ddof=1) / math.sqrt(len(gap))
        return float(gap.mean()), float(gap.mean() / error)


def base_of(model: str) -> str:
    """A built-in model by its name, any other by its folder."""
    return model if "/" in model else f"builtin:{model}"


class Bench:
    """A built-in model with the held-out pictures encoded."""

    def __init__(self, model: str, folder: str = "builtin:example-heldout", family: Any = None) -> None:
        self.family = family or load_family(base_of(model))
        self.objective = build_objective(self.family.prediction, self.family.scheduler_config)
        examples = scan((Folder(path=folder),)).examples
        settings = LoaderSettings(BucketRules((64,), 8, 64, 64), trigger=TRIGGER, dropout=0.0)
        self.data = prepare(self.family, examples, settings)
        self.captions = [example.captions[0] for example in self.data.examples]
        self.pictures = [Image.open(example.path).convert("RGB") for example in self.data.examples]
        self.batch = self.data.fixed([example.id for example in self.data.examples])[0]
        self.negative = self.family.encode_texts([""])
        self.adapter: Any = None
        self.plain: Any = None

    def load(self, lora: Path) -> None:
        """Put a LoRA file on the model."""
        file = read_lora(lora)
        self.adapter = adapter_like(self.family.denoiser, file.state, file.alphas, family=self.family.name)

    def wear(self, state: dict[str, torch.Tensor], alpha: float = 8.0) -> None:
        """Put adapter weights on the model, under the names that an adapter's own state has."""
        alphas = {key.rpartition(".lora_")[0]: alpha for key in state}
        self.adapter = adapter_like(self.family.denoiser, state, alphas, family=self.family.name)

    @torch.no_grad()
    def drift(self) -> float:
        """Mean squared change that the LoRA makes to predictions for captions without the trigger."""
        if self.plain is None:
            self.plain = self.family.encode_texts([text.removeprefix(f"{TRIGGER}, ") for text in self.captions])
        n = len(self.batch.ids)
        u = torch.tensor([(i + 0.5) / n for i in range(n)])
        timesteps = timesteps_at(self.family, self.objective, u, self.batch.latents)
        noise = torch.randn(self.batch.latents.shape, generator=torch.Generator().manual_seed(98))
        noisy = self.objective.add_noise(self.batch.latents, noise, timesteps)
        sizes = self.batch.conditioning
        on = self.family.predict(noisy, timesteps, self.plain, sizes)
        with self.adapter.off():
            off = self.family.predict(noisy, timesteps, self.plain, sizes)
        return float((on - off).pow(2).mean())

    @torch.no_grad()
    def losses(self, *, shift: int = 0, draws: int = DRAWS) -> np.ndarray:
        """Mean loss of each picture over fixed noise and stratified timesteps; captions moved on by `shift`."""
        n = len(self.batch.ids)
        order = [(i + shift) % n for i in range(n)]
        text = {key: value[order] for key, value in self.batch.text.items()}
        batch = replace(self.batch, text=text)
        total = torch.zeros(n, dtype=torch.float64)
        generator = torch.Generator().manual_seed(99)
        for draw in range(draws):
            u = torch.tensor([(draw + ((i + 0.5) * GOLDEN) % 1.0) / draws for i in range(n)])
            noise = torch.randn(batch.latents.shape, generator=generator)
            timesteps = timesteps_at(self.family, self.objective, u, batch.latents)
            total += sample_losses(self.family, self.objective, batch, noise, timesteps)
        return (total / draws).numpy()

    def measure(self) -> Measured:
        """Base, LoRA with right captions, LoRA with wrong ones."""
        with self.adapter.off():
            base = self.losses()
        return Measured(base, self.losses(), self.losses(shift=7))

    def nearest_own(self, count: int = 32, seed: int = 5) -> tuple[int, list[Image.Image]]:
        """How many of `count` samples have their own styled picture as the nearest of all held-out ones."""
        bank = np.stack([blurred(picture) for picture in self.pictures])
        hits, samples = 0, []
        step = len(self.pictures) / count
        for place in range(count):
            index = int(place * step)
            text = {key: value[index : index + 1] for key, value in self.batch.text.items()}
            sample = draw_sample(self.family, DrawRequest(text, self.negative, 64, 64, seed + index))
            samples.append(sample)
            hits += int(np.argmin(((bank - blurred(sample)) ** 2).sum(1))) == index
        return hits, samples

    def real(self, count: int = 32) -> list[Image.Image]:
        """The pictures that `nearest_own` samples are compared with."""
        step = len(self.pictures) / count
        return [self.pictures[int(place * step)] for place in range(count)]


def blurred(picture: Image.Image) -> np.ndarray:
    """float32 [64*64*3] in 0..1 after a blur of 2 pixels."""
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(2)), np.float32).ravel() / 255


def sheet(rows: list[list[Image.Image]], path: Path) -> None:
    """One picture of rows of pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate([np.asarray(p) for p in row], 1) for row in rows])).save(path)
