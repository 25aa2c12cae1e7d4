"""Putting a model together: which device, which dtype, which class."""

from __future__ import annotations

from typing import Any

import torch

from emotrain.errors import ConfigError, ResourceError
from emotrain.families.common import LoadedFamily, Parts
from emotrain.families.sniff import Sniffed
from emotrain.families.table import sniff

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(device: str) -> torch.device:
    """auto: cuda, else mps, else cpu.

    Raises:
        ConfigError: an unknown name.
        ResourceError: that device is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind = device.split(":")[0]
    if kind not in ("cuda", "mps", "cpu"):
        raise ConfigError(f"device `{device}` is not known", "one of auto, cuda, mps, cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "device `cuda` was asked for, but torch sees no GPU",
            "`emotrain doctor` says what torch sees",
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("device `mps` was asked for, but torch sees none", "use `cpu`")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on GPUs that compute it, fp16 on others, fp32 on the CPU.

    Raises:
        ConfigError: an unknown name.
    """
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16
    if dtype not in DTYPES:
        raise ConfigError(
            f"model.dtype `{dtype}` is not known", f"one of auto, {', '.join(DTYPES)}"
        )
    return DTYPES[dtype]


def family_class(name: str) -> type[LoadedFamily]:
    """The class of a family."""
    if name == "sdxl":
        from emotrain.families.sdxl import StableDiffusionXL

        return StableDiffusionXL
    if name == "sd3":
        from emotrain.families.sd3 import StableDiffusion3

        return StableDiffusion3
    if name == "flux":
        from emotrain.families.flux import Flux

        return Flux
    from emotrain.families.sd import StableDiffusion

    return StableDiffusion


def load(
    base: str,
    *,
    family: str,
    vae: str | None,
    revision: str | None,
    dtype: str,
    quantize: str,
    memory: str,
    device: str,
    gradient_checkpointing: bool | str,
) -> LoadedFamily:
    """See `emotrain.families.load_family`."""
    from emotrain.families.pieces import load_pieces, load_vae

    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    found = sniff(base, family, revision)
    pieces = load_pieces(found, kind, revision)
    if vae is not None:
        pieces["vae"] = load_vae(vae, found)
    built = family_class(found.family)(_parts(found, pieces, where, kind))
    _place(built, gradient_checkpointing)
    return built


def _parts(
    found: Sniffed, pieces: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Parts:
    from emotrain.families.pieces import text_parts

    return Parts(
        name=found.family,
        variant=found.variant,
        prediction=found.prediction,
        denoiser=pieces["denoiser"],
        vae=pieces["vae"],
        text_encoders=text_parts(found, pieces),
        scheduler=pieces["scheduler"],
        device=device,
        dtype=dtype,
    )


def _place(family: LoadedFamily, gradient_checkpointing: bool | str) -> None:
    """Move everything to its device and switch checkpointing on where asked for."""
    family.denoiser.to(family.device)
    assert family.vae is not None
    family.vae.to(family.device)
    for part in family.text_encoders:
        part.encoder.to(family.device)
    if gradient_checkpointing is True:
        family.denoiser.enable_gradient_checkpointing()
