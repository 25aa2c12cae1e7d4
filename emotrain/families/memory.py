"""Fitting a run into a GPU: what each of its stages takes, and which means of saving to choose, in one sentence.

Everything here is arithmetic on what was counted on the meta device (`runs.activation_memory`); `emotrain plan` shows
it and `emotrain run` loads the model by it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from emotrain.errors import ConfigError

GIB = 1024**3
CONTEXT_GIB = 0.6  # what CUDA and its libraries take: 0.4 to 0.8
MOST_AT_ONCE = 8  # pictures that a VAE encodes together
TILE = 512  # pixels: the side of the pieces that a VAE works in where there is no room for the whole
AWAY = 3  # blocks on the device at a time where the others wait in the computer's memory
UNSURE = 1.1  # times what is expected: what offloaded blocks leave free, since the estimate may be off by as much
SPARE = 1.08  # workspace and fragments on top of activations
SIZES_GIB = {"24gb": 24.0, "16gb": 16.0, "12gb": 12.0, "8gb": 8.0}
USABLE = 0.95  # of a GPU of that size, beside a desktop
BYTES_PER_PARAMETER = {"int8": 1.03, "nf4": 0.56, "fp8": 1.02}  # with their scales
BACKENDS = {"nf4": "bitsandbytes"}  # int8 and fp8 need none
COSTLY = {"nf4": 1, "cpu": 2}  # forms of a text encoder that tiles of the VAE are better than
ON_CPU = "cpu"  # the form of a text encoder that stays whole and works on the CPU


@dataclass(frozen=True)
class VaeNeeds:
    """A VAE in float32: GiB of its decoder, which stays for samples, and of its encoder, which goes before training.

    Of its first width at full size, `encode_maps` and `decode_maps` are what its passes hold at once, counted on the
    meta device.
    """

    decoder: float
    encoder: float
    encode_maps: float
    decode_maps: float


VAES = {  # by diffusers' class, as the public models have them
    "AutoencoderKL": VaeNeeds(0.19, 0.13, 5.0, 6.0),
    "AutoencoderKLFlux2": VaeNeeds(0.19, 0.13, 5.0, 6.0),
    "AutoencoderKLQwenImage": VaeNeeds(0.28, 0.20, 6.1, 7.1),
    "AutoencoderKLQwenImage21": VaeNeeds(0.97, 0.30, 7.1, 16.6),
}


@dataclass(frozen=True)
class EncoderNeeds:
    """A text encoder: name, parameters, how many are in layers that may be quantised, how many in 8 bits.

    `wide` of them are float32 where they are in no fewer bits: a T5's, beside float16.
    """

    name: str
    parameters: int
    linear: int = 0
    stored: int = 0
    wide: int = 0

    def gib(self, form: str, bytes_per_parameter: float) -> float:
        """Size in a form: none, int8, nf4, fp8, or cpu, which takes nothing of the GPU."""
        if form == ON_CPU:
            return 0.0
        if form == "none":
            wide = self.wide * (1 - self.stored / self.linear) if self.linear else 0.0
            beside = wide * (4 - bytes_per_parameter) / GIB
            return weights_gib(self.parameters, bytes_per_parameter, stored=self.stored) + beside
        whole = weights_gib(self.parameters - self.linear, bytes_per_parameter)
        return whole + weights_gib(self.linear, bytes_per_parameter, form)


@dataclass(frozen=True)
class Needs:
    """What a run asks of a GPU, in GiB but for the first two and other numbers of parameters."""

    num_parameters: int  # of the denoiser
    bytes_per_parameter: float  # of its dtype
    activations: tuple[float, float]  # kept for the backward pass, without and with gradient checkpointing
    trained: float  # LoRA weights, gradients, optimizer state, and trained text encoders
    encoders: tuple[EncoderNeeds, ...] = ()  # the text encoders that go when all captions are encoded
    vae: float = VAES["AutoencoderKL"].decoder  # stays; `vae_encoder` goes when all pictures are encoded
    vae_encoder: float = VAES["AutoencoderKL"].encoder
    encode: tuple[float, float] = (0.0, 0.0)  # a pass of the VAE's encoder over the largest picture, whole and in tiles
    # a pass of its decoder over a sample, whole and in tiles; 0 where none are drawn
    decode: tuple[float, float] = (0.0, 0.0)
    validate: float = 0.0  # the denoiser's pass without gradients in a validation
    sample: float = 0.0  # the same while a sample is drawn
    saved: float = 0.0  # copies of the optimizer's state that a checkpoint makes
    tables: float = 0.0  # of the denoiser, besides its parameters
    resident: float = 0.0  # what stays of the denoiser where its other blocks wait in the computer's memory
    stored: int = 0  # of the denoiser's parameters, those that stay the 8-bit numbers of its file
    linear: int | None = None  # of them, those that a quantisation stores in fewer bits; None: all
    other_parameters: int = 0  # of the denoiser that samples are drawn on, where that is another one (`sample.base`)
    other_stored: int = 0  # of these, as `stored`
    other_linear: int | None = None  # of these, as `linear`
    other_trained: float = 0.0  # the copy of the LoRA on it


@dataclass(frozen=True)
class MemoryPlan:
    """What is done to fit, and what is then expected to be needed."""

    quantize: str  # of the base
    gradient_checkpointing: bool  # activations are computed again in the backward pass
    offload: bool  # frozen blocks wait in the computer's memory and move to the GPU for their turn
    needed_gib: float  # the largest of `stages`
    budget_gib: float | None  # what there is, None where that is not known
    sentence: str  # all of it for people
    stages: tuple[tuple[str, float], ...] = ()  # encode, train, validate, sample and save, each with its peak
    tile_encode: bool = False  # the VAE encodes in tiles, and `tile_decode`: it decodes in tiles
    tile_decode: bool = False
    # form of each text encoder while the data set is encoded, see `place_encoders`
    encoders: tuple[tuple[str, str], ...] = ()
    pictures_at_once: int = 1  # how many of the largest pictures the VAE encodes together
    # the base that is trained waits in the computer's memory while `sample.base` draws, and it in between
    in_turn: bool = False

    @property
    def encoder_forms(self) -> dict[str, str]:
        """The text encoders that are quantised, and how."""
        return {name: form for name, form in self.encoders if form not in ("none", ON_CPU)}

    def means(self) -> dict[str, Any]:
        """What saves memory, as plain values; `text_encoders` are those that are not whole on the GPU."""
        return {
            "vae_tiles": self.tile_encode or self.tile_decode,
            "sample_base_in_turn": self.in_turn,
            "quantize": self.quantize,
            "text_encoders": {name: form for name, form in self.encoders if form != "none"},
            "gradient_checkpointing": self.gradient_checkpointing,
            "offload": self.offload,
        }

    @property
    def spare_gib(self) -> float:
        """Room for offloaded blocks that stay: while the encoders work they are away. 0 where no budget is known."""
        largest = max((gib for name, gib in self.stages if name != "encode"), default=0.0)
        return max(0.0, self.budget_gib - UNSURE * largest) if self.budget_gib is not None else 0.0

    @property
    def fits(self) -> bool:
        """Whether it is expected to fit (always true where nothing is known of the budget)."""
        return self.budget_gib is None or self.needed_gib <= self.budget_gib


def weights_gib(
    num_parameters: int, bytes_per_parameter: float, quantize: str = "none", stored: int = 0, linear: int | None = None
) -> float:
    """Size of the frozen base.

    Of its parameters `stored` are 8-bit numbers in its file and stay so; a quantisation is of `linear` of them, or all.
    """
    if quantize in BYTES_PER_PARAMETER:
        fewer = num_parameters if linear is None else linear
        return ((num_parameters - fewer) * bytes_per_parameter + fewer * BYTES_PER_PARAMETER[quantize]) / GIB
    return ((num_parameters - stored) * bytes_per_parameter + stored) / GIB


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def installed_backends() -> frozenset[str]:
    """The kinds of quantisation whose library is installed, and works on this machine's GPU."""
    return frozenset(kind for kind in BACKENDS if unusable(kind) is None)


