"""Captions by vision-language models, which are asked in words: Qwen-VL, LLaVA (JoyCaption), Florence-2 and others.

Everything about a model comes from its folder: transformers picks the class, and the chat template says how a question
with a picture is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from emotrain.errors import ModelError

ASK = "Describe this picture for a text-to-image model, in one or two plain sentences. Write the description alone."
FLORENCE = "<DETAILED_CAPTION>"  # Florence-2 knows tasks in place of questions
MAX_TOKENS = 256  # of a caption
MAX_SIDE = 1024  # pixels: some models make tokens of every pixel that they are given
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def is_asked(model_type: object) -> bool:
    """Whether transformers has a model of this kind that writes a text about a picture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_asked(where: str, model_type: str, ask: str, load: Callable[[Any, str], Any]) -> Callable[[Image.Image], str]:
    """A function from a picture to what the model answers.

    Args:
        where: the model's folder.
        model_type: of its config.
        ask: the question; "" asks the usual one.
        load: gives a model of an Auto class, ready on its device.

    Raises:
        ModelError: the folder has no chat template, or it takes no picture.
    """
    from transformers import AutoModelForImageTextToText

    processor = _processor(where, model_type)
    prompt = (ask or FLORENCE) if model_type == "florence2" else _question(processor, ask or ASK, where)
    model = load(AutoModelForImageTextToText, where)

    @torch.no_grad()
    def answer(image: Image.Image) -> str:
        small = image.copy()
        small.thumbnail((MAX_SIDE, MAX_SIDE))
        inputs = processor(text=[prompt], images=[small], return_tensors="pt").to(model.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0]
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


def _processor(where: str, model_type: str) -> Any:
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
