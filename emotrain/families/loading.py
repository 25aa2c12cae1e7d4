"""Putting a model together: which device, which dtype, which class."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from emotrain.errors import ConfigError, ResourceError
from emotrain.families.blocks import checkpoint_blocks
from emotrain.families.common import LoadedFamily, Parts, TextEncoderPart
from emotrain.families.component import refuse_non_finite
from emotrain.families.kept import KeptBase
from emotrain.families.memory import GIB, ON_CPU, MemoryPlan, require_backend
from emotrain.families.pieces import load_denoiser, load_pieces, load_vae, text_parts
from emotrain.families.quantize import make_plain, quantize_linears
from emotrain.families.registry import FAMILIES
from emotrain.families.separate import Given
from emotrain.families.sniff_file import companion
from emotrain.families.table import Sniffed, sniff

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
        raise ConfigError(f"model.dtype `{dtype}` is not known", f"one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def family_class(name: str) -> type[LoadedFamily]:
    """The class of a family, in its folder's `model.py`."""
    spec = FAMILIES[name]
    found: type[LoadedFamily] = getattr(import_module(f"emotrain.families.{spec.folder}.model"), spec.model_class)
    return found


def load_family(
    base: str,
    *,
    family: str = "auto",
    vae: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    quantize: str = "none",
    quantize_text_encoders: str = "auto",
    plan: MemoryPlan | None = None,
    device: str = "auto",
    gradient_checkpointing: bool | str = "auto",
    prediction: str = "auto",
    clip_skip: int | str = "auto",
    kept: KeptBase | None = None,
) -> LoadedFamily:
    """Load a model, frozen, ready for a LoRA; its `placement` says in one sentence what was decided about memory.

    Args:
        base: a .safetensors file, a diffusers folder, a hub id, or `builtin:tiny-sd` | `builtin:tiny-flux`.
        family: auto, or the family that it has to be.
        vae: another VAE: a diffusers folder, a hub id or a file.
        text_encoder: of a single file without one: a file or a folder.
        tokenizer: a folder with its tokenizer.
        revision: a hub id's branch, tag or commit.
        dtype: auto | bf16 | fp16 | fp32, of the denoiser and the text encoders; auto is bf16 on GPUs that have it,
            fp16 on others, fp32 on the CPU.
        quantize: none | int8 | nf4 | fp8, of the frozen denoiser.
        quantize_text_encoders: none | int8 | nf4 | fp8, of T5 and language models; auto is none.
        plan: what is done to fit into the GPU; without one what is named here.
        device: auto | cuda | mps | cpu.
        gradient_checkpointing: whether activations are computed again in the backward pass; auto is not.
        prediction: auto | epsilon | v | flow, where the files do not say it or say it wrongly.
        clip_skip: which layer of CLIP the prompt is taken from: 1 is the last; auto is the family's own.
        kept: what the run before in a queue has loaded, and what is kept for the next.

    Raises:
        ConfigError: an unknown name.
        ModelError: the model is missing, not readable or not of that family.
        ResourceError: a device that is not there.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    found = sniff(base, family, revision, prediction)
    plan = plan or _as_told(found, quantize, quantize_text_encoders, gradient_checkpointing is True)
    for key, form in (("quantize", plan.quantize), *(("quantize_text_encoders", form) for _, form in plan.encoders)):
        require_backend(form, f"model.{key}")
    read = partial(_read, found, kind, revision, Given(vae, text_encoder, tokenizer))
    beside = str(companion(Path(found.path))) if found.kind == "file" else None
    paths = [path for path in (str(found.path), beside, vae, text_encoder, tokenizer) if path is not None]
    model = base, family, vae, text_encoder, tokenizer, revision, dtype, prediction  # as `kept.WORDS`
    pieces = read() if kept is None else kept.load(model, paths, read)
    built = assemble(found, pieces, text_parts(found, pieces), where, kind, plan)
    if isinstance(clip_skip, int):
        built.clip_skip = clip_skip
    _place(built, plan)
    return built


def _as_told(found: Sniffed, quantize: str, texts: str, gradient_checkpointing: bool) -> MemoryPlan:
    """The plan of who says by hand how the model is held."""
    form = "none" if texts == "auto" else texts
    forms = tuple((one.name, form) for one in FAMILIES[found.family].text_encoders if one.quantizable)
    return MemoryPlan(quantize, gradient_checkpointing, False, 0.0, None, "", encoders=forms)


def assemble(
    found: Sniffed,
    pieces: dict[str, Any],
    texts: list[TextEncoderPart],
    device: torch.device,
    dtype: torch.dtype,
    memory: MemoryPlan | None = None,
) -> LoadedFamily:
    """The family's own object around its pieces."""
    parts = Parts(
        name=found.family, variant=found.variant, prediction=found.prediction, denoiser=pieces["denoiser"],
        vae=pieces["vae"], text_encoders=texts, scheduler=pieces["scheduler"], device=device, dtype=dtype,
        memory=memory, force_zeros=pieces.get("force_zeros", True), distilled=found.distilled,
    )  # fmt: skip
    return family_class(found.family)(parts)


