"""Fitting a model into a GPU: which of its means to take, in one sentence.

Everything here is arithmetic on estimates (activations counted on the meta device, see
`emotrain plan`); no GPU was at hand to measure what the means save.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

from emotrain.errors import ConfigError

GIB = 1024**3
CONTEXT_GIB = 0.6  # what CUDA and its libraries take: 0.4 to 0.8
TRAINED_GIB = 0.5  # LoRA weights, gradients and optimizer state
VAE_GIB = 0.2  # the decoder in float32, which stays for samples
SPARE = 1.08  # workspace and fragments on top of activations
SIZES_GIB = {"24gb": 24.0, "16gb": 16.0, "12gb": 12.0, "8gb": 8.0}
USABLE = 0.95  # of a GPU of that size, beside a desktop
BYTES_PER_PARAMETER = {"int8": 1.03, "nf4": 0.56, "fp8": 1.02}  # with their scales
BACKENDS = {"int8": "bitsandbytes", "nf4": "bitsandbytes"}  # fp8 needs none


@dataclass(frozen=True)
class MemoryPlan:
    """What is done to fit, and what is then expected to be needed.

    `offload` keeps frozen layers in the computer's memory and moves each to the GPU for its turn.
    """

    quantize: str
    gradient_checkpointing: bool
    offload: bool
    needed_gib: float
    budget_gib: float | None
    sentence: str

    @property
    def fits(self) -> bool:
        """Whether it is expected to fit (always true where nothing is known of the budget)."""
        return self.budget_gib is None or self.needed_gib <= self.budget_gib


def weights_gib(num_parameters: int, bytes_per_parameter: float, quantize: str = "none") -> float:
    """Size of the frozen base."""
    return num_parameters * BYTES_PER_PARAMETER.get(quantize, bytes_per_parameter) / GIB


def installed_backends() -> frozenset[str]:
    """The kinds of quantisation whose library is installed."""
    found = set()
    for kind, module in BACKENDS.items():
        try:
            if importlib.util.find_spec(module) is not None:
                found.add(kind)
        except ModuleNotFoundError:
            continue
    return frozenset(found)


def require_backend(quantize: str) -> None:
    """Refuse a quantisation whose library is not installed.

    Raises:
        ConfigError: it is not.
    """
    if quantize in BACKENDS and quantize not in installed_backends():
        raise ConfigError(
            f"model.quantize is `{quantize}`, which needs `{BACKENDS[quantize]}`",
            "install it with `pip install 'emotrain[quantize]'`, or take fp8, which needs nothing",
        )


def choose_memory(
    *,
    num_parameters: int,
    bytes_per_parameter: float,
    activations_gib: tuple[float, float],
    trained_gib: float = TRAINED_GIB,
    free_gib: float | None = None,
    memory: str = "auto",
    quantize: str = "none",
    gradient_checkpointing: bool | str = "auto",
    backends: frozenset[str] = frozenset(),
) -> MemoryPlan:
    """The first of these that fits: nothing, gradient checkpointing, int8, nf4, offload.

    Quantising and offloading come in only where gradient checkpointing alone does not do; a
    quantisation that is set is kept. Pure.

    Args:
        num_parameters: of the denoiser.
        bytes_per_parameter: of its dtype.
        activations_gib: saved activations without and with gradient checkpointing.
        trained_gib: LoRA weights, gradients and optimizer state, and trained text encoders.
        free_gib: free memory of the GPU; None where there is none, or it is not known.
        memory: auto (what is free), or a size; a size that is larger than what is free is cut.
        quantize: as the preset says.
        gradient_checkpointing: auto, or as the preset says.
        backends: kinds of quantisation that can be had, see `installed_backends`.
    """
    budget = budget_of(memory, free_gib)
    steps = [False, True] if gradient_checkpointing == "auto" else [bool(gradient_checkpointing)]
    options = [(quantize, step, False) for step in steps]
    kinds = [k for k in ("int8", "nf4") if k in backends] if quantize == "none" else []
    options += [(kind, steps[-1], False) for kind in kinds]
    options += [(kind, steps[-1], True) for kind in ([quantize] if quantize == "none" else [])]
    plans = []
    for kind, checkpointing, offload in options:
        base = weights_gib(num_parameters, bytes_per_parameter, kind) * (0.1 if offload else 1.0)
        activations = activations_gib[1 if checkpointing else 0] * SPARE
        needed = CONTEXT_GIB + VAE_GIB + base + trained_gib + activations
        plans.append(MemoryPlan(kind, checkpointing, offload, needed, budget, ""))
    if budget is None:
        return replace(plans[0], sentence=_sentence(plans[0]))
    chosen = next((plan for plan in plans if plan.fits), min(plans, key=lambda p: p.needed_gib))
    return replace(chosen, sentence=_sentence(chosen))


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
    how = ", ".join(means) if means else "nothing needs saving"
    if plan.budget_gib is None:
        return f"memory: {how}"
    verdict = "of" if plan.fits else "which is more than the"
    return f"memory: {how}; about {plan.needed_gib:.1f} GiB {verdict} {plan.budget_gib:.1f} GiB"
