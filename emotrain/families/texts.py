"""How long and how large the text side of a model is, from its small files alone (no torch)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from emotrain.families.headers import read_header
from emotrain.families.registry import FAMILIES, configs, encoder_configs
from emotrain.families.sniff import Sniffed
from emotrain.families.sniff_file import own_config
from emotrain.families.spec import TextEncoder

CLIP_TOKENS = 77
T5_SIDES = ("num_layers", "d_ff", "d_model")


def num_text_tokens(found: Sniffed) -> int:
    """Tokens that the denoiser is given; of a folder what its tokenizers say, else the public model's."""
    return sum(_limit(found, encoder) for encoder in FAMILIES[found.family].text_encoders if encoder.adds_tokens)


def trainable_encoders(found: Sniffed) -> dict[str, tuple[str, dict[str, Any]]]:
    """The CLIP text encoders of a model, name -> (class, config): of a folder its own, else the public model's."""
    public = configs(found.family)["text_encoders"]
    encoders = {}
    for name in (encoder.name for encoder in FAMILIES[found.family].trainable_encoders):
        kind, config = public[name]
        encoders[name] = (kind, own_config(found, f"{name}/config.json", config))
    return encoders


def _limit(found: Sniffed, encoder: TextEncoder) -> int:
    """Tokens of one encoder: the pipeline's, or less where a folder's tokenizer says less."""
    said = own_config(found, f"{encoder.tokenizer_folder}/tokenizer_config.json", {}).get("model_max_length")
    return min(int(said), encoder.max_tokens) if isinstance(said, int | float) and said >= 1 else encoder.max_tokens


def encoder_parameters(found: Sniffed) -> dict[str, int]:
    """Parameters of each text encoder."""
    if found.variant != "custom" or found.kind != "folder":
        return {encoder.name: encoder.parameters for encoder in FAMILIES[found.family].encoders_of(found.variant)}
    counts = {}
    for encoder in FAMILIES[found.family].text_encoders:
        files = sorted((Path(found.path) / encoder.folder).glob("*.safetensors"))
        counts[encoder.name] = sum(math.prod(shape) for file in files for shape in read_header(file).shapes.values())
    return counts


def quantizable_parameters(found: Sniffed) -> dict[str, int]:
    """How many of each text encoder's parameters are in Linear layers: of a T5 or language model all but its table."""
    counts = {}
    for encoder in FAMILIES[found.family].text_encoders:
        if encoder.quantizable:
            words = _config(found, encoder)
            table = int(words.get("vocab_size") or 0) * int(words.get("d_model") or words.get("hidden_size") or 0)
            counts[encoder.name] = max(encoder_parameters(found)[encoder.name] - table, 0)
    return counts


def wide_parameters(found: Sniffed) -> dict[str, int]:
    """How many of each text encoder's parameters are float32 where the rest is float16, in which a T5's sums overflow.

    They are the layers `wo`, as transformers has it.
    """
    configs = {one.name: _config(found, one) for one in FAMILIES[found.family].text_encoders if one.kind == "t5"}
    sides = {name: [int(words.get(key) or 0) for key in T5_SIDES] for name, words in configs.items()}
    return {name: math.prod(numbers) for name, numbers in sides.items()}


def _config(found: Sniffed, encoder: TextEncoder) -> dict[str, Any]:
    """Of the language alone."""
    words = encoder_configs(found.family, found.variant)[encoder.name][1]
    words = own_config(found, f"{encoder.name}/config.json", words)
    return {**words, **(words.get("text_config") or {})}
