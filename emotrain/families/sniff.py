"""Recognising a model from JSON configs and tensor names (no torch)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emotrain.errors import ModelError
from emotrain.families.headers import INDEX, MODULAR_INDEX, read_index, read_json
from emotrain.families.registry import FAMILIES, configs

Prediction = Literal["epsilon", "v_prediction", "flow"]
SAMPLE_STEPS = 20


@dataclass(frozen=True)
class Sniffed:
    """What a model is.

    `variant` is one of the public models or "custom" (another size); `resolution` and `bucket_step`
    are pixels, `vae_scale` pixels per latent; `max_rank` is the largest rank that can still add
    something; `missing` names pieces that are not in it; a `distilled` model draws in few steps.
    """

    family: str
    variant: str
    prediction: Prediction
    resolution: int
    bucket_step: int
    vae_scale: int
    max_rank: int
    kind: Literal["folder", "file", "hub"]
    latent_channels: int
    path: Path | str
    denoiser_config: dict[str, Any] = field(default_factory=dict, repr=False)
    scheduler_config: dict[str, Any] = field(default_factory=dict, repr=False)
    missing: tuple[str, ...] = ()
    distilled: bool = False

    @property
    def name(self) -> str:
        """Of its file, folder or repository."""
        return name_of(self.path)

    def steps_of_sample(self, wanted: int | Literal["auto"]) -> int:
        """Steps of a sample; auto: of a distilled model those in its name, or its kind's."""
        if wanted != "auto":
            return wanted
        if not self.distilled:
            return SAMPLE_STEPS
        named = re.search(r"(?<!\d)(\d{1,2})[-_ ]?steps?", self.name.lower())
        return int(named[1]) if named and int(named[1]) else FAMILIES[self.family].distilled.steps

    @property
    def sample_guidance(self) -> float | None:
        """The same for guidance: none (1) for a distilled model unless it embeds it, and else the family's (None)."""
        return 1.0 if self.distilled and not self.denoiser_config.get("guidance_embeds") else None

    def describe(self) -> str:
        """A few words for messages: `sdxl (Stable Diffusion XL, v_prediction)`."""
        return f"{self.family} ({FAMILIES[self.family].title}, {self.prediction})"


def name_of(path: Path | str) -> str:
    """What a model is called: the last word of its path that is not the same for all models."""
    parts = [part.removesuffix(".safetensors").rpartition("--")[2] for part in Path(path).parts]
    return next((part for part in reversed(parts) if not _FOR_ALL.fullmatch(part)), Path(path).stem)


_FOR_ALL = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.fp16|\.bf16)?(?:-\d+-of-\d+)?|transformer|unet|snapshots|[0-9a-f]{40}"
)


def is_distilled(family: str, name: str, variant: str = "", said: object = None) -> bool:
    """Whether a model was distilled to few steps: by its own word for it, its sizes, or its name.

    Args:
        family: of the model.
        name: of its file, folder or repository.
        variant: the public model that it is.
        said: `is_distilled` of its model_index.json, where that says it.
    """
    if isinstance(said, bool):
        return said
    rule = FAMILIES[family].distilled
    told = rule.tells(name)
    return variant in rule.variants if told is None else told


def widest_layer(config: dict[str, Any]) -> int:
    """The widest layer's narrower side."""
    if "block_out_channels" in config:
        return int(max(config["block_out_channels"]))
    if config.get("dim") is not None:
        return int(config["dim"])
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    return (heads if isinstance(heads, int) else 24) * (width if isinstance(width, int) else 128)


def _step(family: str, config: dict[str, Any], vae_scale: int, resolution: int) -> int:
    """Pixels that sides must be multiples of; 64 for models of real size."""
    spec = FAMILIES[family]
    halvings = 2 ** (len(config.get("block_out_channels", [0] * 4)) - 1) if spec.denoiser == "unet" else spec.patch
    least = vae_scale * halvings
    return max(least, 64) if resolution >= 256 else least


def variant_of(family: str, config: dict[str, Any]) -> str:
    """The public model whose sizes (and guidance embedding) the denoiser config has, or "custom"."""
    words = (
        "block_out_channels",
        "cross_attention_dim",
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "guidance_embeds",
        "qk_norm",
        "in_channels",
        "joint_attention_dim",
        "dim",
        "n_layers",
        "num_key_value_heads",
    )
    for name in FAMILIES[family].variants:
        public = configs(family)["denoiser"][name]
        if all(_same(config.get(word), public.get(word)) for word in words if word in public or word == "qk_norm"):
            return name
    return "custom"


