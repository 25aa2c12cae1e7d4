"""What a run will need, before it starts: modules, steps, memory, disk. No weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from emotrain.config.schema import Preset
from emotrain.dataset.balance import FolderShare, folder_shares
from emotrain.dataset.buckets import Placement, place
from emotrain.dataset.examples import Example
from emotrain.dataset.scan import resolve_folder
from emotrain.dataset.settings import LoaderSettings
from emotrain.families.component import guard
from emotrain.families.loading import choose_device, choose_dtype, family_class, free_gib
from emotrain.families.memory import GIB, SIZES_GIB, MemoryPlan
from emotrain.families.ram import Ram, ram
from emotrain.families.sniff_file import public_model
from emotrain.families.table import FAMILIES, Sniffed
from emotrain.families.texts import num_text_tokens, trainable_encoders
from emotrain.lora.file import LoraFile, read_lora
from emotrain.lora.origin import require_family
from emotrain.ranks import ALONE, Ranks
from emotrain.runs import parents
from emotrain.runs.activation_memory import ActivationMemory, measure
from emotrain.runs.adapters import adapter_kwargs, check_modules, check_text_modules
from emotrain.runs.build import loader_settings, sniffed
from emotrain.runs.data import Pictures, read_pictures
from emotrain.runs.plan_memory import Memory, disk_parts
from emotrain.runs.plan_memory import state_bytes_per_number as state_bytes_per_number
from emotrain.runs.plan_ram import RamPlan, plan_ram, plan_without_gpu, weights_of
from emotrain.runs.sample_base import Other

RANGE = (0.9, 1.25)  # of the estimate


@dataclass(frozen=True)
class Work:
    """The data set as the loop will see it; `largest` is the placement of the largest bucket."""

    pictures: int
    held_out: int
    samples: int
    batches_per_epoch: int
    steps_per_epoch: float
    largest: Placement
    buckets: int
    texts: int
    flipped: int
    shares: tuple[FolderShare, ...] = ()  # of each folder, where there are several


@dataclass(frozen=True)
class Plan:
    """The whole plan; GiB everywhere. `parts` add up to what a training step takes, `needed` is the largest stage."""

    found: Sniffed
    num_modules: int
    num_trained: int
    num_parameters: int
    text_modules: int
    network: str
    rank: int | None
    factor: int | None
    dtype: str
    device: str
    batch: int
    work: Work
    max_steps: int
    memory: MemoryPlan
    parts: tuple[tuple[str, float], ...]
    encoders_gib: float
    savings: tuple[tuple[str, float], ...]
    verdicts: tuple[tuple[int, MemoryPlan], ...]
    disk: tuple[tuple[str, float], ...]
    free_gib: float | None
    ram: RamPlan
    ram_by_size: dict[int, RamPlan]  # as `verdicts`
    free_ram: Ram
    assumed: tuple[str, ...] = ()  # what was not there, and what was planned with instead

    @property
    def needed(self) -> float:
        """Peak of the whole run."""
        return self.memory.needed_gib

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the GPU of this machine; None where there is none."""
        return None if self.free_gib is None else self.needed <= self.free_gib


ASSUMED = 30  # pictures


