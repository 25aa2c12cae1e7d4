"""One component of a model through the class that diffusers or transformers has for it, with distrust."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from emotrain.errors import EmotrainError, ModelError, first_line
from emotrain.families.headers import refuse_unreadable
from emotrain.families.quantize import RoundedLinear
from emotrain.families.quiet import quiet

Loaded = TypeVar("Loaded")
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # for transformers' classes on a folder of the user's


def known_class(where: str, part: str, index: dict[str, Any], known: frozenset[str]) -> str:
    """The class that model_index.json names for a part, if it is one that this part can be.

    A stranger's file must not choose what is run: `Auto...` classes follow the code that lies in the folder.

    Raises:
        ModelError: it is another one, or nothing of the kind.
    """
    entry = index.get(part)
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if not isinstance(name, str) or name not in known:
        raise ModelError(
            f"`{where}` has `{str(name)[:60]}` for its {part}, which emotrain does not load",
            f"known are {', '.join(sorted(known))}",
        )
    return name


def refuse_filled_up(where: str, info: dict[str, Any]) -> None:
    """Refuse a model of which tensors were not in its files: transformers fills them up at random.

    Raises:
        ModelError: a tensor is missing, left over or of another shape.
    """
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    mismatched = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get("mismatched_keys") or ()]
    if missing or mismatched:
        first = (missing or mismatched)[0]
        raise ModelError(
            f"`{where}` lacks {len(missing) + len(mismatched)} of its tensors, such as `{first}`",
            "its file is not complete, or its tensors have other names; download it again",
        )


def refuse_non_finite(where: str, pieces: dict[str, Any]) -> None:
    """Refuse a model with a weight that is infinite or no number: one spoils every picture.

    The least and the largest value of a tensor tell, in a small part of the time that its file takes to read.

    Raises:
        ModelError: there is one.
    """
    for part, model in pieces.items():
        if not isinstance(model, torch.nn.Module):
            continue
        rounded = {f"{path}.weight": one for path, one in model.named_modules() if isinstance(one, RoundedLinear)}
        for name, weight in model.named_parameters():
            if name in rounded:
                finite = rounded[name].is_finite()
            elif not weight.is_floating_point() or weight.element_size() == 1 or not weight.numel():
                continue  # of a quantised layer
            else:
                finite = all(bool(torch.isfinite(end)) for end in torch.aminmax(weight.detach()))
            if not finite:
                raise ModelError(
                    f"the {part} of `{where}` has a number that is not finite in `{name}`",
                    "the download is damaged, or fp16 cannot hold it: download it again, or set model.dtype to fp32",
                )


def check_complete(path: str, pieces: dict[str, Any]) -> None:
    """Refuse models in which a tensor was not in the file: diffusers leaves those on the meta device."""
    for part, module in pieces.items():
        if isinstance(module, torch.nn.Module):
            empty = [name for name, p in module.named_parameters() if p.device.type == "meta"]
            if empty:
                raise ModelError(
                    f"`{path}` lacks {len(empty)} tensors of its {part}, such as `{empty[0]}`",
                    "the file is not complete, or it is a model of another kind",
                )


def weight_files(folder: Path) -> list[Path]:
    """The weights of a component: its .safetensors files, those of the `fp16` variant where there are no others.

    Raises:
        ModelError: there is none, or one that is certainly no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(folder.glob("*.bin"))
        if pickles:
            refuse_unreadable(pickles[0])
        raise ModelError(
            f"`{folder}` holds no .safetensors file",
            "the model's folder is not complete; download it again",
        )
    plain = [file for file in files if "." not in file.stem]
    chosen = plain or [file for file in files if ".fp16." in file.name] or files
    for file in chosen:
        refuse_unreadable(file)
    return chosen


def load_one(cls: Any, where: str, part: str, revision: str | None, **kwargs: Any) -> Any:
    """One model of a folder, from safetensors only; where there is just a `fp16` variant of the file, that one.

    Raises:
        ModelError: missing, pickled, damaged, or with tensors of another shape.
    """
    folder = Path(where) / part
    if folder.is_dir() and all(".fp16." in file.name for file in weight_files(folder)):
        kwargs["variant"] = "fp16"
    return guard(
        where,
        part,
        lambda: cls.from_pretrained(where, subfolder=part, revision=revision, use_safetensors=True, **kwargs),
    )


def load_whole(cls: Any, where: str, part: str, revision: str | None, **kwargs: Any) -> Any:
    """One model of diffusers as by `load_one`, of which every tensor was in its files.

    Raises:
        ModelError: also where one was not: diffusers leaves it empty.
    """
    model, info = load_one(cls, where, part, revision, output_loading_info=True, **kwargs)
    refuse_filled_up(os.path.join(where, part), info)
    return model


def guard(where: str, part: str, load: Callable[[], Loaded]) -> Loaded:
    """Build something of diffusers or transformers from a user's files; its complaints become a ModelError.

    A library may raise anything, of any class, where a file is not what its names say.
    """
    from emotrain.families.hub import hub_error

    try:
        with quiet():
            return load()
    except (EmotrainError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if (known := hub_error(where, error)) is not None:
            raise known from error
        raise ModelError(
            f"`{os.path.join(where, part)}` cannot be loaded: {first_line(error)}",
            "the download may be damaged or not complete",
        ) from error
