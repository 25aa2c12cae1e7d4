"""Several LoRAs as one: exact by concatenation, or brought to a rank by SVD with its error said.

sum_k w_k s_k B_k A_k = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...], s = alpha / rank.

A LoKr has nearly the rank of its layer: it enters as its nearest LoRA, and the error counts what that leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emotrain.errors import ConfigError, ModelError
from emotrain.lora import names
from emotrain.lora.formats import pairs
from emotrain.lora.kron import Kron, krons
from emotrain.lora.origin import common_family

if TYPE_CHECKING:
    from emotrain.lora.file import LoraFile


CANDIDATES = 4  # of a LoKr's nearest LoRA so many times the rank that is asked for enter a sum

Pair = tuple[Tensor, Tensor]  # A, B
Rest = tuple[Kron, Tensor, Tensor]  # a LoKr, and A and B of the LoRA that enters in its place


@dataclass(frozen=True)
class Merged:
    """One LoRA out of several."""

    state: dict[str, Tensor]  # canonical names, float32
    alphas: dict[str, float]  # canonical module path -> alpha (its rank: strength 1)
    family: str  # of all of them
    error: float = 0.0  # ||merged - exact|| / ||exact|| over all modules; 0 without SVD
    worst: tuple[str, float] = ("", 0.0)  # the module with the largest error of its own, and that error

    @property
    def ranks(self) -> dict[str, int]:
        return {path: int(alpha) for path, alpha in self.alphas.items()}


def merge(loras: Sequence[tuple[LoraFile, float]], *, rank: int | None = None) -> Merged:
    """The weighted sum of LoRAs as one LoRA.

    Args:
        loras: (file, weight) each; weights may be negative, and a file may come twice.
        rank: bring each module down to this rank (Eckart and Young: the nearest of that rank).

    Raises:
        ConfigError: no LoRA, a weight that is not finite, a rank below 1, or a LoKr and no rank.
        ModelError: LoRAs for different families, or one module with different shapes.
    """
    if not loras:
        raise ConfigError("there is no LoRA to merge")
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank is {rank}, it must be at least 1")
    first, family = loras[0][0], loras[0][0].family
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    rests: dict[str, list[Rest]] = {}
    convolutions = set(names.module_names(k for lora, _ in loras for k, value in lora.state.items() if value.ndim == 4))
    for lora, weight in loras:
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of {lora.path} is {weight}")
        together = common_family(family, lora.family)
        if together is None:
            raise ModelError(f"{first.path} is a LoRA for {first.family}, {lora.path} is one for {lora.family}")
        family = together
        products = krons(lora.state)
        if products and rank is None:
            raise ConfigError(
                f"{lora.path} is a LoKr, and no LoRA is exactly the same",
                "give a rank for the nearest one: `--rank 32`; its error is said",
            )
        own = {path: (pair.down, pair.up * pair.strength) for path, pair in pairs(lora.state, lora.alphas).items()}
        for path, kron in products.items():
            own[path] = down, up = kron.nearest(CANDIDATES * (rank or 1))
            rests.setdefault(path, []).append((Kron(kron.w1 * weight, kron.w2), down, up * weight))
        for path, (down, up) in own.items():
            down, up = names.as_layer(down, up, is_conv=path in convolutions)
            known = downs.get(path)
            if known and (known[0].shape[1:], ups[path][0].shape[0]) != (down.shape[1:], up.shape[0]):
                raise ModelError(f"{lora.path}: `{path}` has another shape than in {first.path}")
            downs.setdefault(path, []).append(down)
            ups.setdefault(path, []).append(up * weight)
    exact = {path: (torch.cat(downs[path]), torch.cat(ups[path], dim=1)) for path in downs}
    return _as_merged(exact, family) if rank is None else _reduced(exact, family, rank, rests)


def resize(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The nearest pair of a smaller rank (Eckart and Young 1936), by SVD of the thin factors.

    Args:
        down: A [rank, in, ...].
        up: B [out, rank, ...].
        rank: of the result; a pair that has no more is returned as it is.

    Returns:
        A, B, ||B A||, and the norm of what was cut off.
    """
    flat_down, flat_up = down.to(torch.float64).flatten(1), up.to(torch.float64).flatten(1)
    q_up, r_up = torch.linalg.qr(flat_up)
    q_down, r_down = torch.linalg.qr(flat_down.T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    size = float(torch.linalg.vector_norm(s))
    if down.shape[0] <= rank:
        return down, up, size, 0.0
    root = s[:rank].sqrt()
    small_up = (q_up @ u[:, :rank]) * root
    small_down = root[:, None] * (v[:rank] @ q_down.T)
    return (
        small_down.to(down.dtype).reshape(-1, *down.shape[1:]),
        small_up.to(up.dtype).reshape(up.shape[0], -1, *up.shape[2:]),
        size,
        float(torch.linalg.vector_norm(s[rank:])),
    )


def _reduced(
    exact: dict[str, tuple[Tensor, Tensor]], family: str, rank: int, rests: Mapping[str, Sequence[Rest]]
) -> Merged:
    whole, lost = 0.0, 0.0
    worst = ("", 0.0)
    reduced = {}
    for path, (down, up) in exact.items():
        small_down, small_up, size, error = resize(down, up, rank)
        if path in rests:
            size, error = _with_rests((down, up), (small_down, small_up), rests[path])
        reduced[path] = (small_down, small_up)
        whole, lost = whole + size**2, lost + error**2
        if size > 0.0 and error / size > worst[1]:
            worst = (path, error / size)
    error = math.sqrt(lost / whole) if whole else 0.0
    return _as_merged(reduced, family, error, worst)


def _with_rests(exact: Pair, reduced: Pair, rests: Sequence[Rest]) -> tuple[float, float]:
    """||X|| and ||X - B A||, X being the whole update with all that the LoKrs' nearest LoRAs leave out."""
    whole = _product(exact)
    for kron, down, up in rests:
        whole += kron.dense().flatten(1) - _product((down, up))
    return float(whole.norm()), float((whole - _product(reduced)).norm())


def _product(pair: Pair) -> Tensor:
    down, up = pair
    return up.flatten(1) @ down.flatten(1)


def _as_merged(
    modules: dict[str, tuple[Tensor, Tensor]],
    family: str,
    error: float = 0.0,
    worst: tuple[str, float] = ("", 0.0),
) -> Merged:
    state: dict[str, Tensor] = {}
    for path, (down, up) in modules.items():
        state[path + names.DOWN], state[path + names.UP] = down, up
    alphas = {path: float(down.shape[0]) for path, (down, _) in modules.items()}
    return Merged(state, alphas, family, error, worst)