def make_plan(
    preset: Preset,
    found: Sniffed | None = None,
    pictures: Pictures | None = None,
    other: Other | None = None,
    assumed: tuple[str, ...] = (),
) -> Plan:
    """Plan a run from its preset, its pictures and the small files of its model.

    Of a public model nothing is fetched. `found`, `pictures` and `other` are what `preflight` found; `assumed` is what
    was not there, see `assume`.

    Raises:
        EmotrainError: model or pictures cannot be used, or the LoRA would not cover the modules that it should.
    """
    found = found or sniffed(preset, by_size=True)
    pictures = pictures or read_pictures(preset)
    settings = loader_settings(preset, found)
    work = _work(pictures, settings, preset)
    device, low = choose_device("auto"), planned_dtype(preset.model.dtype, choose_device("auto"))
    activation_memory = activation_memory_of(preset, found, _largest(work.largest, preset, found), low)
    network = preset.network
    if preset.start_from.continue_ is None:
        check_modules(found, network.targets, activation_memory.adapter.num_modules)
    if network.text_encoder:
        check_text_modules(found, dict(activation_memory.text.modules))
    memory = Memory(preset, found, activation_memory, low, free_gib(device), other)
    chosen = memory.choose()
    encoded = encoded_gib(found, low.itemsize, work)
    held, weights = held_gib(encoded, settings), weights_of(found, preset.model, low, other.found if other else None)
    verdicts = tuple((int(size.removesuffix("gb")), memory.choose(size)) for size in reversed(SIZES_GIB))
    return Plan(
        found=found,
        num_modules=activation_memory.adapter.num_modules,
        num_trained=memory.trained,
        num_parameters=activation_memory.num_parameters,
        text_modules=sum(n for _, n in activation_memory.text.modules),
        network=activation_memory.adapter.title,
        rank=activation_memory.adapter.rank if activation_memory.adapter.factor is None else None,
        factor=activation_memory.adapter.factor,
        dtype=str(low).removeprefix("torch."),
        device=device.type,
        batch=preset.train.micro_batch_size,
        work=work,
        max_steps=preset.train.max_steps,
        memory=chosen,
        parts=memory.parts(chosen),
        encoders_gib=memory.encoders_gib(chosen),
        savings=memory.savings(chosen),
        verdicts=verdicts,
        disk=disk_parts(preset, memory, encoded),
        ram=plan_ram(memory, chosen, weights, held),
        ram_by_size={size: plan_ram(memory, plan, weights, held) for size, plan in verdicts},
        free_ram=ram(),
        free_gib=memory.free,
        assumed=assumed,
    )


def assume(preset: Preset) -> tuple[Preset, Pictures | None, tuple[str, ...]]:
    """What a shipped preset is planned with where its model or its pictures are not here.

    Returns:
        The preset, of the public model of its family where its own is not here; square pictures where none of its
        folders is; and a line for each of the two.

    Raises:
        EmotrainError: the model is not known.
    """
    model, lines = preset.model, []
    if model.family != "auto" and public_model(model.base) is None and not Path(model.base).exists():
        spec = FAMILIES[model.family]
        repository = next(variant.repository for variant in spec.variants.values() if variant.repository)
        lines.append(f"{model.base} is not here: planned for the public {spec.title}")
        own = {"base": repository, "vae": None, "text_encoder": None, "tokenizer": None, "revision": None}
        preset = preset.model_copy(update={"model": model.model_copy(update=own)})
    folders = [folder.path for folder in preset.dataset.folders]
    if any(resolve_folder(path).exists() for path in folders):
        return preset, None, tuple(lines)
    side = loader_settings(preset, sniffed(preset, by_size=True)).rules.resolutions[0]
    train = [Example(f"picture {i}", Path(), side, side, (f"caption {i}",), "", 0) for i in range(ASSUMED)]
    lines.append(f"{folders[0]} is not here: planned for {ASSUMED} pictures of {side}x{side}")
    return preset, Pictures(tuple(train), ()), tuple(lines)


def plan_run(
    preset: Preset,
    found: Sniffed,
    pictures: Pictures,
    settings: LoaderSettings,
    ranks: Ranks = ALONE,
    other: Other | None = None,
) -> tuple[MemoryPlan | None, RamPlan]:
    """How `run` fits into this machine's GPU, None where there is none, and what it takes of the computer's memory.

    By the same numbers as `plan`. Of several processes' GPUs the one with the least room decides for all. `other` is
    the model that samples are drawn on, where that is another one.
    """
    device, drawn = choose_device("auto"), other.found if other else None
    if device.type != "cuda":
        low = choose_dtype(preset.model.dtype, device)
        return None, plan_without_gpu(weights_of(found, preset.model, low, drawn))
    low, work = planned_dtype(preset.model.dtype, device), _work(pictures, settings, preset)
    activation_memory = activation_memory_of(preset, found, _largest(work.largest, preset, found), low)
    free = min(room or 0.0 for room in ranks.meet(free_gib(device)))
    memory = Memory(preset, found, activation_memory, low, free, other)
    if ranks.world > 1:
        free -= exchanged_gib(memory.trained)
        memory = Memory(preset, found, activation_memory, low, free, other)
    chosen = memory.choose()
    held = held_gib(encoded_gib(found, low.itemsize, work), settings)
    return chosen, plan_ram(memory, chosen, weights_of(found, preset.model, low, drawn), held)


