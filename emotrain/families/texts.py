"""How long and how large the text side of a model is, from its small files alone (no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emotrain.families.headers import read_header, read_json
from emotrain.families.sizes import FAMILIES, public_configs
from emotrain.families.sniff import Sniffed

# Parameters of the public text encoders (T5-XXL: the encoder half).
ENCODER_PARAMETERS = {
    "sd15": {"text_encoder": 123_060_480},
    "sd21": {"text_encoder": 340_387_840},
    "sdxl": {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd3": {
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    },
    "flux": {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656},
}
T5_LIMIT = {"flux": 512, "sd3": 256}
CLIP_TOKENS = 77


def num_text_tokens(found: Sniffed) -> int:
    """Tokens that the denoiser is given; of a folder what its tokenizers say, else the public model's."""
    limits = [_limit(found, name.replace("text_encoder", "tokenizer")) for name in FAMILIES[found.family].text_encoders]
    if found.family == "flux":
        return min(limits[1], T5_LIMIT["flux"])
    if found.family == "sd3":
        return min(limits[0], CLIP_TOKENS) + min(limits[2], T5_LIMIT["sd3"])
    return min(limits[0], CLIP_TOKENS)


def trainable_encoders(found: Sniffed) -> dict[str, tuple[str, dict[str, Any]]]:
    """The CLIP text encoders of a model, name -> (class, config): of a folder its own, else the public model's."""
    public = public_configs()["text_encoders"][{"flux": "flux1"}.get(found.family, found.family)]
    encoders = {}
    for name, _ in FAMILIES[found.family].text_modules:
        kind, config = public[name]
        own = Path(found.path) / name / "config.json"
        encoders[name] = (kind, read_json(own) if found.kind == "folder" and own.is_file() else config)
    return encoders


def _limit(found: Sniffed, tokenizer: str) -> int:
    """model_max_length of a tokenizer."""
    path = Path(found.path) / tokenizer / "tokenizer_config.json"
    if found.kind == "folder" and path.is_file():
        return int(read_json(path).get("model_max_length", 10**6))
    name = tokenizer.replace("tokenizer", "text_encoder")
    clip = public_configs()["text_encoders"].get(found.family, {}).get(name, ["CLIP"])[0]
    return CLIP_TOKENS if clip.startswith("CLIP") and not _is_t5(found.family, name) else 10**6


def _is_t5(family: str, name: str) -> bool:
    return (family, name) in (("flux", "text_encoder_2"), ("sd3", "text_encoder_3"))


def encoder_parameters(found: Sniffed) -> dict[str, int]:
    """Parameters of each text encoder."""
    if found.variant != "custom" or found.kind != "folder":
        return ENCODER_PARAMETERS[found.family]
    counts = {}
    for name in FAMILIES[found.family].text_encoders:
        files = sorted((Path(found.path) / name).glob("*.safetensors"))
        counts[name] = sum(_count(file) for file in files)
    return counts


def _count(file: Path) -> int:
    total = 0
    for shape in read_header(file).shapes.values():
        count = 1
        for side in shape:
            count *= side
        total += count
    return total
