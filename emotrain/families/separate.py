"""Models whose parts are separate files, as ComfyUI keeps them: denoiser, VAE and text encoder, each a .safetensors.

The denoiser is `model.base`; the others are `model.vae` and `model.text_encoder`, or lie in the folder beside the model
with the file's own name (`x.safetensors` and `x/vae`, `x/text_encoder`, `x/tokenizer`). Configs are the public model's.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.families.component import guard, load_one, refuse_filled_up
from emotrain.families.encoder_file import build_encoder, own_names, without_upper_layers
from emotrain.families.headers import own_name, read_header, read_json
from emotrain.families.registry import FAMILIES, configs, encoder_configs
from emotrain.families.single import build_denoiser, copy_tokenizer
from emotrain.families.sniff import Sniffed
from emotrain.families.sniff_file import companion, own_config
from emotrain.families.spec import Shapes, TextEncoder
from emotrain.families.stored import read_weights
from emotrain.families.understood import refuse_quantised, scaled_layers


@dataclass(frozen=True)
class Given:
    """Parts that come from elsewhere: a loaded VAE or denoiser, and paths of the text encoder and its tokenizer."""

    vae: Any = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    denoiser: Any = None


NOTHING = Given()


def load_separate(found: Sniffed, dtype: torch.dtype, given: Given) -> dict[str, Any]:
    """All pieces, on the CPU; see `pieces.load_pieces`.

    Raises:
        ModelError: a piece is missing or cannot be read.
    """
    import diffusers

    spec, path = FAMILIES[found.family], Path(found.path)
    vae = given.vae
    if vae is None and "vae" not in found.missing:
        vae = load_vae_file(path, found, inside=True)
    elif vae is None:
        vae_class = getattr(diffusers, spec.vae_class)
        vae = load_one(vae_class, str(companion(path)), "vae", None, torch_dtype=torch.float32)
    text = _text_encoder(found, dtype, refuse_other_encoder(found, given.text_encoder))
    encoders = spec.encoders_of(found.variant)
    pieces = {"vae": vae, encoders[0].name: text, **load_denoiser_file(found, dtype, given.denoiser)}
    for part in encoders:
        pieces[part.tokenizer_name] = tokenizer_of(found, part, given.tokenizer)
    return pieces


def load_denoiser_file(found: Sniffed, dtype: torch.dtype, denoiser: Any = None) -> dict[str, Any]:
    """What lies in the denoiser's file: itself (unless it is given), its scheduler, and its text encoders' adapters."""
    import diffusers

    path = Path(found.path)
    words = own_config(found, "scheduler/scheduler_config.json", found.scheduler_config)
    pieces = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_config(words)}
    adapters = FAMILIES[found.family].encoders_of(found.variant)[1:]
    plain, scaled = read_weights(path) if denoiser is None or adapters else ({}, {})
    for adapter in adapters:
        own_tensors = {key: plain.pop(key) for key in list(plain) if own_name(key).startswith(adapter.prefixes)}
        stored = [key for key in scaled if own_name(key).startswith(adapter.prefixes)]
        own_tensors |= {key: scaled.pop(key).plain(dtype) for key in stored}
        pieces[adapter.name] = _adapter(found, adapter, own_tensors, dtype)
    return {**pieces, "denoiser": build_denoiser(found, dtype, plain, scaled) if denoiser is None else denoiser}


def _adapter(found: Sniffed, spec: TextEncoder, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A module of diffusers that lies in the denoiser's file."""
    import diffusers

    kind, words = encoder_configs(found.family, found.variant)[spec.name]
    model = getattr(diffusers, kind).from_config(own_config(found, f"{spec.name}/config.json", words))
    (prefix,) = spec.prefixes
    state = {own_name(key).removeprefix(prefix): value for key, value in tensors.items()}
    guard(str(found.path), spec.name, lambda: model.load_state_dict(state))
    return torch.nn.Module.to(model, dtype).eval()


def refuse_other_encoder(found: Sniffed, given: str | None) -> Path:
    """Refuse a text encoder that the model does not take, by its header and configs alone; else its file or folder.

    Args:
        found: the model.
        given: `model.text_encoder`; None: the one in the model's file, or beside it.

    Raises:
        ModelError: of another size or kind, or with other tensors.
    """
    import transformers

    spec = FAMILIES[found.family]
    encoder = spec.encoders_of(found.variant)[0]
    inside = given is None and encoder.name not in found.missing
    path = Path(found.path) if inside else Path(given) if given else companion(Path(found.path)) / encoder.name
    kind, words = encoder_configs(found.family, found.variant)[encoder.name]
    inner = (companion(path) if inside else path) / encoder.name
    folder = inner if inside or inner.is_dir() else path if path.is_dir() else companion(path)
    if path.is_dir() or (folder / "config.json").is_file():
        words = read_json(folder / "config.json")
    what = f"the text encoder in `{path}`" if inside else f"model.text_encoder `{path}`"
    _refuse_other_width(what, found, encoder, words)
    if not path.is_dir():
        model_class = getattr(transformers, kind)
        header = read_header(path)
        refuse_quantised(path, header)
        with torch.device("meta"):
            model = guard(str(path), "", lambda: model_class(model_class.config_class(**words)))
        model = without_upper_layers(model, encoder)
        held = {name: s for name, s in header.shapes.items() if name.startswith(encoder.prefixes)}
        stored = own_names(kind, held if inside else header.shapes, encoder, scaled=bool(scaled_layers(header)))
        _refuse_other_tensors(what, stored, {k: tuple(v.shape) for k, v in model.state_dict().items()}, spec.title)
    return path


