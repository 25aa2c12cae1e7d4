"""What this machine's card means for a first preset: how the run will fit, and what the preset should say about it."""

from __future__ import annotations

import torch

from emotrain.config.schema import Preset
from emotrain.families.loading import choose_device
from emotrain.runs.plan import make_plan


def memory_proposal(preset: Preset) -> tuple[str | None, str]:
    """A value for `model.quantize`, None where `model.memory: auto` does it all; and the reason.

    fp8 is proposed where the frozen base would have to move back and forth, or does not fit, without a quantisation:
    `auto` takes int8 and nf4 by itself, but only where their libraries are installed; fp8 needs none.

    Raises:
        EmotrainError: what `emotrain check` would say.
    """
    made = make_plan(preset)
    memory = made.memory
    if made.free_gib is None:
        sizes = [size for size, plan in made.verdicts if plan.fits]
        cards = f"cards of {min(sizes)} GB and more can train it" if sizes else "no card of up to 24 GB can train it"
        return None, f"memory: no GPU was found here; by the numbers of `emotrain plan`, {cards}"
    device = choose_device("auto")
    name = torch.cuda.get_device_name(device)
    how = memory.sentence.removeprefix("memory: ")
    free = f"{made.free_gib:.1f} GiB are free on {name}"
    if memory.quantize == "none" and (memory.offload or not memory.fits):
        model = preset.model.model_copy(update={"quantize": "fp8"})
        other = make_plan(preset.model_copy(update={"model": model})).memory
        if other.fits and not other.offload:
            return "fp8", f"model.quantize: fp8, since {free}: {other.sentence.removeprefix('memory: ')}"
    if not memory.fits:
        saving = f"; `{made.savings[0][0]}` saves most" if made.savings else ""
        return None, f"memory: {free}, which is not enough: {how}{saving}; close what else uses the card"
    return None, f"memory: {free}; the run will choose at its start: {how}"
