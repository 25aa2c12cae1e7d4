"""What a run takes of the computer's memory, stage by stage, and whether there is room for it.

A weight whose type in its file is the one that the run computes with is mapped from the file: its pages come and go as
the system likes, and several processes share them. A weight that is converted while it is read is a copy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from emotrain.config.schema import ModelSection
from emotrain.errors import ResourceError
from emotrain.families.component import weight_files
from emotrain.families.headers import Header, own_name, read_header
from emotrain.families.hub import fetched_folder
from emotrain.families.memory import GIB, ON_CPU, VAES, MemoryPlan
from emotrain.families.ram import Ram
from emotrain.families.registry import FAMILIES
from emotrain.families.sniff import Sniffed
from emotrain.families.sniff_file import companion
from emotrain.families.spec import TEXTS_BEGIN, VAE_BEGINS
from emotrain.families.stored import kept_names, kept_parts
from emotrain.families.texts import encoder_parameters
from emotrain.families.understood import PARTS
from emotrain.runs.activation_memory import num_parameters
from emotrain.runs.plan_memory import Memory

PROGRAM_GIB = 0.7  # Python and the libraries
CUDA_GIB = 0.8  # what CUDA's keep there
TIGHT = 0.9  # of what is free: from there on the user is warned
CERTAIN = 1.1  # times what is free: from there on the run is refused; the count may be off by a tenth
TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
WEIGHTS = (*TYPES.values(), "F64", "F8_E4M3", "F8_E5M2", "I8")  # other types are of places and tokenizers
VAE, TEXTS = VAE_BEGINS, (*TEXTS_BEGIN, "conditioner.")
LEFT_OUT = ("model_ema.",)
WIDE = ".DenseReluDense.wo.weight"  # of a T5: float32 beside float16


@dataclass(frozen=True)
class Weights:
    """GiB of a model's weights in the computer's memory."""

    whole: float = 0.0  # all of them, as the run has them
    # by part (denoiser, vae, text, other), those that are converted while they are read
    copied: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RamPlan:
    """What one process takes of the computer's memory, in GiB."""

    # load, encode, place, train, and draw where two bases take turns, each with its peak
    stages: tuple[tuple[str, float], ...]
    locked: float = 0.0  # of it what cannot go to the swap
    copied: float = 0.0  # the model's weights that are converted while they are read
    beside: float = 0.0  # the largest stage after loading, without the program itself

    def needed(self, processes: int = 1, *, in_turn: bool = False) -> float:
        """The largest stage, of all processes of a machine that do the same at the same time.

        `in_turn`: one after another loads its model and brings it to its GPU. One alone draws.
        """
        alone, train = max(gib for _, gib in self.stages), dict(self.stages)["train"]
        if in_turn:
            return max(processes * train, (processes - 1) * train + alone)
        shared = max(gib for name, gib in self.stages if name != "draw")
        return max(processes * shared, (processes - 1) * train + alone)


def plan_ram(memory: Memory, chosen: MemoryPlan, weights: Weights, data: float) -> RamPlan:
    """Of a run on a GPU.

    Args:
        memory: its numbers.
        chosen: how it fits into the GPU.
        weights: of its files.
        data: GiB of the encoded data set that stay in the computer's memory.
    """
    program = PROGRAM_GIB + CUDA_GIB
    forms = dict(chosen.encoders)
    on_cpu = sum(one.gib("none", memory.itemsize) for one in memory.encoders if forms.get(one.name) == ON_CPU)
    home, copied = memory.blocks_at_home(chosen), weights.copied
    denoiser, other = copied.get("denoiser", 0.0), copied.get("other", 0.0)
    waiting = memory.other_base(chosen) if chosen.in_turn else 0.0
    train = program + data + home + waiting + 2 * memory.checkpoint()
    stages = {
        "load": program + sum(copied.values()) - other,
        "encode": program + data + denoiser + on_cpu,
        "place": program + data + max(home, denoiser + other),
        "train": train,
        "draw": train + waiting,
    }
    beside = max(gib for name, gib in stages.items() if name != "load") - program
    here = tuple((name, gib) for name, gib in stages.items() if name != "draw" or waiting)
    return RamPlan(here, home, sum(copied.values()) - other, beside)


def plan_without_gpu(weights: Weights) -> RamPlan:
    """Of a run on the CPU, by its weights alone: all of them are there while it loads."""
    whole, copied = weights.whole, sum(gib for part, gib in weights.copied.items() if part != "other")
    return RamPlan((("load", PROGRAM_GIB + whole), ("train", PROGRAM_GIB + whole)), copied=copied, beside=whole)


