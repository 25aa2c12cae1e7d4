"""Out of memory: tried for ahead of the first step, and told with the switch that costs least and saves enough."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch

from emotrain.config.schema import Preset
from emotrain.errors import ResourceError
from emotrain.families.memory import MemoryPlan
from emotrain.families.table import Sniffed
from emotrain.runs.folder import RunFolder
from emotrain.runs.loaded import Loaded
from emotrain.runs.plan import activation_memory_of
from emotrain.runs.plan_memory import Memory, state_bytes_per_number
from emotrain.train.events import Event, Phase
from emotrain.train.memory import OutOfMemory, is_out_of_memory, rehearse, with_memory
from emotrain.train.state import TrainState

T = TypeVar("T")

# From what costs nothing but time to what changes the result; names as in `Memory.savings`.
COSTS = {
    "train.gradient_checkpointing: true": "the same result, some 30 % slower",
    "train.micro_batch_size: 1": "with train.gradient_accumulation_steps: {steps} a step is as large as before",
    "model.quantize: int8": "the base is rounded a little",
    "model.quantize: nf4": "the base is rounded; needs bitsandbytes",
    "model.memory: 8gb": "what does not fit waits in the computer's memory; slower",
    "network.text_encoder: false": "the text encoders are not trained",
    "half the rank": "less can be learned",
    "twice the factor": "less can be learned",
    "a resolution three quarters as large": "less detail",
}
GPU_ALONE = ("model.quantize: int8", "model.quantize: nf4", "model.memory: 8gb")
LEAST = 0.1  # of all that is needed: what a switch has to save where nothing is known of what is missing
GENERAL = "`emotrain plan PRESET` shows which settings save memory, and how much"


def try_largest(loaded: Loaded, state: TrainState, notify: Callable[[Event], None]) -> None:
    """Go through the largest batch ahead of the first step, unless that step has one as large.

    Raises:
        OutOfMemory: it does not fit; the hint says what to change.
    """
    data, train = loaded.data.train, loaded.preset.train
    largest = data.largest()
    numbers_of_step = filter(loaded.ranks.has, range(state.micro_batches))
    first = [data.size_of(state.micro_step + number) for number in numbers_of_step]
    if data.size_of(largest) in first or state.step >= train.max_steps:
        return
    model, name = loaded.model, "trying the largest batch"
    numbers = sum(parameter.numel() for parameter in model.adapter.parameters())
    kept = 0.0 if state.step else state_bytes_per_number(loaded.preset)
    notify(Phase(name))
    try:
        rehearse(model.family, model.objective, model.adapter, data.batch(largest), reserve=int(numbers * (4 + kept)))
    except OutOfMemory as error:
        raise add_advice(loaded, state, error) from None
    notify(Phase(name, 1, 1))


def run_with_advice(loaded: Loaded, state: TrainState, folder: RunFolder, doing: str, work: Callable[[], T]) -> T:
    """What `work` returns; run.json says so where memory runs out.

    Raises:
        OutOfMemory: with a hint what to change, and how to go on.
    """
    try:
        return with_memory(doing, work)
    except OutOfMemory as error:
        failed = error.with_traceback(None)
    with contextlib.suppress(ResourceError):
        folder.update_info(steps=state.step, stop_reason="out of memory")
    raise add_advice(loaded, state, failed)


def add_advice(loaded: Loaded, state: TrainState, error: OutOfMemory) -> OutOfMemory:
    """The error with a hint."""
    data, family = loaded.data.train, loaded.model.family
    count, _, height, width = data.batch(data.largest()).latents.shape
    hint = advice(
        loaded.preset,
        loaded.found,
        family.memory,
        (count, height, width),
        dtype=family.dtype,
        on_gpu=family.device.type == "cuda",
        asked_gib=error.asked_gib,
    )
    if state.step:
        hint += f"; resume with `emotrain resume {loaded.preset.name} --set KEY=VALUE --allow-config-change`"
    told = OutOfMemory(error.doing, error.asked_gib, hint, everywhere=error.everywhere)
    told.of_rank, told.is_silent = error.of_rank, error.is_silent
    return told


def advice(
    preset: Preset,
    found: Sniffed,
    used: MemoryPlan | None,
    batch: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    on_gpu: bool,
    asked_gib: float | None,
) -> str:
    """One line, for a hint.

    Args:
        preset: the run.
        found: its model.
        used: the means of saving memory that it is loaded with.
        batch: number of pictures, height and width of their latents.
        dtype: of the model's arithmetic.
        on_gpu: whether what only helps on a GPU is of use.
        asked_gib: size of the allocation that failed, if known.
    """
    used = used or MemoryPlan(preset.model.quantize, False, False, 0.0, None, "")
    try:
        memory = Memory(preset, found, activation_memory_of(preset, found, batch, dtype), dtype, None)
        rows = dict(memory.savings(used, least=0.0))
        needed = sum(gib for _, gib in memory.parts(used))
        rows["model.memory: 8gb"] = 0.0 if used.offload else needed - memory.choose("8gb").needed_gib
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return GENERAL
    named = [name for name in COSTS if rows.get(name, 0.0) > 0 and (on_gpu or name not in GPU_ALONE)]
    wanted = needed * LEAST if asked_gib is None else asked_gib
    chosen = choose([(name, rows[name]) for name in named], wanted)
    steps = preset.train.micro_batch_size * preset.train.gradient_accumulation_steps
    said = [f"`{name}` saves about {size(rows[name])} ({COSTS[name].format(steps=steps)})" for name in chosen]
    return " and ".join(said) if said else GENERAL


def choose(rows: list[tuple[str, float]], wanted: float) -> list[str]:
    """The first that saves `wanted` GiB by itself, else the first ones that do it together."""
    alone = next(([name] for name, gib in rows if gib >= wanted), None)
    if alone is not None:
        return alone
    chosen, saved = [], 0.0
    for name, gib in rows:
        if saved < wanted:
            chosen.append(name)
            saved += gib
    return chosen


def size(gib: float) -> str:
    """As a person would say it."""
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB" if gib * 1024 >= 1 else "less than 1 MiB"
