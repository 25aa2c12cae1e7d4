"""Captions by a model that the user has: a folder of transformers, for image to text, for tags, or to be asked.

Everything about a model comes from its folder: transformers picks the class, and the chat template says how a question
with a picture is written. Vision-language models (Qwen-VL, LLaVA, JoyCaption, Florence-2) are asked in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from emotrain.errors import ModelError
from emotrain.families.component import LOCAL, guard
from emotrain.families.headers import read_json

WRITERS = ("blip", "git", "vision-encoder-decoder")  # they take pixels alone
MAX_TOKENS, MOST_ANSWERED = 96, 256  # of a caption, and of an answer
LIKELY = 0.35  # probability from where a tagger's tag is taken
ASK = "Describe this picture for a text-to-image model, in one or two plain sentences. Write the description alone."
FLORENCE = "<DETAILED_CAPTION>"  # Florence-2 knows tasks in place of questions
MAX_SIDE = 1024  # pixels: some models make tokens of every pixel that they are given


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
    if not _is_asked(kind):
        raise ModelError(
            f"`{where}` is of kind `{kind[:60]}`, which writes no captions here",
            f"known are {', '.join(WRITERS)}, vision-language models, and image classifiers as taggers",
        )
    return guard(where, "", lambda: _asked(where, kind, ask))


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


# ------------------------------------------------------------ models that are asked


def _is_asked(model_type: object) -> bool:
    """Whether transformers has a model of this kind that writes a text about a picture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _asked(where: str, model_type: str, ask: str) -> Callable[[Image.Image], str]:
    """A function from a picture to what the model answers.

    Args:
        where: the model's folder.
        model_type: of its config.
        ask: the question; "" asks the usual one.

    Raises:
        ModelError: the folder has no chat template, or it takes no picture.
    """
    from transformers import AutoModelForImageTextToText

    processor = _asked_processor(where, model_type)
    prompt = (ask or FLORENCE) if model_type == "florence2" else _question(processor, ask or ASK, where)
    model = _load(AutoModelForImageTextToText, where)

    @torch.no_grad()
    def answer(image: Image.Image) -> str:
        small = image.copy()
        small.thumbnail((MAX_SIDE, MAX_SIDE))
        inputs = processor(text=[prompt], images=[small], return_tensors="pt").to(model.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=MOST_ANSWERED, do_sample=False)[0]
        if not model.config.is_encoder_decoder:
            tokens = tokens[inputs["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return " ".join(re.sub(r"(?s)^.*</think>", "", text).split())

    return answer


def _question(processor: Any, ask: str, where: str) -> str:
    """The question with a place for the picture, as the model's chat template writes it.

    Some templates take the picture as a part of the message; others (JoyCaption) take a text and put the place
    themselves, or leave it to whoever asks (LLaVA 1.5).
    """
    token = processor.image_token
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ModelError(f"`{where}` has no chat template", "download chat_template.jinja or .json of the model, too")
    parts = [{"type": "image"}, {"type": "text", "text": ask}]
    for content in (parts, ask, f"{token}\n{ask}"):
        try:
            text: str = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except (TypeError, ValueError, LookupError, AttributeError, TemplateError):  # it expects another form
            continue
        if text.count(token) == 1 and "'type'" not in text:
            return text
    raise ModelError(f"`{where}` has a chat template that takes no picture")


def _asked_processor(where: str, model_type: str) -> Any:
    """Transformers' processor; of models that also read videos without that part, which needs torchvision."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import processor_class_from_name

    try:
        return AutoProcessor.from_pretrained(where, **LOCAL)
    except ImportError:
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

        kind: Any = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])

        class Pictures(kind):  # type: ignore[misc]
            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
                return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

        tokenizer = AutoTokenizer.from_pretrained(where, **LOCAL)
        pixels = AutoImageProcessor.from_pretrained(where, **LOCAL)
        return Pictures(
            image_processor=pixels, tokenizer=tokenizer, video_processor=None, chat_template=tokenizer.chat_template
        )