def unusable(kind: str) -> tuple[str, str] | None:
    """Why a quantisation's library cannot be used, and what to do; None where it can, or none is needed."""
    module = BACKENDS.get(kind)
    if module is None:
        return None
    if not is_installed(module):
        return (
            f"needs `{module}`",
            "install it with `pip install 'emotrain[quantize]'`, or take int8, which needs nothing",
        )
    if not _knows_the_gpu(module):
        why = f"needs `{module}`, which is installed without what this GPU needs, or for another version of CUDA"
        return why, f"`python -m {module}` says why; `pip install -U {module}`, or take int8, which needs nothing"
    return None


def _knows_the_gpu(module: str) -> bool:
    """Whether bitsandbytes has found its library for the GPU; true where there is none. It logs why it has not."""
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        library = importlib.import_module(f"{module}.cextension").lib
    except (ImportError, OSError, AttributeError, RuntimeError):
        return False
    return bool(getattr(library, "compiled_with_cuda", False))


def require_backend(quantize: str, key: str = "model.quantize") -> None:
    """Refuse a quantisation, asked for by `key`, whose library is not installed or does not work.

    Raises:
        ConfigError: with what to do.
    """
    if (lacking := unusable(quantize)) is not None:
        raise ConfigError(f"{key} is `{quantize}`, which {lacking[0]}", lacking[1])


