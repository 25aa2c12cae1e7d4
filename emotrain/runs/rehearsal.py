"""A run put together on a model without weights: what only its parts would refuse, `check` refuses too."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from emotrain.config.schema import Preset
from emotrain.errors import ModelError
from emotrain.families.fitting import from_configs, refuse_misfit, refuse_misfit_file
from emotrain.families.sniff import Sniffed
from emotrain.lora.adapter import Adapter
from emotrain.lora.check import self_check
from emotrain.lora.file import read_lora, save_lora
from emotrain.runs import parents
from emotrain.runs.build import build_optimizer_of, build_stop_rule, equip


def rehearse(preset: Preset, found: Sniffed, whole: bool) -> None:
    """Build the model on the meta device, the objective, the LoRA on it, the optimizer, and the names of the file.

    By the functions that a run uses; nothing is read but configs, headers and earlier LoRAs.

    Args:
        preset: of the run.
        found: the model.
        whole: the LoRA too, and what is built on it; else the model alone.

    Raises:
        ConfigError: targets, ranks or losses that this model does not take.
        ModelError: a model folder that does not fit together, an earlier LoRA of other sizes, or modules that the file
            layout has no name for.
    """
    if found.kind == "folder":
        family = refuse_misfit(found, found.steps_of_sample(preset.sample.steps))
    elif found.kind == "file":
        refuse_misfit_file(found, preset.model.tokenizer)
    if not whole:
        return
    if found.kind != "folder":
        family = from_configs(found)
    start = preset.start_from.continue_
    earlier = read_lora(parents.lora_of(start)) if start is not None else None
    _, adapter, _ = equip(preset, family, earlier)
    build_optimizer_of(preset, adapter.parameters())
    build_stop_rule(preset, held_out=False)
    _refuse_unwritable(preset, adapter, family.name)


def _refuse_unwritable(preset: Preset, adapter: Adapter, family: str) -> None:
    """Write such a LoRA of rank 1 and read it back as at the end of a run: a layout may have no name for a module."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in adapter.named_parameters():
        shape = list(value.shape)
        if name.endswith(("lora_A.weight", "lora_B.weight")):
            shape[name.endswith("lora_B.weight")] = 1
        state[name] = torch.randn(shape, generator=generator)
    alphas = dict.fromkeys(adapter.alphas(), 1.0)
    with tempfile.TemporaryDirectory(prefix="emotrain-") as folder:
        path = Path(folder) / "lora.safetensors"
        try:
            save_lora(path, state, alphas=alphas, family=family, format=preset.save.format, metadata={})
            self_check(path, state, alphas, family)
        except ModelError as error:
            raise ModelError(f"the LoRA's file could not be used: {error.message.removeprefix(f'{path}: ')}") from error
