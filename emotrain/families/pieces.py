"""The pieces of a model, each through the class that diffusers or transformers has for it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from emotrain.errors import ModelError
from emotrain.families.common import TextEncoderPart
from emotrain.families.component import guard, known_class, load_one, load_whole, refuse_filled_up
from emotrain.families.encoder_file import without_upper_layers
from emotrain.families.headers import read_index
from emotrain.families.registry import FAMILIES
from emotrain.families.separate import (
    NOTHING,
    Given,
    load_denoiser_file,
    load_separate,
    load_vae_file,
)
from emotrain.families.single import load_denoiser_of, load_single_file
from emotrain.families.sniff import Sniffed, refuse_other_vae
from emotrain.families.sniff_file import refuse_incomplete
from emotrain.families.spec import TextEncoder

ENCODERS: dict[str, frozenset[str]] = {
    "adapter": frozenset(("AnimaTextConditioner",)),
    "clip": frozenset(("CLIPTextModel", "CLIPTextModelWithProjection")),
    "t5": frozenset(("T5EncoderModel",)),
    "llm": frozenset(
        (
            "Qwen3Model",
            "Qwen3ForCausalLM",
            "Qwen3VLModel",
            "Qwen3VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Mistral3ForConditionalGeneration",
        )
    ),
}
TOKENIZERS: dict[str, frozenset[str]] = {
    "adapter": frozenset(("T5Tokenizer", "T5TokenizerFast")),
    "clip": frozenset(("CLIPTokenizer", "CLIPTokenizerFast")),
    "t5": frozenset(("T5Tokenizer", "T5TokenizerFast")),
    "llm": frozenset(("Qwen2Tokenizer", "Qwen2TokenizerFast", "PixtralProcessor", "Qwen3VLProcessor")),
}
# Of pictures and texts: the tokenizer in them.
PROCESSORS = {"PixtralProcessor": "PreTrainedTokenizerFast", "Qwen3VLProcessor": "Qwen2Tokenizer"}


def load_pieces(
    found: Sniffed, dtype: torch.dtype, revision: str | None = None, given: Given = NOTHING
) -> dict[str, Any]:
    """Denoiser, VAE, scheduler, and each text encoder with its tokenizer, on the CPU.

    The VAE is always float32: in half precision the real ones overflow or lose detail, and it is used once per picture.

    Returns:
        `denoiser`, `vae`, `scheduler`, `text_encoder`..., `tokenizer`... (None where a T5 is absent), and
        `force_zeros` where the folder says what SDXL takes for no negative prompt.

    Raises:
        ModelError: a piece is missing or cannot be read.
    """
    if found.kind == "file":
        refuse_incomplete(found, has_vae=given.vae is not None, has_text=given.text_encoder is not None)
        if FAMILIES[found.family].separate_files:
            return load_separate(found, dtype, given)
        return load_single_file(found, dtype, given.vae, given.denoiser)
    return load_folder(found, dtype, revision, given.denoiser)


def load_denoiser(found: Sniffed, dtype: torch.dtype, revision: str | None = None) -> dict[str, Any]:
    """The denoiser of a flow model and its scheduler alone, and adapters that lie in its file, on the CPU.

    Raises:
        ModelError: missing, or cannot be read.
    """
    if found.kind != "file":
        return _denoiser_of_folder(found, dtype, revision, _index(found, revision))
    return load_denoiser_file(found, dtype) if FAMILIES[found.family].separate_files else load_denoiser_of(found, dtype)


def load_folder(found: Sniffed, dtype: torch.dtype, revision: str | None, denoiser: Any = None) -> dict[str, Any]:
    """All pieces of a diffusers folder or a hub repository."""
    import diffusers

    info = FAMILIES[found.family]
    where = str(found.path)
    index = _index(found, revision)
    pieces = _denoiser_of_folder(found, dtype, revision, index, denoiser)
    pieces["vae"] = load_whole(getattr(diffusers, info.vae_class), where, "vae", revision, torch_dtype=torch.float32)
    pieces["force_zeros"] = bool(index.get("force_zeros_for_empty_prompt", True))
    for encoder in info.encoders_of(found.variant):
        pieces[encoder.name], pieces[encoder.tokenizer_name] = load_encoder(where, index, encoder, dtype, revision)
    return pieces


def _denoiser_of_folder(
    found: Sniffed, dtype: torch.dtype, revision: str | None, index: dict[str, Any], denoiser: Any = None
) -> dict[str, Any]:
    """The denoiser, unless it is given, and the scheduler."""
    import diffusers

    info, where = FAMILIES[found.family], str(found.path)
    denoiser_class = getattr(diffusers, known_class(where, info.denoiser, index, frozenset((info.denoiser_class,))))
    if denoiser is None:
        denoiser = load_whole(denoiser_class, where, info.denoiser, revision, torch_dtype=dtype)
    return {"denoiser": denoiser, "scheduler": load_scheduler(found, where, index, revision)}


def load_scheduler(found: Sniffed, where: str, index: dict[str, Any], revision: str | None) -> Any:
    """The folder's own, or the family's where modular blocks make it themselves."""
    kind = scheduler_class(where, index)
    if "scheduler" not in index:
        return kind.from_config(found.scheduler_config)
    return guard(where, "scheduler", lambda: kind.from_pretrained(where, subfolder="scheduler", revision=revision))


def scheduler_class(where: str, index: dict[str, Any]) -> Any:
    """A scheduler of diffusers by its name; a flow's where the folder has none.

    Raises:
        ModelError: there is none of that name.
    """
    import diffusers

    entry = index.get("scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"])
    name = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else ""
    if not re.fullmatch(r"[A-Z]\w{0,60}Scheduler", name) or not hasattr(diffusers, name):
        raise ModelError(f"`{where}` has `{name[:60]}` for its scheduler, which diffusers does not have")
    return getattr(diffusers, name)


def _index(found: Sniffed, revision: str | None) -> dict[str, Any]:
    if found.kind == "hub":
        from emotrain.families.hub import fetch_index

        return fetch_index(str(found.path), revision)
    return read_index(Path(found.path))


def load_encoder(
    where: str, index: dict[str, Any], spec: TextEncoder, dtype: torch.dtype, revision: str | None, **kwargs: Any
) -> tuple[Any, Any]:
    """One text encoder and its tokenizer; (None, None) where the model was saved without it.

    `kwargs` are transformers': `device_map="meta"` reads no weights.
    """
    import transformers

    name = spec.folder
    if (index.get(name) or [None])[0] is None:
        return None, None
    kind = known_class(where, name, index, ENCODERS[spec.kind])
    if spec.kind == "adapter":
        import diffusers

        encoder = load_whole(getattr(diffusers, kind), where, name, revision, torch_dtype=dtype)
    else:
        words: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **kwargs}
        encoder, info = load_one(getattr(transformers, kind), where, name, revision, **words)
        refuse_filled_up(os.path.join(where, name), info)
    encoder = encoder.model if "For" in kind else encoder  # the head is not needed, nor the eyes
    return without_upper_layers(getattr(encoder, "language_model", encoder), spec), load_tokenizer(
        where, index, spec, revision
    )


def load_tokenizer(where: str, index: dict[str, Any], spec: TextEncoder, revision: str | None) -> Any:
    """The tokenizer of a text encoder."""
    import transformers

    named = known_class(where, spec.tokenizer_folder, index, TOKENIZERS[spec.kind])
    tokenizer_class = getattr(transformers, PROCESSORS.get(named, named))
    return guard(
        where,
        spec.tokenizer_folder,
        lambda: tokenizer_class.from_pretrained(
            where, subfolder=spec.tokenizer_folder, revision=revision, trust_remote_code=False
        ),
    )


def load_vae(vae: str, found: Sniffed) -> Any:
    """Another VAE: a folder (of the VAE itself or of a whole model), a hub id, or a file.

    Raises:
        ModelError: missing, not readable, or of another number of latent channels.
    """
    import diffusers

    path = Path(vae).expanduser()
    spec = FAMILIES[found.family]
    kind = getattr(diffusers, spec.vae_class)
    if path.is_file():
        loaded = load_vae_file(path, found)
    elif (path / "vae").is_dir():
        loaded = load_whole(kind, str(path), "vae", None, torch_dtype=torch.float32)
    else:
        loaded = guard(vae, "", lambda: kind.from_pretrained(vae, torch_dtype=torch.float32, use_safetensors=True))
    refuse_other_vae(vae, loaded.config, found)
    return loaded


def text_parts(found: Sniffed, pieces: dict[str, Any]) -> list[TextEncoderPart]:
    """The text encoders that are there, with how many tokens each takes."""
    parts = []
    for spec in FAMILIES[found.family].encoders_of(found.variant):
        encoder, tokenizer = pieces[spec.name], pieces[spec.tokenizer_name]
        if encoder is not None:
            limit = min(int(tokenizer.model_max_length), spec.max_tokens)
            parts.append(TextEncoderPart(spec.name, encoder, tokenizer, limit))
    return parts