def choose_memory(
    needs: Needs,
    *,
    free_gib: float | None = None,
    memory: str = "auto",
    quantize: str = "none",
    quantize_text_encoders: str = "auto",
    gradient_checkpointing: bool | str = "auto",
    backends: frozenset[str] = frozenset(),
) -> MemoryPlan:
    """The first of these that fits: nothing, gradient checkpointing, int8 (unless the file has 8 bits), nf4, offload.

    Quantising and offloading come in only where gradient checkpointing alone does not do; a
    quantisation that is set is kept. Without gradient checkpointing nothing is offloaded: the backward pass would hold
    the copies of all blocks. The VAE works in tiles where the whole does not fit, and large text encoders in
    fewer bits (`place_encoders`). Pure.

    Args:
        needs: of the run.
        free_gib: free memory of the GPU; None where there is none, or it is not known.
        memory: auto (what is free), or a size; a size that is larger than what is free is cut.
        quantize: of the base, as the preset says.
        quantize_text_encoders: the same of the text encoders.
        gradient_checkpointing: auto, or as the preset says.
        backends: kinds of quantisation whose library is there, see `installed_backends`.
    """
    budget = budget_of(memory, free_gib)
    steps = [False, True] if gradient_checkpointing == "auto" else [bool(gradient_checkpointing)]
    options = [(quantize, step, False) for step in steps]
    kinds = available(backends) if quantize == "none" else ()
    if needs.stored:  # in 8 bits already
        kinds = tuple(kind for kind in kinds if kind != "int8")
    options += [(kind, steps[-1], False) for kind in kinds]
    options += [(quantize, True, True)] if quantize == "none" and steps[-1] else []
    place = partial(place_encoders, needs, wanted=quantize_text_encoders, backends=backends)
    turns = needs.other_parameters > 0
    plans = [_plan(needs, *option, budget, place, in_turn=turns) for option in options]
    chosen = next((plan for plan in plans if plan.fits), min(plans, key=lambda p: p.needed_gib))
    if turns:  # both stay where that changes nothing else
        kept = _plan(needs, *options[plans.index(chosen)], budget, place)
        chosen = kept if kept.fits else chosen
    return replace(chosen, sentence=_sentence(chosen))


def _plan(
    needs: Needs,
    kind: str,
    checkpointing: bool,
    offload: bool,
    budget: float | None,
    place: Callable[[float | None], dict[str, str]],
    *,
    in_turn: bool = False,
) -> MemoryPlan:
    """The stages' peaks with these means."""

    def weights(parameters: int, stored: int, linear: int | None) -> float:
        whole = weights_gib(parameters, needs.bytes_per_parameter, kind, stored, linear)
        return min(needs.resident, whole) if offload else whole

    base = weights(needs.num_parameters, needs.stored, needs.linear)
    other = weights(needs.other_parameters, needs.other_stored, needs.other_linear)
    rest = CONTEXT_GIB + needs.vae + needs.tables + needs.trained + needs.other_trained
    held = rest + base + (0.0 if in_turn else other)
    drawing = rest + other if in_turn else held
    tile_encode, forms, encoding = _encode_stage(needs, budget, place)
    too_large = budget is not None and drawing + needs.decode[0] * SPARE > budget
    tile_decode = too_large and needs.decode[1] < needs.decode[0]
    stages = {
        "encode": encoding,
        "train": held + needs.activations[checkpointing] * SPARE,
        "validate": held + needs.validate * SPARE,
        "sample": drawing + max(needs.sample, needs.decode[tile_decode]) * SPARE,
        "save": held + needs.saved,
    }
    at_once = 1
    if budget is not None and not tile_encode and needs.encode[0]:  # as many as take no more than training does
        room = min(max(stages.values()), budget) - encoding
        at_once = max(1, min(MOST_AT_ONCE, 1 + int(room / needs.encode[0])))
        stages["encode"] += (at_once - 1) * needs.encode[0]
    return MemoryPlan(
        kind, checkpointing, offload, max(stages.values()), budget, "", tuple(stages.items()), tile_encode, tile_decode,
        tuple(forms.items()), at_once, in_turn,
    )  # fmt: skip


