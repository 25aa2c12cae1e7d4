"""The pieces of a model, each through the class that diffusers or transformers has for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from emotrain.errors import ModelError
from emotrain.families.base import TextEncoderPart
from emotrain.families.headers import read_json, refuse_unreadable
from emotrain.families.quiet import quiet
from emotrain.families.sizes import FAMILIES
from emotrain.families.sniff import Sniffed

Loaded = TypeVar("Loaded")
T5_LIMIT = {"flux": 512, "sd3": 256}  # tokens; what the stock pipelines pad to


def load_pieces(found: Sniffed, dtype: torch.dtype, revision: str | None = None) -> dict[str, Any]:
    """Denoiser, VAE, scheduler, and each text encoder with its tokenizer, on the CPU.

    The VAE is always float32: in half precision the real ones overflow or lose detail, and it is used once per picture.

    Returns:
        `denoiser`, `vae`, `scheduler`, `text_encoder`..., `tokenizer`... (None where a T5 is absent), and
        `force_zeros` where the folder says what SDXL takes for no negative prompt.

    Raises:
        ModelError: a piece is missing or cannot be read.
    """
    if found.kind == "file":
        from emotrain.families.single import load_single_file

        return load_single_file(found, dtype)
    return load_folder(found, dtype, revision)


def load_folder(found: Sniffed, dtype: torch.dtype, revision: str | None) -> dict[str, Any]:
    """All pieces of a diffusers folder or a hub repository."""
    import diffusers

    info = FAMILIES[found.family]
    where = str(found.path)
    index = _index(found, revision)
    denoiser_class = getattr(diffusers, index[info.denoiser][1])
    pieces: dict[str, Any] = {
        "denoiser": load_one(denoiser_class, where, info.denoiser, revision, torch_dtype=dtype),
        "vae": load_one(diffusers.AutoencoderKL, where, "vae", revision, torch_dtype=torch.float32),
        "scheduler": guard(
            where,
            "scheduler",
            lambda: getattr(diffusers, index["scheduler"][1]).from_pretrained(
                where, subfolder="scheduler", revision=revision
            ),
        ),
    }
    pieces["force_zeros"] = bool(index.get("force_zeros_for_empty_prompt", True))
    for name in info.text_encoders:
        pieces[name], pieces[name.replace("text_encoder", "tokenizer")] = load_encoder(
            where, index, name, dtype, revision
        )
    return pieces


def _index(found: Sniffed, revision: str | None) -> dict[str, Any]:
    if found.kind == "hub":
        from emotrain.families.hub import fetch_json

        return fetch_json(str(found.path), "model_index.json", revision)
    return read_json(Path(found.path) / "model_index.json")


def load_encoder(
    where: str, index: dict[str, Any], name: str, dtype: torch.dtype, revision: str | None
) -> tuple[Any, Any]:
    """One text encoder and its tokenizer; (None, None) where the model was saved without it."""
    import transformers

    tokenizer_name = name.replace("text_encoder", "tokenizer")
    if (index.get(name) or [None])[0] is None:
        return None, None
    encoder = load_one(getattr(transformers, index[name][1]), where, name, revision, dtype=dtype)
    tokenizer_class = getattr(transformers, index[tokenizer_name][1])
    tokenizer = guard(
        where,
        tokenizer_name,
        lambda: tokenizer_class.from_pretrained(where, subfolder=tokenizer_name, revision=revision),
    )
    return encoder, tokenizer


def load_one(cls: Any, where: str, part: str, revision: str | None, **words: Any) -> Any:
    """One model of a folder, from safetensors only; where there is just a `fp16` variant of the file, that one.

    Raises:
        ModelError: missing, pickled, damaged, or with tensors of another shape.
    """
    folder = Path(where) / part
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(folder.glob("*.bin"))
            if pickles:
                refuse_unreadable(pickles[0])
            raise ModelError(
                f"`{folder}` holds no .safetensors file",
                "the model's folder is not complete; download it again",
            )
        for file in files:
            refuse_unreadable(file)
        if all(".fp16." in file.name for file in files):
            words["variant"] = "fp16"
    return guard(
        where,
        part,
        lambda: cls.from_pretrained(where, subfolder=part, revision=revision, use_safetensors=True, **words),
    )


def guard(where: str, part: str, load: Callable[[], Loaded]) -> Loaded:
    """Run a loader of diffusers or transformers; its complaints about files become a ModelError."""
    from safetensors import SafetensorError

    from emotrain.families.hub import hub_error

    try:
        with quiet():
            return load()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if (known := hub_error(where, error)) is not None:
            raise known from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"`{os.path.join(where, part)}` cannot be loaded: {first}",
            "the download may be damaged or not complete",
        ) from error


def load_vae(vae: str, found: Sniffed) -> Any:
    """Another VAE: a folder (of the VAE itself or of a whole model), a hub id, or a file.

    Raises:
        ModelError: missing, not readable, or of another number of latent channels.
    """
    import diffusers

    path = Path(vae).expanduser()
    if path.is_file():
        from emotrain.families.single import load_vae_file

        loaded = load_vae_file(path, found)
    elif (path / "vae").is_dir():
        loaded = load_one(diffusers.AutoencoderKL, str(path), "vae", None, torch_dtype=torch.float32)
    else:
        loaded = guard(
            vae,
            "",
            lambda: diffusers.AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32, use_safetensors=True),
        )
    if loaded.config.latent_channels != found.latent_channels:
        raise ModelError(
            f"model.vae `{vae}` has {loaded.config.latent_channels} latent channels, "
            f"but the model needs {found.latent_channels}",
            f"use a VAE made for {found.family}, or leave model.vae out",
        )
    return loaded


def text_parts(found: Sniffed, pieces: dict[str, Any]) -> list[TextEncoderPart]:
    """The text encoders that are there, with how many tokens each takes."""
    parts = []
    for name in FAMILIES[found.family].text_encoders:
        encoder, tokenizer = pieces[name], pieces[name.replace("text_encoder", "tokenizer")]
        if encoder is None:
            continue
        limit = min(
            int(tokenizer.model_max_length),
            T5_LIMIT.get(found.family, 77) if "T5" in type(encoder).__name__ else 77,
        )
        parts.append(TextEncoderPart(name, encoder, tokenizer, limit))
    return parts