def _read(found: Sniffed, dtype: torch.dtype, revision: str | None, given: Given) -> dict[str, Any]:
    """All pieces of a model, on the CPU; of what is given, the VAE is still a path."""
    own_vae = load_vae(given.vae, found) if given.vae is not None else None
    pieces = load_pieces(found, dtype, revision, replace(given, vae=own_vae))
    if own_vae is not None:
        pieces["vae"] = own_vae
    refuse_non_finite(str(found.path), pieces)
    if found.prediction != "flow" and pieces["scheduler"].config.get("prediction_type") != found.prediction:
        config = {**pieces["scheduler"].config, "prediction_type": found.prediction}
        pieces["scheduler"] = type(pieces["scheduler"]).from_config(config)
    return pieces


def load_beside(found: Sniffed, family: LoadedFamily, plan: MemoryPlan | None) -> LoadedFamily:
    """Another denoiser of a flow family, with the VAE and the text encoders of a model that is loaded, on the CPU.

    Checkpoints of such a family differ in the denoiser, and share the other parts, which are many times larger there.

    Raises:
        ModelError: missing, or not readable.
    """
    pieces = load_denoiser(found, family.dtype)
    refuse_non_finite(str(found.path), pieces)
    built = assemble(found, {**pieces, "vae": family.vae}, [], family.device, family.dtype, plan)
    built.text_encoders = [  # not frozen anew: some of them may be in training
        replace(part, encoder=pieces[part.name].requires_grad_(False)) if part.name in pieces else part
        for part in family.text_encoders
    ]
    built.trained_encoders, built.clip_skip = family.trained_encoders, family.clip_skip
    return built


def free_gib(device: torch.device) -> float | None:
    """Free memory of a GPU in GiB; None on other devices."""
    return torch.cuda.mem_get_info(device)[0] / GIB if device.type == "cuda" else None


def _place(family: LoadedFamily, plan: MemoryPlan) -> None:
    """Move the VAE and the text encoders to the device in the form that was planned; the denoiser comes after them.

    A text encoder that fits in no form works on the CPU.
    """
    if plan.gradient_checkpointing:
        checkpoint_blocks(family.denoiser)
    assert family.vae is not None
    family.vae.to(family.device)
    family.vae_in_tiles = plan.tile_encode
    forms = dict(plan.encoders)
    for part in family.text_encoders:
        form = forms.get(part.name, "none")
        if form == ON_CPU:
            continue
        if form != "none":
            family.note_plain(part)
            quantize_linears(part.encoder, form, family.device)
        if family.device.type == "mps":  # which has no float8
            make_plain(part.encoder)
        part.encoder.to(family.device)
