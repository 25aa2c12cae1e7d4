"""One .safetensors file in the original layout, as shared on Civitai, through diffusers' `from_single_file`.

Where the configs come from: sizes of denoiser, VAE, text encoders and scheduler from the family's
`configs.json`, so that no network is needed for them. A folder beside the model with the file's own
name (`x.safetensors` and `x/`) comes first: it may hold any part of a diffusers folder, such as
`tokenizer/`, other sizes, or pieces that the file lacks. Tokenizers that are not there are taken from
the hub's cache, or the hub.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.families.component import check_complete, guard, load_one
from emotrain.families.encoder_file import build_encoder
from emotrain.families.headers import read_json
from emotrain.families.registry import FAMILIES, configs
from emotrain.families.sniff import Sniffed
from emotrain.families.sniff_file import companion, own_config
from emotrain.families.spec import TextEncoder
from emotrain.families.stored import Scaled, build_stored, read_weights

Held = TypeVar("Held")
_NORM = re.compile(r"(\.norm\.(?:key|query)_norm|distilled_guidance_layer\.norms\.\d+)\.weight$")


def load_single_file(found: Sniffed, dtype: torch.dtype, vae: Any = None, denoiser: Any = None) -> dict[str, Any]:
    """Denoiser, VAE (the file's, or those given), scheduler, text encoders, tokenizers; see `pieces.load_pieces`.

    Raises:
        ModelError: pieces are neither in the file nor beside it, or the file does not fit its kind.
    """
    beside = companion(Path(found.path))
    lacking = [name for name in found.missing if name != "vae" and not _has_weights(beside / name)]
    with config_folder(found, skip=set(lacking)) as folder:
        return _load(found, folder, found.missing, lacking, dtype, vae, denoiser)


def load_denoiser_of(found: Sniffed, dtype: torch.dtype) -> dict[str, Any]:
    """The denoiser of a flow model's file, and its scheduler.

    Raises:
        ModelError: the file does not fit its kind.
    """
    import diffusers

    denoiser = build_denoiser(found, dtype, *read_weights(Path(found.path)))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(_scheduler(found)[1])
    return {"denoiser": denoiser, "scheduler": scheduler}


def as_published(family: str, tensors: Mapping[str, Held]) -> dict[str, Held]:
    """A denoiser's tensors by its maker's names, which ComfyUI changes in what it saves.

    The norms of FLUX and Chroma: it calls `scale` `weight`. Flow models have no prefix.
    """
    prefix = "model.diffusion_model." if FAMILIES[family].flow else ""
    return {_NORM.sub(r"\1.scale", name.removeprefix(prefix)): tensor for name, tensor in tensors.items()}


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _load(
    found: Sniffed,
    folder: Path,
    absent: tuple[str, ...],
    lacking: list[str],
    dtype: torch.dtype,
    vae: Any,
    denoiser: Any,
) -> dict[str, Any]:
    import diffusers
    import transformers

    info = FAMILIES[found.family]
    path, beside = str(found.path), str(companion(Path(found.path)))
    index = read_json(folder / "model_index.json")
    if denoiser is None:
        denoiser = build_denoiser(found, dtype, *read_weights(Path(path)))
    pieces: dict[str, Any] = {"denoiser": denoiser}
    if vae is not None:
        pass
    elif "vae" in absent:
        vae = load_one(diffusers.AutoencoderKL, beside, "vae", None, torch_dtype=torch.float32)
    else:
        vae = guard(
            path, "vae", lambda: diffusers.AutoencoderKL.from_single_file(
                path, config=str(folder), subfolder="vae", torch_dtype=torch.float32, local_files_only=True
            ),
        )  # fmt: skip
    given: dict[str, Any] = {"vae": vae, info.denoiser: pieces["denoiser"]}
    for encoder in info.text_encoders:
        name, kind = encoder.name, index[encoder.name][1]
        if name in lacking:
            given[name] = given[encoder.tokenizer_name] = None
        elif name in absent:
            given[name] = load_one(getattr(transformers, kind), beside, name, None, dtype=dtype)
        elif encoder.quantizable:
            config = read_json(folder / name / "config.json")
            given[name] = build_encoder(Path(path), encoder, kind, config, dtype, inside=True)
    pipeline = guard(
        path, "", lambda: getattr(diffusers, info.pipeline).from_single_file(
            path, config=str(folder), torch_dtype=dtype, local_files_only=True, **given
        ),
    )  # fmt: skip
    pieces |= {"vae": vae, "scheduler": pipeline.scheduler}
    for encoder in info.text_encoders:
        for name in (encoder.name, encoder.tokenizer_name):
            pieces[name] = getattr(pipeline, name)
    check_complete(path, pieces)
    return pieces


def build_denoiser(found: Sniffed, dtype: torch.dtype, plain: dict[str, Tensor], scaled: dict[str, Scaled]) -> Any:
    """The denoiser of a file; see `stored.read_weights` for its tensors.

    Raises:
        ModelError: the tensors do not fit its kind.
    """
    import diffusers

    spec, path = FAMILIES[found.family], str(found.path)
    plain, scaled = as_published(found.family, plain), as_published(found.family, scaled)
    cls, public = getattr(diffusers, spec.denoiser_class), {"_class_name": spec.denoiser_class, **found.denoiser_config}
    config = own_config(found, f"{spec.denoiser}/config.json", public)
    if scaled:
        denoiser = guard(path, "", lambda: build_stored(cls, config, plain, scaled, dtype))
    else:
        with tempfile.TemporaryDirectory(prefix="emotrain-") as folder:
            write_json(Path(folder) / spec.denoiser / "config.json", config)
            denoiser = guard(
                path, "", lambda: cls.from_single_file(
                    plain, config=folder, subfolder=spec.denoiser, torch_dtype=dtype, local_files_only=True
                ),
            )  # fmt: skip
    check_complete(path, {spec.denoiser: denoiser})
    return denoiser


# ---------------------------------------------------------------- configs


@contextlib.contextmanager
def config_folder(found: Sniffed, skip: set[str]) -> Iterator[Path]:
    """A temporary diffusers folder without weights, but for those that lie beside the file.

    Args:
        found: a single file.
        skip: text encoders that the model does without; their tokenizers are left out too.

    Raises:
        ModelError: a tokenizer cannot be had.
    """
    info = FAMILIES[found.family]
    beside = companion(Path(found.path))
    texts = configs(found.family)["text_encoders"]
    with tempfile.TemporaryDirectory(prefix="emotrain-") as name:
        folder = Path(name)
        parts: dict[str, Any] = {info.denoiser: found.denoiser_config, "vae": configs(found.family)["vae"]}
        parts |= {name: config for name, (_, config) in texts.items() if name not in skip}
        for part, config in parts.items():
            write_json(folder / part / "config.json", own_config(found, f"{part}/config.json", config))
        for encoder in info.text_encoders:
            if encoder.name not in skip:
                copy_tokenizer(encoder, beside, folder, Path(found.path))
        write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(found)[1])
        write_json(folder / "model_index.json", _index(found, texts, skip))
        yield folder


def _scheduler(found: Sniffed) -> tuple[str, dict[str, Any]]:
    """Class and config; DDIM for diffusion models, which knows v and zero terminal SNR."""
    config = dict(found.scheduler_config)
    if found.prediction == "flow":
        return "FlowMatchEulerDiscreteScheduler", config
    config |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    if config.get("rescale_betas_zero_snr"):
        config |= {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    return "DDIMScheduler", config


def _index(found: Sniffed, texts: dict[str, Any], skip: set[str]) -> dict[str, Any]:
    info = FAMILIES[found.family]
    index: dict[str, Any] = {
        "_class_name": info.pipeline,
        info.denoiser: ["diffusers", info.denoiser_class],
        "vae": ["diffusers", info.vae_class],
        "scheduler": ["diffusers", _scheduler(found)[0]],
    }
    if info.pipeline == "StableDiffusionPipeline":
        index |= {"requires_safety_checker": False}
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    for name, (kind, _) in texts.items():
        encoder = info.encoder(name)
        known = ["transformers", encoder.tokenizer_class]
        index[name] = [None, None] if name in skip else ["transformers", kind]
        index[encoder.tokenizer_name] = [None, None] if name in skip else known
    return index


def write_json(path: Path, value: Any) -> None:
    """A JSON file, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def copy_tokenizer(encoder: TextEncoder, beside: Path, folder: Path, model: Path) -> None:
    """Put an encoder's tokenizer into `folder`: from beside the model, or from the hub's cache, or the hub.

    Raises:
        ModelError: it is in neither, and the hub cannot be reached.
    """
    name = encoder.tokenizer_name
    if (beside / name).is_dir():
        shutil.copytree(beside / name, folder / name)
    else:
        from emotrain.families.hub import fetch_folder

        repo, part = encoder.tokenizer
        patterns = ["*token*.json", "vocab.json", "merges.txt", "spiece.model"]
        wanted = [f"{part}/{pattern}" if part else pattern for pattern in patterns]
        fetched = fetch_folder(repo, wanted)
        if fetched is None:
            raise ModelError(
                f"`{model}` needs a tokenizer, and `{repo}` on the hub cannot be reached",
                f"go online once, or put a folder `{beside.name}/{name}` beside the model, with the "
                f"files of that repository's `{part or 'top folder'}`",
            )
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in (fetched / part).glob("*"):
            if file.is_file():
                shutil.copy(file, folder / name)
    _limit_tokens(folder / name / "tokenizer_config.json", 512 if encoder.kind == "t5" else encoder.max_tokens)


def _limit_tokens(config: Path, limit: int) -> None:
    """Tokenizers without a limit of their own get the public model's."""
    words = read_json(config) if config.is_file() else {}
    said = words.get("model_max_length")
    if not isinstance(said, int | float) or not 1 <= said <= limit:
        write_json(config, {**words, "model_max_length": limit})