def encoded_gib(found: Sniffed, itemsize: int, work: Work) -> tuple[float, float]:
    """GiB of the encoded data set at most: its latents (float32), and its captions (16 bit on GPUs)."""
    shapes = family_class(found.family).text_shapes(SimpleNamespace(**found.denoiser_config), num_text_tokens(found))
    numbers = sum(math.prod(shape) for shape in shapes.values())
    largest = work.largest.bucket_w * work.largest.bucket_h // found.vae_scale**2
    return work.flipped * found.latent_channels * largest * 4 / GIB, work.texts * numbers * itemsize / GIB


def held_gib(encoded: tuple[float, float], settings: LoaderSettings) -> float:
    """GiB of the encoded data set that stay in the computer's memory."""
    return encoded[0] + min(encoded[1], settings.text_memory / GIB)


def exchanged_gib(num_trained: int) -> float:
    """What several processes exchange each step, and hold once for that: the LoRA's gradients in float32."""
    return num_trained * 4 / 2**30


@dataclass(frozen=True)
class SecondGpu:
    """What two GPUs make of a run; a step takes as long as on one, and the exchange."""

    samples: int  # of a step
    steps_per_epoch: float
    more_gib: float  # on each, beside what one needs alone
    exchange_s: dict[str, float]  # by what connects the two: the time to send `more_gib` over it


SPEEDS = {"PCIe of 8 GB/s": 8e9, "a network of 1 Gbit/s": 1.25e8}  # bytes a second


def second_gpu(plan: Plan) -> SecondGpu:
    """What the run would be with `--gpus 2`."""
    accumulation = round(plan.work.batches_per_epoch / plan.work.steps_per_epoch)
    gib = exchanged_gib(plan.num_trained)
    times = {name: gib * 2**30 / speed for name, speed in SPEEDS.items()}
    return SecondGpu(2 * plan.batch * accumulation, plan.work.steps_per_epoch / 2, gib, times)


def _largest(place: Placement, preset: Preset, found: Sniffed) -> tuple[int, int, int]:
    """Pictures of the largest batch, height and width of their latents."""
    return preset.train.micro_batch_size, place.bucket_h // found.vae_scale, place.bucket_w // found.vae_scale


def activation_memory_of(
    preset: Preset, found: Sniffed, batch: tuple[int, int, int], low: torch.dtype
) -> ActivationMemory:
    """What a step keeps; `batch` is the number of pictures, and the height and width of their latents."""
    count = partial(
        measure,
        found.family,
        found.denoiser_config,
        latents=(batch[0], found.latent_channels, *batch[1:]),
        num_tokens=num_text_tokens(found),
        low=None if low == torch.float32 else low,
        adapter_kwargs=adapter_kwargs(preset),
        encoders=trainable_encoders(found) if preset.network.text_encoder else {},
        earlier=_continued(preset, found),
    )
    is_public = found.variant != "custom"
    return count() if is_public else guard(str(found.path), FAMILIES[found.family].denoiser, count)


def _continued(preset: Preset, found: Sniffed) -> LoraFile | None:
    """The LoRA that the run goes on from, which sets the network."""
    if preset.start_from.continue_ is None:
        return None
    file = read_lora(parents.lora_of(preset.start_from.continue_))
    require_family(file.family, found.family, str(file.path))
    return file


def planned_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """As `load_family` chooses; a machine without a GPU plans for one that has bf16."""
    if dtype == "auto" and device.type == "cpu":
        return torch.bfloat16
    return choose_dtype(dtype, device)