def _encode_stage(
    needs: Needs, budget: float | None, place: Callable[[float | None], dict[str, str]]
) -> tuple[bool, dict[str, str], float]:
    """Whether the VAE works in tiles (rather that than an encoder in nf4 or on the CPU), their forms, and the peak."""
    held = CONTEXT_GIB + needs.vae + needs.vae_encoder
    found = []
    for tiles in (False, True) if needs.encode[1] < needs.encode[0] else (False,):
        forms = place(None if budget is None else max(budget - held - needs.encode[tiles], 0.0))
        sizes = (encoder.gib(forms[encoder.name], needs.bytes_per_parameter) for encoder in needs.encoders)
        found.append((tiles, forms, held + needs.encode[tiles] + sum(sizes)))
    fitting = [one for one in found if budget is None or one[2] <= budget] or found[-1:]
    return min(fitting, key=lambda one: (max((COSTLY.get(form, 0) for form in one[1].values()), default=0), one[0]))


def available(backends: frozenset[str]) -> tuple[str, ...]:
    """The kinds of quantisation that are chosen where they are needed, the one that changes least first."""
    return tuple(kind for kind in ("int8", "nf4") if kind not in BACKENDS or kind in backends)


def place_encoders(
    needs: Needs, room: float | None, *, wanted: str = "auto", backends: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Form of each text encoder: none (whole), int8, nf4 or fp8, or cpu where no form fits; the small ones first.

    Args:
        needs: of the run.
        room: GiB for all of them; None: as much as they take.
        wanted: of those that may be quantised: auto (the first that fits), or the one form that the preset sets.
        backends: see `choose_memory`.
    """
    forms: dict[str, str] = {}
    for encoder in sorted(needs.encoders, key=lambda one: one.parameters):
        kinds: tuple[str, ...] = ("none",)
        if encoder.linear:
            kinds = ("none", *available(backends)) if wanted == "auto" else (wanted,)
        sizes = {kind: encoder.gib(kind, needs.bytes_per_parameter) for kind in kinds}
        form = next((kind for kind, gib in sizes.items() if room is None or gib <= room), ON_CPU)
        forms[encoder.name] = form
        room = None if room is None else room - sizes.get(form, 0.0)
    return forms


def budget_of(memory: str, free_gib: float | None) -> float | None:
    """GiB that may be used; None where nothing is known and nothing is said.

    Raises:
        ConfigError: an unknown word.
    """
    if memory == "auto":
        return free_gib
    if memory not in SIZES_GIB:
        raise ConfigError(f"model.memory `{memory}` is not known", f"auto, {', '.join(SIZES_GIB)}")
    size = SIZES_GIB[memory] * USABLE
    return size if free_gib is None else min(size, free_gib)


def _sentence(plan: MemoryPlan) -> str:
    means = []
    if plan.quantize != "none":
        means.append(f"the base in {plan.quantize}")
    if plan.gradient_checkpointing:
        means.append("gradient checkpointing")
    if plan.offload:
        means.append("frozen layers kept in the computer's memory")
    if plan.tile_encode or plan.tile_decode:
        means.append("the VAE in tiles")
    for form in dict.fromkeys(form for _, form in plan.encoders if form != "none"):
        means.append("captions encoded on the CPU" if form == ON_CPU else f"captions encoded in {form}")
    if plan.in_turn:
        means.append("the base for samples in turn with the trained one")
    how = ", ".join(means) if means else "nothing needs saving"
    if plan.budget_gib is None:
        return f"memory: {how}"
    verdict = "of" if plan.fits else "which is more than the"
    return f"memory: {how}; about {plan.needed_gib:.1f} GiB {verdict} {plan.budget_gib:.1f} GiB"