def _same(one: Any, other: Any) -> bool:
    return (
        list(one) == list(other)
        if isinstance(one, list | tuple) and isinstance(other, list | tuple)
        else bool(one == other)
    )


def sniff_folder(folder: Path) -> Sniffed:
    """A diffusers folder.

    Raises:
        ModelError: pieces are missing, or it is a pipeline that is not known here.
    """
    if not (folder / INDEX).is_file() and not (folder / MODULAR_INDEX).is_file():
        inside = sorted(p.name for p in folder.glob("*.safetensors"))
        if inside:
            raise ModelError(
                f"`{folder}` is a folder without model_index.json",
                f"give the file itself, such as `{folder / inside[0]}`",
            )
        raise ModelError(
            f"`{folder}` is not a diffusers folder: model_index.json is missing",
            "give the folder that holds model_index.json, or a .safetensors file",
        )
    index = read_index(folder)
    return _from_configs(
        folder,
        index,
        lambda part, name: read_json(folder / part / name),
        "folder",
        _absent(folder, index),
    )


def _absent(folder: Path, index: dict[str, Any]) -> tuple[str, ...]:
    """Parts that model_index.json names and the folder does not hold."""
    wanted = [part for part, value in index.items() if isinstance(value, list) and value and isinstance(value[0], str)]
    return tuple(
        part
        for part in wanted
        if not (folder / part).is_dir() and part not in ("safety_checker", "feature_extractor", "image_encoder")
    )


SIZES = (
    "in_channels", "out_channels", "latent_channels", "z_dim", "dim", "n_layers", "num_layers", "num_single_layers",
    "num_attention_heads", "attention_head_dim", "sample_size", "cross_attention_dim", "joint_attention_dim",
    "patch_size",
)  # fmt: skip
ONE_A_LEVEL = ("num_attention_heads", "attention_head_dim", "cross_attention_dim", "sample_size", "patch_size")
LISTS = ("block_out_channels", "dim_mult")
FACTORS = ("scaling_factor", "shift_factor")  # of a VAE's latents; null stands for none
MAX_SIZE = 2**20
MAX_LEVELS = 16


def _refuse_odd_sizes(where: Path | str, part: str, config: dict[str, Any]) -> None:
    """Refuse a config whose sizes are no whole numbers of a sane size, or whose factors are no numbers.

    Raises:
        ModelError: with the field.
    """

    def is_size(value: object) -> bool:
        return type(value) is int and 0 < value <= MAX_SIZE

    for name in (*SIZES, *LISTS):
        value = config.get(name)
        right = is_size(value) and name not in LISTS
        if isinstance(value, list) and name in (*LISTS, *ONE_A_LEVEL):
            right = all(map(is_size, value)) and 0 < len(value) <= MAX_LEVELS
        if name in config and not right and (value is not None or name in LISTS):
            raise odd_value(f"{where}/{part}/config.json", name, value)
    for name in FACTORS:
        value = config.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise odd_value(f"{where}/{part}/config.json", name, value)


def odd_value(file: Path | str, name: str, value: object) -> ModelError:
    """The refusal of a value in a config."""
    return ModelError(
        f"`{file}` says {name} is {repr(value)[:60]}, which no model has",
        "the download may be damaged; download it again",
    )