def _work(pictures: Pictures, settings: LoaderSettings, preset: Preset) -> Work:
    placed = [(example, place(example.width, example.height, settings.rules)) for example in pictures.all]
    held = {example.id for example in pictures.held_out}
    sizes: dict[tuple[int, int], int] = {}
    for example, placements in placed:
        for placement in placements if example.id not in held else ():
            sizes[placement.size] = sizes.get(placement.size, 0) + example.repeats
    batches = sum(-(-count // settings.micro_batch_size) for count in sizes.values())
    everything = [placement for _, placements in placed for placement in placements]
    flipped = [p for example, placements in placed if example.flip for p in placements]
    return Work(
        pictures=len(pictures.train),
        held_out=len(pictures.held_out),
        samples=sum(sizes.values()),
        batches_per_epoch=batches,
        steps_per_epoch=batches / preset.train.gradient_accumulation_steps,
        largest=max(everything, key=lambda p: p.bucket_w * p.bucket_h),
        buckets=len(sizes),
        texts=_num_texts(pictures.all, settings) if settings.encode_texts else 0,
        flipped=len(everything) + len(flipped),
        shares=folder_shares(pictures.train, preset.dataset.folders) if len(preset.dataset.folders) > 1 else (),
    )


def _num_texts(examples: tuple[Example, ...], settings: LoaderSettings) -> int:
    texts = {"", *(text for example in examples for text in settings.texts(example))}
    if settings.class_word is not None:
        texts |= {settings.class_text(example) for example in examples}
    return len(texts)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    work, found, second = plan.work, plan.found, second_gpu(plan)
    return {
        "model": {
            "family": found.family, "variant": found.variant, "prediction": found.prediction,
            "parameters": plan.num_parameters,
        },
        "network": {
            "rank": plan.rank, "factor": plan.factor, "modules": plan.num_modules, "parameters": plan.num_trained,
            "text_encoder_modules": plan.text_modules,
        },
        "data": {
            "assumed": list(plan.assumed),
            "pictures": work.pictures, "held_out": work.held_out, "samples_per_epoch": work.samples,
            "buckets": work.buckets, "largest_bucket": list(work.largest.size), "texts": work.texts,
            "folders": [{"name": one.name, "pictures": one.pictures, "repeats": one.repeats,
                         "share": round(one.share, 4)} for one in work.shares],
        },
        "steps_per_epoch": work.steps_per_epoch,
        "max_steps": plan.max_steps,
        "max_epochs": round(plan.max_steps / work.steps_per_epoch, 2),
        "micro_batch_size": plan.batch,
        "dtype": plan.dtype,
        "device": plan.device,
        "memory_gib": {name: round(gib, 3) for name, gib in plan.parts},
        "stages_gib": {name: round(gib, 3) for name, gib in plan.memory.stages},
        "needed_gib": round(plan.needed, 2),
        "range_gib": [round(plan.needed * share, 2) for share in RANGE],
        "means": plan.memory.means(),
        "encoders_gib": round(plan.encoders_gib, 3),
        "savings_gib": {name: round(gib, 2) for name, gib in plan.savings},
        "verdicts": {
            f"{size}gb": {"fits": p.fits, "needed_gib": round(p.needed_gib, 2),
                          "ram_gib": round(plan.ram_by_size[size].needed(), 2), **p.means()}
            for size, p in plan.verdicts
        },
        "disk_gib": {name: round(gib, 3) for name, gib in plan.disk},
        "second_gpu": {
            "samples_per_step": second.samples, "steps_per_epoch": second.steps_per_epoch,
            "more_gib": round(second.more_gib, 4),
            "exchange_s": {name: round(seconds, 4) for name, seconds in second.exchange_s.items()},
        },
        "ram": {
            "stages_gib": {name: round(gib, 3) for name, gib in plan.ram.stages},
            "locked_gib": round(plan.ram.locked, 3),
            "needed_gib": round(plan.ram.needed(), 2),
            "free_gib": round(plan.free_ram.free / GIB, 2),
        },
        "free_gib": None if plan.free_gib is None else round(plan.free_gib, 2),
        "fits": plan.fits,
    }  # fmt: skip


def rounded_epochs(plan: Plan) -> str:
    """How often the data set is seen at most."""
    epochs = plan.max_steps / plan.work.steps_per_epoch
    return f"{epochs:.1f}" if epochs < 10 else str(math.ceil(epochs))
