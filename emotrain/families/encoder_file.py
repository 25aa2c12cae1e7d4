"""A T5 or language model from the tensors of a file: one of its own, or the checkpoint that it lies in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from emotrain.families.component import check_complete, guard
from emotrain.families.spec import TextEncoder
from emotrain.families.stored import Scaled, load_stored, read_weights
from emotrain.families.understood import STATED, TOKENIZERS

Stored = TypeVar("Stored")
_IN_A_CHECKPOINT = re.compile(r"^(?:text_encoders|cond_stage_model)\.[^.]+\.(?:transformer\.)?")
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one table of T5's, of which files hold either name


def build_encoder(
    path: Path, encoder: TextEncoder, kind: str, config: Mapping[str, Any], dtype: torch.dtype, *, inside: bool = False
) -> Any:
    """A text encoder without its head, its large layers in 8 bits where the file has them so.

    Args:
        path: of the file.
        encoder: which one.
        kind: its class in transformers.
        config: its config.
        dtype: of all that is not kept as stored.
        inside: whether it lies in a checkpoint, under its prefix; else the file is its own.

    Raises:
        ModelError: the tensors do not fit the config.
    """
    import transformers

    model_class = getattr(transformers, kind)
    plain, stored = read_weights(path, encoder.prefixes if inside else ())
    tensors: dict[str, Tensor | Scaled] = {**plain, **stored}
    state = own_names(kind, tensors, encoder, scaled=False)
    with torch.device("meta"):
        model = without_upper_layers(model_class(model_class.config_class(**config)), encoder)
    if encoder.kind == "t5":
        state.pop(EMBEDDINGS[1], None)
    guard(str(path), encoder.name if inside else "", lambda: load_stored(model, state, dtype))
    if encoder.kind == "t5":
        model.set_input_embeddings(model.get_input_embeddings())
    check_complete(str(path), {encoder.name: model})
    return _without_meta(model)


def own_names(kind: str, tensors: Mapping[str, Stored], encoder: TextEncoder, scaled: bool) -> dict[str, Stored]:
    """A language model's tensors by transformers' names, without head and eyes, nor scales where it has some.

    What `without_upper_layers` takes from the model, and the tokenizer that ComfyUI keeps among the weights, go too.
    """
    named = {_IN_A_CHECKPOINT.sub("", key): value for key, value in tensors.items()}
    named = {re.sub(r"^(?:model\.|language_model\.)+", "", key): value for key, value in named.items()}
    unused = ("lm_head.", "logit_scale", *TOKENIZERS, *(("visual.",) if "VL" in kind else ()))
    applied = STATED if scaled else ()
    kept = {key: value for key, value in named.items() if not key.startswith(unused) and not key.endswith(applied)}
    for one, other in (EMBEDDINGS, EMBEDDINGS[::-1]):
        if encoder.kind == "t5" and one in kept:
            kept.setdefault(other, kept[one])
    if encoder.layers_read:
        above = re.compile(r"layers\.(\d+)\.")
        kept = {
            key: value
            for key, value in kept.items()
            if key != "norm.weight" and not ((at := above.match(key)) and int(at[1]) >= encoder.layers_read)
        }
    return kept


def without_upper_layers(model: Any, encoder: TextEncoder) -> Any:
    """A language model without the layers above the last one that is read, and without the norm after them."""
    if encoder.layers_read:
        model.layers = model.layers[: encoder.layers_read]
        model.config.num_hidden_layers = len(model.layers)
        model.norm = torch.nn.Identity()
    return model


def _without_meta(model: Any) -> Any:
    """Tables that are computed and not stored are computed again: built on the meta device they are empty."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type == "meta":
                fresh = type(module)(config=model.config)
                module.register_buffer(name, getattr(fresh, name), persistent=False)
                if hasattr(module, f"original_{name}"):
                    setattr(module, f"original_{name}", getattr(fresh, name))
    return model.eval()