def _from_configs(
    where: Path | str,
    index: dict[str, Any],
    read: Any,
    kind: Literal["folder", "hub"],
    missing: tuple[str, ...],
) -> Sniffed:
    pipeline = str(index.get("_class_name"))
    known = {kind: name for name, spec in FAMILIES.items() for kind in (spec.pipeline, *spec.other_pipelines)}
    if pipeline not in known:
        raise ModelError(
            f"`{where}` is a {pipeline}, which emotrain does not train",
            f"known are {', '.join(sorted(known))}",
        )
    if missing:
        raise ModelError(
            f"`{where}` is not complete: {', '.join(missing)} missing",
            "download the whole folder again",
        )
    family = "sd15" if known[pipeline] == "sd21" else known[pipeline]
    spec = FAMILIES[family]
    texts = [name for encoder in spec.text_encoders for name in (encoder.name, encoder.tokenizer_name)]
    for part in (spec.denoiser, "vae", "scheduler", *texts):
        entry = index.get(part, [None, None])
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(x, str | None) for x in entry):
            raise odd_value(f"{where}/model_index.json", part, entry)
    denoiser = read(spec.denoiser, "config.json")
    vae = read("vae", "config.json")
    for part, config in ((spec.denoiser, denoiser), ("vae", vae)):
        _refuse_odd_sizes(where, part, config)
    scheduler = read("scheduler", "scheduler_config.json") if "scheduler" in index else _public_scheduler(family)
    if family == "sd15" and denoiser.get("cross_attention_dim") == 1024:
        family = "sd21"
    levels = vae.get("block_out_channels") or vae.get("dim_mult")
    vae_scale = spec.vae_scale if levels is None else 2 ** (len(levels) - 1) * spec.vae_patch
    channels = latent_channels(family, vae)
    _check_inputs(where, family, denoiser, channels)
    side = denoiser.get("sample_size")
    if spec.packed_channels > 1 or not isinstance(side, int):
        own = vae.get("sample_size")
        resolution = own if isinstance(own, int) else spec.resolution
    else:
        resolution = side * vae_scale
    variant = variant_of(family, denoiser)
    return Sniffed(
        family=family, variant=variant, prediction=_prediction(where, family, scheduler),
        resolution=resolution, bucket_step=_step(family, denoiser, vae_scale, resolution), vae_scale=vae_scale,
        max_rank=widest_layer(denoiser), kind=kind, latent_channels=channels, path=where,
        denoiser_config={k: v for k, v in denoiser.items() if not k.startswith("_")}, scheduler_config=scheduler,
        distilled=is_distilled(family, name_of(where), variant, index.get("is_distilled")),
    )  # fmt: skip


def _public_scheduler(family: str) -> dict[str, Any]:
    config: dict[str, Any] = next(iter(configs(family)["scheduler"].values()))[1]
    return config


def latent_channels(family: str, vae: dict[str, Any]) -> int:
    """Channels of the latents that the loop sees, by the VAE's config."""
    spec = FAMILIES[family]
    own = vae.get("latent_channels") or vae.get("z_dim")
    return spec.latent_channels if own is None else int(own) * spec.vae_patch**2


def refuse_other_vae(vae: str, config: dict[str, Any], found: Sniffed) -> None:
    """Refuse a VAE whose latents the denoiser does not take.

    Raises:
        ModelError: of another number of channels.
    """
    channels = latent_channels(found.family, config)
    if channels != found.latent_channels:
        raise ModelError(
            f"model.vae `{vae}` has {channels} latent channels, but the model needs {found.latent_channels}",
            f"use a VAE made for {found.family}, or leave model.vae out",
        )


def _check_inputs(where: Path | str, family: str, denoiser: dict[str, Any], channels: int) -> None:
    """Refuse denoisers that take more than latents (inpainting, edit, fill and control models)."""
    wanted = channels * FAMILIES[family].packed_channels
    if (denoiser.get("in_channels") or wanted) != wanted:
        raise ModelError(
            f"`{where}` takes {denoiser['in_channels']} input channels instead of {wanted}: "
            "an inpainting or edit model",
            "train on the text-to-image model that it was made from",
        )


def _prediction(where: Path | str, family: str, scheduler: dict[str, Any]) -> Prediction:
    if FAMILIES[family].flow:
        return "flow"
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"`{where}` predicts `{kind}`, which emotrain does not train",
            "known are epsilon, v_prediction and flow models",
        )
    return "epsilon" if kind == "epsilon" else "v_prediction"


# ---------------------------------------------------------------- hub ids


def sniff_hub(repo: str, revision: str | None = None) -> Sniffed:
    """A model on the hub, from its small JSON files.

    Raises:
        ModelError: not there, not allowed, or no network.
    """
    from emotrain.families.hub import fetch_index, fetch_json

    index = fetch_index(repo, revision)
    return _from_configs(repo, index, lambda part, name: fetch_json(repo, f"{part}/{name}", revision), "hub", ())
