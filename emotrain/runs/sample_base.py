"""`sample.base`: the samples are drawn on another model of the family, with the LoRA of the moment on it.

Raw and base models are for training and draw poorly; what people draw with is Turbo, or a checkpoint of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from emotrain.config.schema import Preset
from emotrain.errors import ModelError
from emotrain.families.common import LoadedFamily, config_values, digest_module
from emotrain.families.component import guard
from emotrain.families.fitting import refuse_misfit
from emotrain.families.loading import load_beside, load_family
from emotrain.families.memory import MemoryPlan
from emotrain.families.quantize import in_large_linears
from emotrain.families.sniff_file import refuse_incomplete
from emotrain.families.table import FAMILIES, Sniffed, sniff
from emotrain.families.turns import away, come_back, leave
from emotrain.lora import names
from emotrain.lora.adapter import Adapter
from emotrain.lora.file import LoraFile, read_lora
from emotrain.lora.inject import fitted, fitted_krons
from emotrain.lora.targets import layers, part_of, select, whole_shape
from emotrain.runs import adapters, parents
from emotrain.runs.activation_memory import build_on_meta
from emotrain.train import rng
from emotrain.train.events import Event, Phase


@dataclass(frozen=True)
class Other:
    """What `sample.base` is, and how many parameters its denoiser has, and in layers that may be quantised."""

    found: Sniffed
    num_parameters: int
    linear: int


def look(preset: Preset, found: Sniffed, *, by_size: bool = False) -> Other | None:
    """What the preset draws on, by its files' outside; None where that is the model that is trained.

    Args:
        preset: of the run.
        found: the model that is trained.
        by_size: take a public model for what its built-in sizes say; nothing of it is fetched.

    Raises:
        EmotrainError: not there, not whole, or not a model that a LoRA of `found` fits.
    """
    base = preset.sample.base
    if base is None or not preset.sample.every or not preset.sample.prompts:
        return None
    other = sniff(base, prediction=preset.model.prediction, by_size=by_size)
    if (other.family, other.prediction) != (found.family, found.prediction):
        raise ModelError(
            f"`{base}` is {other.describe()}, and a LoRA of {found.describe()} does not work on it",
            f"draw on another {FAMILIES[found.family].title}, or leave sample.base out",
        )
    if other.latent_channels != found.latent_channels:
        raise ModelError(f"`{base}` has {other.latent_channels} latent channels instead of {found.latent_channels}")
    if not shares_parts(found):
        refuse_incomplete(other, has_vae=preset.model.vae is not None)
    if other.kind == "folder":
        refuse_misfit(other, other.steps_of_sample(preset.sample.steps))
    theirs = _on_meta(other)
    _refuse_misfit(preset, found, theirs, base)
    return Other(other, sum(p.numel() for p in theirs.parameters()), in_large_linears(theirs))


def shares_parts(found: Sniffed) -> bool:
    """Whether the models of a family differ in the denoiser alone; of SD and SDXL every checkpoint has its own CLIP."""
    return FAMILIES[found.family].flow


def _on_meta(found: Sniffed) -> nn.Module:
    def build() -> nn.Module:
        return build_on_meta(found.family, found.denoiser_config, torch.float32)

    return guard(str(found.path), FAMILIES[found.family].denoiser, build)


def _refuse_misfit(preset: Preset, found: Sniffed, theirs: nn.Module, base: str) -> None:
    """Refuse a model that lacks modules of the run's LoRAs, or has them in another size."""
    part, start = part_of(found.family), preset.start_from
    files = [read_lora(parents.lora_of(item.path)) for item in start.stack if item.sample]
    if start.continue_ is not None:
        files.append(read_lora(parents.lora_of(start.continue_)))
    try:
        for file in files:
            if part in file.parts:
                state, alphas = file.of_part(part)
                fitted_krons(theirs, state, part)
                fitted(theirs, {k: v for k, v in state.items() if not k.endswith((names.W1, names.W2))}, alphas, part)
    except ModelError as error:
        raise ModelError(f"`{base}`: {error.message}", "draw on a model of the size that is trained") from error
    if start.continue_ is not None:
        return
    ours = _on_meta(found)
    mine, held = layers(ours), layers(theirs)
    odd = [
        path
        for path in select(ours, preset.network.targets, found.family)
        if path not in held or whole_shape(held[path]) != whole_shape(mine[path])
    ]
    if odd:
        raise ModelError(
            f"`{base}` lacks {len(odd)} of the layers that the LoRA is put on, or has them in another size, such as "
            f"`{odd[0]}`",
            "draw on a model of the size that is trained",
        )


