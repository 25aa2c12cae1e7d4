"""`validate.likeness`: how alike the samples and the user's pictures are, as a vision model sees them.

A second witness beside the loss: CLIP-I or DINO of Ruiz et al. 2022 (arXiv:2208.12242, section 4.1), the mean cosine
similarity between the embeddings of all pairs of a drawn and a real picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from emotrain.config.schema import Preset
from emotrain.dataset.images import open_picture
from emotrain.errors import EmotrainError, ModelError
from emotrain.families.component import LOCAL, guard, refuse_filled_up
from emotrain.families.headers import read_json
from emotrain.runs.data import Pictures, evenly
from emotrain.train import rng
from emotrain.train.events import Event, LikenessMeasured, Notice, Phase

JOINT = ("clip", "siglip")  # with a text encoder beside; the picture's embedding is the one that both share
TOWERS = ("clip_vision_model", "siglip_vision_model")
DINO = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")  # the class token, as the paper takes it
KINDS = (*JOINT, *TOWERS, *DINO)
MOST_PICTURES = 32  # of the user's; with more, evenly spaced ones
WHAT = "name a folder of transformers with config.json, preprocessor_config.json and model.safetensors"

Embed = Callable[[Image.Image], Tensor]


def load_embedder(folder: Path) -> Embed:
    """A function from a picture to its embedding, float32 [D], of length 1; on the CPU.

    Raises:
        ModelError: no vision model of transformers, of a kind that is not known, or damaged.
    """
    where = str(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"`{where}` is no vision model", WHAT)
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind not in KINDS:
        hint = f"known are CLIP, SigLIP and DINO: {', '.join(KINDS)}"
        raise ModelError(f"`{where}` is of kind `{kind[:60]}`, which is no vision model that is known here", hint)
    if not (folder / "preprocessor_config.json").is_file():
        raise ModelError(f"`{where}` is without preprocessor_config.json, which says how it sees pictures", WHAT)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"`{where}` is without weights: there is no *.safetensors", WHAT)
    return guard(where, "", partial(_embedder, where, kind, config))


def refuse_unusable(folder: Path) -> None:
    """Refuse a folder whose model cannot be loaded, or does not make one embedding of a picture.

    Raises:
        ModelError: it does not.
    """
    with rng.untouched():
        embed = load_embedder(folder)
        grey = Image.new("RGB", (96, 64), "grey")
        found = guard(str(folder), "", lambda: embed(grey))
    if found.ndim != 1 or not torch.isfinite(found).all():
        raise ModelError(f"`{folder}` makes no embedding that could be compared", "the download may be damaged")


def _embedder(where: str, kind: str, config: dict[str, Any]) -> Embed:
    model, look = _model(where, kind, config), _processor(where)

    @torch.no_grad()
    def embed(image: Image.Image) -> Tensor:
        pixels = look(images=image, return_tensors="pt")["pixel_values"]
        if kind in JOINT:
            found = model.get_image_features(pixel_values=pixels).pooler_output
        else:
            seen = model(pixel_values=pixels)
            pooled = seen.get("image_embeds", seen.get("pooler_output"))
            found = seen.last_hidden_state[:, 0] if kind in DINO else pooled
        return normalize(found.float(), dim=-1)[0]

    return embed


def _model(where: str, kind: str, config: dict[str, Any]) -> Any:
    from transformers import AutoModel, CLIPVisionModelWithProjection

    classes = config.get("architectures")
    projects = isinstance(classes, list) and "CLIPVisionModelWithProjection" in classes
    loader: Any = CLIPVisionModelWithProjection if kind == "clip_vision_model" and projects else AutoModel
    more = {"add_pooling_layer": False} if kind == "vit" else {}  # DINO has no pooler, and its class token is taken
    model, found = loader.from_pretrained(
        where, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **LOCAL, **more
    )
    refuse_filled_up(where, found)
    return model.eval()


def _processor(where: str) -> Any:
    """The folder's own preprocessing, on PIL and numpy: torchvision need not be there."""
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    try:
        return AutoImageProcessor.from_pretrained(where, backend="pil", **LOCAL)
    except (ImportError, ValueError):  # a class that has no such form (DINOv3): it resizes, scales and normalises
        return ViTImageProcessorPil.from_pretrained(where, **LOCAL)


