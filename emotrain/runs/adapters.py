"""The LoRA of a run: on the denoiser, and on the CLIP text encoders where the preset trains them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emotrain.config.schema import Preset
from emotrain.errors import ConfigError, ModelError
from emotrain.families.common import LoadedFamily
from emotrain.families.table import FAMILIES, Sniffed, expected_modules
from emotrain.lora.adapter import Adapter, adapter_like, add_adapter, join
from emotrain.lora.file import LoraFile
from emotrain.lora.targets import part_of

TEXT_TARGETS = "attn-mlp"  # all Linear layers of a CLIP encoder, whatever network.targets says of the denoiser


def build_adapter(preset: Preset, family: LoadedFamily, earlier: LoraFile | None = None) -> Adapter:
    """A new LoRA, or the one that is continued; a text encoder that the earlier one left alone gets a new one.

    Raises:
        ConfigError: the earlier LoRA trains text encoders, and the preset does not.
        ModelError: the earlier LoRA does not fit the model.
    """
    names = family.train_encoders() if preset.network.text_encoder else ()
    if earlier is not None:
        refuse_lost_parts(earlier, family, names)
        earlier.refuse_mixture()
    denoiser = of_denoiser(preset, family, earlier)
    texts = [_of_encoder(preset, family, name, index, earlier, denoiser) for index, name in enumerate(names)]
    return join(denoiser, texts) if texts else denoiser


def refuse_lost_parts(earlier: LoraFile, family: LoadedFamily, names: tuple[str, ...]) -> None:
    """Refuse to continue a LoRA of which a part would silently be left out.

    Raises:
        ConfigError: it trains a text encoder that the preset does not train.
        ModelError: it trains one that cannot be trained.
    """
    trainable = [encoder.name for encoder in FAMILIES[family.name].trainable_encoders]
    lost = [part for part in earlier.parts if part not in (part_of(family.name), *names)]
    if not lost:
        return
    if all(part in trainable for part in lost):
        raise ConfigError(
            f"{earlier.path} also trains {' and '.join(lost)}, and network.text_encoder is off",
            "set network.text_encoder: true to continue all of it",
        )
    raise ModelError(
        f"{earlier.path} also trains {' and '.join(lost)}, which emotrain does not",
        "use a LoRA of the denoiser and CLIP alone",
    )


def of_denoiser(preset: Preset, family: LoadedFamily, earlier: LoraFile | None) -> Adapter:
    """The denoiser's part of it."""
    if earlier is not None:
        return adapter_like(family.denoiser, *earlier.of_part(part_of(family.name)), family=family.name)
    kwargs = adapter_kwargs(preset)
    return add_adapter(family.denoiser, family=family.name, seed=preset.train.seed, **kwargs)


def adapter_kwargs(preset: Preset) -> dict[str, Any]:
    """What the preset says of the denoiser's LoRA or LoKr, for `add_adapter`."""
    network = preset.network
    return {
        "rank": network.rank,
        "alpha": network.alpha,
        "targets": network.targets,
        "conv_rank": network.conv_rank,
        "rank_pattern": network.rank_pattern,
        "factor": network.factor if network.type == "lokr" else None,
    }


def text_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a CLIP text encoder's."""
    return {"rank": kwargs["rank"], "alpha": kwargs["alpha"], "factor": kwargs.get("factor"), "targets": TEXT_TARGETS}


def _of_encoder(
    preset: Preset, family: LoadedFamily, name: str, index: int, earlier: LoraFile | None, denoiser: Adapter
) -> Adapter:
    held = family.part(name)
    assert held is not None
    if earlier is not None and name in earlier.parts:
        return adapter_like(held.encoder, *earlier.of_part(name), family=family.name, part=name)
    kwargs = text_kwargs({**adapter_kwargs(preset), "factor": denoiser.factor})  # one kind for all of a file
    return add_adapter(held.encoder, family=family.name, seed=preset.train.seed + 1 + index, part=name, **kwargs)


def check_modules(found: Sniffed, targets: str | tuple[str, ...], num_modules: int) -> None:
    """Refuse a LoRA that covers other than the known number of the denoiser's modules, on a public model.

    Raises:
        ModelError: too few or too many: a library has renamed or moved layers.
    """
    _refuse_other_count(found, f"`{targets}`", expected_modules(found, targets), num_modules)


def check_text_modules(found: Sniffed, counts: dict[str, int]) -> None:
    """As `check_modules`, for the text encoders: name -> modules.

    Raises:
        ModelError: too few or too many.
    """
    info = FAMILIES[found.family]
    if found.variant in info.variants:
        for encoder in info.trainable_encoders:
            _refuse_other_count(found, f"the {encoder.name}", encoder.lora_modules, counts.get(encoder.name, 0))


def _refuse_other_count(found: Sniffed, what: str, expected: int | None, num_modules: int) -> None:
    if expected is not None and num_modules != expected:
        raise ModelError(
            f"a LoRA on {what} of {found.variant} has {num_modules} modules instead of {expected}",
            "another version of diffusers or transformers may have renamed layers; constraints.txt names tested ones",
        )