class SampleBase:
    """Another model that draws, with a copy of the LoRA that is trained.

    Args:
        other: what it is.
        digest: of its denoiser.
        family: the model, on the CPU.
        adapter: the LoRA on it.
        training: the model that is trained.
        trained: the LoRA on that one, whose weights count.
    """

    def __init__(
        self,
        other: Other,
        digest: str,
        family: LoadedFamily,
        adapter: Adapter,
        training: LoadedFamily,
        trained: Adapter,
    ) -> None:
        self.name, self.digest, self.family, self.adapter = other.found.name, digest, family, adapter
        self.training, self.trained = training, trained
        self.in_turn = training.memory is not None and training.memory.in_turn
        self._moved: list[tuple[Any, str]] = []

    def place(self) -> None:
        """Bring it to its device, and off again where the two take turns; its prompts are encoded by now."""
        if self.family.vae is self.training.vae:
            kept = {part.name for part in self.training.text_encoders}
            self.family.text_encoders = [part for part in self.family.text_encoders if part.name in kept]
        else:
            self.family.free_encoders()
            self.training.vae.to("cpu")  # nothing is decoded with it any more
        self.family.place_denoiser()
        self.adapter.use_half_precision(self.family.dtype)
        for parameter in self.adapter.parameters():
            parameter.requires_grad_(False)
        if self.in_turn:
            self._moved = leave(self.family.denoiser, self.family.device, self._staying(self.adapter))

    def record(self) -> dict[str, str]:
        return {"name": self.name, "sha256": self.digest}

    @staticmethod
    def _staying(adapter: Adapter) -> list[torch.Tensor]:
        return [*adapter.parameters(), *adapter.half_weights]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While it lasts the model holds the weights of the moment, and the device where the two take turns."""
        state = {names.canonical(key, self.trained.part): p for key, p in self.trained.named_parameters()}
        with torch.no_grad():
            for key, parameter in self.adapter.named_parameters():
                parameter.copy_(state[names.canonical(key, self.adapter.part)])
        if not self.in_turn:
            yield
            return
        device = self.family.device
        with away(self.training.denoiser, device, self._staying(self.trained)):
            come_back(self._moved, device)
            try:
                yield
            finally:
                self._moved = leave(self.family.denoiser, device, self._staying(self.adapter))


def load_base(
    preset: Preset,
    other: Other,
    training: LoadedFamily,
    trained: Adapter,
    earlier: LoraFile | None,
    notify: Callable[[Event], None],
) -> SampleBase:
    """Load `sample.base` onto the CPU, its text encoders ready for the prompts.

    Random states stay as they are: training does not depend on it.

    Raises:
        EmotrainError: it cannot be read, or the LoRA does not fit it.
    """
    notify(Phase("loading the base for samples"))
    with rng.untouched():
        shared, model, plan = shares_parts(other.found), preset.model, _plan_of(training.memory)
        if shared:
            family = load_beside(other.found, training, plan)
        else:
            family = load_family(
                str(preset.sample.base), family=other.found.family, vae=model.vae, dtype=model.dtype, plan=plan,
                quantize=model.quantize, prediction=model.prediction, clip_skip=model.clip_skip,
            )  # fmt: skip
        digest = digest_module(family.denoiser, config_values(family.denoiser.config))
        parents.apply_stack(preset, family, in_samples=True, texts=not shared)
        build = adapters.of_denoiser if shared else adapters.build_adapter
        adapter = build(preset, family, earlier)
    notify(Phase("loading the base for samples", 1, 1))
    return SampleBase(other, digest, family, adapter, training, trained)


def _plan_of(memory: MemoryPlan | None) -> MemoryPlan | None:
    """How the training base is held, without what training alone needs; all of its blocks are away where some are."""
    if memory is None:
        return None
    return replace(memory, gradient_checkpointing=False, budget_gib=None)