def _refuse_other_width(what: str, found: Sniffed, encoder: TextEncoder, words: dict[str, Any]) -> None:
    """Refuse a text encoder whose tokens are wider or narrower than the denoiser takes them."""
    inner = words.get("text_config")
    own = inner if isinstance(inner, dict) else words
    width = own.get("hidden_size", own.get("d_model"))
    key, layers = encoder.width
    wanted = found.denoiser_config.get(key)
    if isinstance(width, int) and isinstance(wanted, int) and width * layers != wanted:
        raise ModelError(
            f"{what} is of another size than {FAMILIES[found.family].title} takes: its tokens are {width} wide instead "
            f"of {wanted // layers}",
            "give the text encoder that was made for this model",
        )


def _text_encoder(found: Sniffed, dtype: torch.dtype, path: Path) -> Any:
    """A language model without its head, from a file (ComfyUI's, transformers') or a folder of transformers."""
    import transformers

    encoder = FAMILIES[found.family].encoders_of(found.variant)[0]
    kind, words = encoder_configs(found.family, found.variant)[encoder.name]
    model_class = getattr(transformers, kind)
    if path.is_dir():
        own = path / encoder.name if (path / encoder.name).is_dir() else path
        model, info = load_one(model_class, str(own), "", None, dtype=dtype, output_loading_info=True)
        refuse_filled_up(str(own), info)
        return without_upper_layers(model, encoder)
    inside = path == Path(found.path)
    beside = companion(path) / (f"{encoder.name}/config.json" if inside else "config.json")
    words = read_json(beside) if beside.is_file() else words
    return build_encoder(path, encoder, kind, words, dtype, inside=inside)


def _refuse_other_tensors(what: str, own: Shapes, wanted: Shapes, title: str) -> None:
    lacking = sorted(wanted.keys() - own.keys())
    odd = sorted(own.keys() - wanted.keys())
    other = [key for key in wanted.keys() & own.keys() if own[key] != wanted[key]]
    if other:
        key = sorted(other)[0]
        raise ModelError(
            f"{what} is of another size than {title} takes: `{key}` is {own[key]} instead of {wanted[key]}",
            "give the text encoder that was made for this model",
        )
    if lacking or odd:
        raise ModelError(
            f"{what} lacks {len(lacking)} tensors and has {len(odd)} of another model, such as `{(lacking or odd)[0]}`",
            "give the bf16 or fp8_scaled file of the text encoder that was made for this model",
        )


def tokenizer_of(found: Sniffed, encoder: TextEncoder, given: str | None) -> Any:
    """From the folder that the preset names (or its part of that name), from beside the model, or the hub."""
    import transformers

    path = Path(found.path)
    kind = getattr(transformers, encoder.tokenizer_class)
    name = encoder.tokenizer_name
    named = None if given is None else Path(given) / name if (Path(given) / name).is_dir() else Path(given)
    folder = None if named is None or (name != "tokenizer" and named == Path(str(given))) else str(named)
    with tempfile.TemporaryDirectory(prefix="emotrain-") as temporary:
        if folder is None:
            copy_tokenizer(encoder, companion(path), Path(temporary), path)
            folder = str(Path(temporary) / name)
        where = folder
        tokenizer = guard(where, "", lambda: kind.from_pretrained(where, trust_remote_code=False))
    if encoder.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"the tokenizer of `{path}` has no chat template",
            "copy the whole tokenizer folder of the model's repository",
        )
    return tokenizer


def load_vae_file(path: Path, found: Sniffed, *, inside: bool = False) -> Any:
    """A VAE from one file, in the original layout or in diffusers'; `inside`: from the model's file.

    Raises:
        ModelError: not readable, or not of the family's kind.
    """
    import diffusers

    spec, config = FAMILIES[found.family], own_vae_config(path, found)
    vae = getattr(diffusers, spec.vae_class).from_config(config)
    if inside:
        plain, scaled = read_weights(path, spec.file.vae_prefixes)
        tensors = plain | {name: weight.plain(torch.float32) for name, weight in scaled.items()}
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    else:
        tensors = load_file(path)
    tensors = guard(str(path), "", lambda: diffusers_vae(tensors, spec.vae_class, config))
    guard(str(path), "", lambda: vae.load_state_dict(tensors))
    return vae.float()


def own_vae_config(path: Path, found: Sniffed) -> dict[str, Any]:
    """config.json beside a VAE's file, of the folder beside the model, or the public one."""
    kind = FAMILIES[found.family].vae_class
    for own in (path.parent / "config.json", companion(path) / "config.json"):
        if own.is_file() and read_json(own).get("_class_name", kind) == kind:
            return read_json(own)
    return own_config(found, "vae/config.json", configs(found.family)["vae"])


def diffusers_vae(tensors: dict[str, Tensor], kind: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """A VAE's tensors by diffusers' names, whose originals are Wan's (Qwen-Image's too) or latent diffusion's.

    The statistics that FLUX.2 adds to the latter have one name in both; its maker's file has the convolutions between
    the halves inside these.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_wan_vae_to_diffusers

    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return tensors
    if kind == "AutoencoderKLQwenImage":
        film: dict[str, Tensor] = convert_wan_vae_to_diffusers(dict(tensors))
        return film
    tensors = {re.sub(r"^(?:en|de)coder\.((?:post_)?quant_conv\.)", r"\1", key): t for key, t in tensors.items()}
    own = {key: value for key, value in tensors.items() if key.startswith("bn.")}
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(
        {key: value for key, value in tensors.items() if key not in own}, config
    )
    return converted | own