@dataclass
class Likeness:
    """The user's pictures as embeddings, and what was measured so far."""

    folder: Path  # of the vision model
    reference: Tensor  # embeddings of the user's pictures, float32 [N, D], each of length 1
    own: tuple[int, ...]  # which prompts count, by place: those with the trigger, or all
    notify: Callable[[Event], None]  # told of each value
    base: float | None = None  # the value of step 0
    last: float | None = None  # the newest value
    lora: float | None = None  # that of the LoRA file

    @property
    def among(self) -> float | None:
        """Mean cosine similarity of the pictures among themselves; None where there is only one."""
        count = len(self.reference)
        if count < 2:
            return None
        return float((self.reference @ self.reference.T).sum() - count) / (count * (count - 1))

    def measure(self, paths: Sequence[Path]) -> float | None:
        """The likeness of one step's samples, one path a prompt; None, and a notice, where it cannot be measured.

        Random states stay as they are, and the model is in memory only for the time that this takes.
        """
        name = "measuring the likeness"
        self.notify(Phase(name, 0, 1))
        try:
            with rng.untouched():
                seen = embeddings(self.folder, [paths[place] for place in self.own])
            return float((seen @ self.reference.T).mean())
        except (EmotrainError, OSError, MemoryError) as error:
            self.notify(Notice(f"the likeness was not measured: {str(error) or type(error).__name__}"))
            return None
        finally:
            self.notify(Phase(name, 1, 1))

    def at_step(self, step: int, paths: Sequence[Path]) -> None:
        """Measure the samples of a step and say the value; that of step 0 is the base model's."""
        if (value := self.measure(paths)) is None:
            return
        self.last = value
        if step == 0:
            self.base = value
        self.notify(LikenessMeasured(step, value, self.base, self.among))

    def of_lora(self, paths: Sequence[Path]) -> None:
        """Measure the samples that the LoRA file has drawn."""
        self.lora = self.measure(paths)

    def summary(self) -> dict[str, Any]:
        return {
            "model": self.folder.name,
            "base": self.base,
            "pictures": self.among,
            "last": self.last,
            "lora": self.lora,
        }

    def go_on(self, before: object) -> None:
        """Take the values of an earlier `summary` of the run, but the LoRA file's, which is written anew."""
        values = before if isinstance(before, dict) else {}
        self.base, self.last = (
            value if isinstance(value := values.get(key), float) else None for key in ("base", "last")
        )


def embeddings(folder: Path, paths: Sequence[Path]) -> Tensor:
    """Embeddings of pictures, float32 [N, D], each of length 1; the model is let go of again.

    Raises:
        EmotrainError: the model or a picture cannot be used.
    """
    embed = load_embedder(folder)
    return torch.stack([guard(str(folder), "", partial(embed, open_picture(path))) for path in paths])


def build_likeness(preset: Preset, pictures: Pictures, notify: Callable[[Event], None]) -> Likeness | None:
    """What compares the samples with the held-out pictures, or the training's where none are held out.

    None where the preset names no model, or draws no samples.

    Raises:
        ModelError: the folder cannot be used.
    """
    validate, sample = preset.validate_, preset.sample
    if validate.likeness is None or not sample.every or not sample.prompts:
        return None
    notify(Phase("looking at the pictures with the vision model"))
    folder = Path(validate.likeness)
    paths = [example.path for example in evenly(pictures.held_out or pictures.own, MOST_PICTURES)]
    with rng.untouched():
        reference = embeddings(folder, paths)
    trigger = preset.dataset.trigger
    called = [n for n, text in enumerate(sample.prompts) if "[trigger]" in text or (trigger and trigger in text)]
    notify(Phase("looking at the pictures with the vision model", 1, 1))
    return Likeness(folder, reference, tuple(called or range(len(sample.prompts))), notify)
