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
from emotrain.runs.chat_captioner import LOCAL, is_asked, load_asked

WRITERS = ("blip", "git", "vision-encoder-decoder")  # they take pixels alone
MAX_TOKENS = 96  # of a caption
LIKELY = 0.35  # probability from where a tagger's tag is taken


def load_captioner(folder: Path, ask: str = "") -> Callable[[Image.Image], str]:
    """A function from a picture to its caption.

    Args:
        folder: of the model.
        ask: the question to a vision-language model; "" asks the usual one.

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
    kind = str(config.get("model_type"))
    if is_tagger or kind in WRITERS:
        if ask:
            raise ModelError(f"`{where}` takes no question", "leave --ask out: it is for vision-language models")
        return guard(where, "", lambda: _tagger(where) if is_tagger else _writer(where))
    if not is_asked(kind):
        raise ModelError(
            f"`{where}` is of kind `{kind[:60]}`, which writes no captions here",
            f"known are {', '.join(WRITERS)}, vision-language models, and image classifiers as taggers",
        )
    return guard(where, "", lambda: load_asked(where, kind, ask, _load))


def _load(kind: Any, where: str) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, found = kind.from_pretrained(where, use_safetensors=True, output_loading_info=True, **LOCAL)
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random weights
        what = f"{len(missing)} weights that a {type(model).__name__} has, such as {missing[0]}"
        raise ModelError(
            f"`{where}` is without {what}", "of Florence-2 there are two forms: take the one for transformers"
        )
    return model.to(device).eval()


def _processor(where: str) -> Callable[[Any, Image.Image], torch.Tensor]:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(where, **LOCAL)

    def pixels(model: Any, image: Image.Image) -> torch.Tensor:
        found: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return found.to(model.device, model.dtype)

    return pixels


def _writer(where: str) -> Callable[[Image.Image], str]:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    pixels = _processor(where)
    tokenizer = AutoTokenizer.from_pretrained(where, **LOCAL)
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