def weights_of(found: Sniffed, model: ModelSection, dtype: torch.dtype, other: Sniffed | None = None) -> Weights:
    """Of a model's files, by their headers; what of the hub is not there yet counts as stored in `dtype`, by its sizes.

    Args:
        found: the model.
        model: the preset's words for it.
        dtype: which it computes with; the VAE in float32.
        other: the model that samples are drawn on, where that is another one.

    Raises:
        ModelError: a file that cannot be read.
    """
    whole: Counter[str] = Counter()  # bytes
    copied: Counter[str] = Counter()
    files = [*_files(found, model)]
    # What else lies in such a file, and is given apart, is not read.
    unread = (*LEFT_OUT, *(VAE if model.vae is not None else ()), *(TEXTS if model.text_encoder is not None else ()))
    if other is not None:
        files += [("other", file) for part, file in _files(other, model) if part == "denoiser"]
    for part, path in files:
        header = read_header(path)
        kept = _kept(part, path, header, found, model, other)
        skipped = PARTS if part == "other" else unread if part == "denoiser" else LEFT_OUT
        for name, shape in header.shapes.items():
            own, stored, count = own_name(name), header.dtypes[name], math.prod(shape)
            if stored not in WEIGHTS or own.startswith(skipped):
                continue
            of = "vae" if own.startswith(VAE) else "text" if own.startswith(TEXTS) else part
            is_wide = of == "vae" or (of == "text" and dtype == torch.float16 and own.endswith(WIDE))
            wanted = torch.float32 if is_wide else dtype
            if name in kept:
                whole[of] += count
            else:
                whole[of] += count * wanted.itemsize
                copied[of] += count * wanted.itemsize * (stored != TYPES[wanted])
    there = {part for part, _ in files}
    if found.kind == "hub":
        whole.update({part: size for part, size in _sizes(found, dtype).items() if part not in there})
    if other is not None and other.kind == "hub" and "other" not in there:
        whole["other"] = _sizes(other, dtype)["denoiser"]
    return Weights(whole.total() / GIB, {part: size / GIB for part, size in copied.items()})


def _kept(
    part: str, path: Path, header: Header, found: Sniffed, model: ModelSection, other: Sniffed | None
) -> set[str]:
    """The weights of a file that stay as they are stored; of a folder, and of a CLIP, all are converted."""
    if part == "denoiser":
        return set().union(*kept_parts(found, header).values()) if found.kind == "file" else set()
    if part == "other":
        return kept_names(header) if other is not None and other.kind == "file" else set()
    given = part == "text" and model.text_encoder is not None and Path(model.text_encoder) == path
    return kept_names(header) if given else set()


def _sizes(found: Sniffed, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each part of a model that is not here."""
    known = FAMILIES[found.family].variants.get(found.variant)
    denoiser = known.parameters if known is not None else num_parameters(found.family, found.denoiser_config)
    texts, vae = sum(encoder_parameters(found).values()), VAES[FAMILIES[found.family].vae_class]
    whole = int((vae.decoder + vae.encoder) * GIB)
    return {"denoiser": denoiser * dtype.itemsize, "text": texts * dtype.itemsize, "vae": whole}


def _files(found: Sniffed, model: ModelSection) -> Iterator[tuple[str, Path]]:
    """The model's files, each with its part: denoiser (a single file has others in it), vae or text."""
    spec, folder = FAMILIES[found.family], Path(found.path)
    single = folder.is_file()
    encoders = spec.encoders_of(found.variant)
    parts = {one.name if single else one.folder: "text" for one in encoders} | {"vae": "vae"}
    if single:
        yield "denoiser", folder
        folder = companion(folder)
        parts = {name: part for name, part in parts.items() if name in found.missing}
    else:
        parts[spec.denoiser] = "denoiser"
    if not single and not folder.exists():  # of the hub, or a public model by its sizes alone
        folder = fetched_folder(folder.as_posix(), model.revision) or folder
    places = {folder / name: part for name, part in parts.items()}
    for given, part in ((model.vae, "vae"), (model.text_encoder, "text")):
        if given is not None:
            places = {place: of for place, of in places.items() if of != part} | {Path(given): part}
    for place, part in places.items():
        inner = next((one for one in (place / "vae", place / "text_encoder") if one.is_dir()), place)
        if inner.is_file():
            yield part, inner
        elif any(inner.glob("*.safetensors")):
            yield from ((part, file) for file in weight_files(inner))


def room(plan: RamPlan, ram: Ram, processes: int = 1, *, kept: int = 0) -> tuple[bool, str | None]:
    """Whether there is room for what a run takes of the computer's memory.

    Args:
        plan: of one process.
        ram: of this machine.
        processes: of the run on this machine.
        kept: bytes that a queue's run before has left there, and that go or are used again.

    Returns:
        Whether the processes load one after another, and a warning where there is little room.

    Raises:
        ResourceError: there is none.
    """
    free, swap = (ram.free + kept) / GIB, ram.swap / GIB
    in_turn = processes > 1 and plan.needed(processes) > TIGHT * free
    needed, locked = plan.needed(processes, in_turn=in_turn), processes * plan.locked
    who = f"{processes} processes need" if processes > 1 else "the run needs"
    what = f"{who} about {needed:.1f} GiB of the computer's memory"
    what += f", {locked:.1f} of it for blocks that wait there" if locked else ""
    if needed > CERTAIN * (free + swap) or locked > CERTAIN * free:
        raise ResourceError(f"{what}, and {free:.1f} GiB are free", _remedy(plan, processes))
    return in_turn, f"{what}, of {free:.1f} GiB that are free: it may get slow" if needed > TIGHT * free else None


def _remedy(plan: RamPlan, processes: int) -> str:
    largest = max(plan.stages, key=lambda stage: stage[1])[0]
    if processes > 1:
        return f"take fewer than {processes} GPUs, or close other programs"
    if largest == "load":
        return "close other programs, or give it the model in the dtype that it computes with: that is not copied"
    return "close other programs, or take a smaller model"
