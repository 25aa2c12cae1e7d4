"""Out of memory: brought to light before the first step, and told without holding on to the tensors that filled it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from emotrain.batch import Batch
from emotrain.errors import ConfigError, ResourceError
from emotrain.train import rng
from emotrain.train.losses import noise_like, sample_losses, timesteps_at, uniforms

if TYPE_CHECKING:
    from emotrain.diffusion import Objective
    from emotrain.families.common import LoadedFamily
    from emotrain.lora.adapter import Adapter

T = TypeVar("T")
GIB = 2**30
_SAID = re.compile(r"out of memory|allocate memory|alloc_failed", re.IGNORECASE)
_ASKED = re.compile(r"allocate ([\d.]+) ?(GiB|MiB|bytes)", re.IGNORECASE)
_NO_ORDER = re.compile(r"(\w+) does not have a deterministic implementation")
_UNITS = {"gib": 1.0, "mib": 1 / 1024, "bytes": 1 / GIB}


class OutOfMemory(ResourceError):
    """No memory for some work, of which nothing has been done (exit 6).

    Args:
        doing: the work, as in "out of memory at step 7".
        asked_gib: size of the refused allocation, where the library has said it.
        everywhere: all processes that train together raise it.
    """

    def __init__(
        self, doing: str, asked_gib: float | None = None, hint: str | None = None, *, everywhere: bool = False
    ) -> None:
        more = f": {asked_gib:.2f} GiB more were needed" if asked_gib else ""
        super().__init__(f"out of memory {doing}{more}", hint)
        self.doing = doing
        self.asked_gib = asked_gib
        self.everywhere = everywhere


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch, CUDA, cuBLAS or the CPU's allocator means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_SAID.search(str(error)))


def asked_gib(error: BaseException) -> float | None:
    """How much the allocation that failed was to give, if the error says so."""
    found = _ASKED.search(str(error))
    return float(found[1]) * _UNITS[found[2].lower()] if found else None


def with_memory(doing: str, work: Callable[[], T]) -> T:
    """What `work` returns; a lack of memory becomes one kind of error, raised after its tensors have been let go.

    Raises:
        OutOfMemory: `work` ran out of memory.
        ConfigError: `train.deterministic` is true, and an operation has no deterministic form.
    """
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if found := _NO_ORDER.search(str(error)):
            raise ConfigError(
                f"train.deterministic is true, and `{found[1]}` has no deterministic form on this device",
                "leave it at auto",
            ) from None
        if not is_out_of_memory(error):
            raise
        size = asked_gib(error)
    if torch.cuda.is_available():  # here the traceback is gone, and with it the activations
        torch.cuda.empty_cache()
    raise OutOfMemory(doing, size)


def describe(batch: Batch, vae_scale: int) -> str:
    """A batch's size in pixels, as in "4 pictures of 768x1024"."""
    count, _, height, width = batch.latents.shape
    return f"{count} picture{'s' * (count > 1)} of {width * vae_scale}x{height * vae_scale}"


def rehearse(
    family: LoadedFamily,
    objective: Objective,
    adapter: Adapter,
    batch: Batch,
    *,
    reserve: int = 0,
) -> None:
    """Forward and backward of one batch; the gradient is thrown away, weights and random states stay as they are.

    Args:
        family: with the adapter on it.
        objective: what the loss is.
        adapter: whose gradient is thrown away.
        batch: the largest one of the run.
        reserve: bytes that training will hold besides: gradients and the optimizer's state.

    Raises:
        OutOfMemory: the run would end like this at that batch.
    """
    states, document = rng.capture()
    timesteps = timesteps_at(family, objective, uniforms(0, 0, len(batch.ids)), batch.latents)
    noise = noise_like(batch.latents, 0, 0)

    def try_it() -> None:
        held = torch.empty(reserve, dtype=torch.uint8, device=family.device)
        sample_losses(family, objective, batch, noise, timesteps).mean().backward()  # type: ignore[no-untyped-call]
        del held

    try:
        with_memory(f"on the largest batch, {describe(batch, family.vae_scale)}", try_it)
    finally:
        adapter.drop_gradients()
        rng.restore(states, document)
