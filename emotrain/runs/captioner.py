"""Captions by a model that the user has: a folder of transformers, for image to text or for tags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from emotrain.errors import ModelError
from emotrain.families.component import guard
from emotrain.families.headers import read_json

WRITERS = ("blip", "git", "vision-encoder-decoder")  # they take pixels alone
MAX_TOKENS = 96  # of a caption
LIKELY = 0.35  # probability from where a tagger's tag is taken


def load_captioner(folder: Path) -> Callable[[Image.Image], str]:
    """A function from a picture to its caption.

    Raises:
        ModelError: no folder of transformers, of a kind that is not known, or damaged.
    """
    where = str(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"`{where}` is no captioning model", "name a folder of transformers: config.json and its files"
        )
    config = read_json(folder / "config.json")
    classes = config.get("architectures")
    is_tagger = isinstance(classes, list) and str(classes[0] if classes else "").endswith("ForImageClassification")
    if not is_tagger and config.get("model_type") not in WRITERS:
        raise ModelError(
            f"`{where}` is of kind `{str(config.get('model_type'))[:60]}`, which writes no captions here",
            f"known are {', '.join(WRITERS)}, and image classifiers as taggers",
        )
    return guard(where, "", lambda: _tagger(where) if is_tagger else _writer(where))


def _load(kind: Any, where: str) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kind.from_pretrained(where, use_safetensors=True, local_files_only=True, trust_remote_code=False)
    return model.to(device).eval()


def _processor(where: str) -> Callable[[Any, Image.Image], torch.Tensor]:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(where, local_files_only=True, trust_remote_code=False)

    def pixels(model: Any, image: Image.Image) -> torch.Tensor:
        found: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return found.to(model.device, model.dtype)

    return pixels


def _writer(where: str) -> Callable[[Image.Image], str]:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    pixels = _processor(where)
    tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    model = _load(AutoModelForImageTextToText, where)

    @torch.no_grad()
    def write(image: Image.Image) -> str:
        tokens = model.generate(pixel_values=pixels(model, image), max_new_tokens=MAX_TOKENS, do_sample=False)
        return " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())

    return write


def _tagger(where: str) -> Callable[[Image.Image], str]:
    from transformers import AutoModelForImageClassification

    pixels = _processor(where)
    model = _load(AutoModelForImageClassification, where)
    many = model.config.problem_type == "multi_label_classification"

    @torch.no_grad()
    def tag(image: Image.Image) -> str:
        logits = model(pixel_values=pixels(model, image)).logits[0].float()
        scores = logits.sigmoid() if many else logits.softmax(0)
        order = scores.argsort(descending=True).tolist()
        chosen = [index for index in order if scores[index] >= LIKELY] if many else order[:1]
        return ", ".join(" ".join(str(model.config.id2label[index]).split()) for index in chosen)

    return tag
