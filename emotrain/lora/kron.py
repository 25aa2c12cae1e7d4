"""A LoKr's update of one layer: the Kronecker product of two small matrices (LyCORIS, arXiv:2309.14859).

Delta W = w1 (x) w2, w1 [a, c], w2 [b, d, ...kernel]: a * b outputs, c * d inputs. Files may hold w1 or w2 as a product
of two thinner matrices, w2 of a convolution with a core between them (Tucker), and then an alpha; here both are whole
and the strength is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emotrain.errors import ModelError
from emotrain.lora import names

WIDEST = 2**17  # inputs or outputs of a layer
LARGE = 1536  # side of a matrix of which not all singular values are worth their time


@dataclass(frozen=True)
class Kron:
    """w1 [a, c] (x) w2 [b, d] or [b, d, kh, kw]."""

    w1: Tensor
    w2: Tensor
    alpha = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the layer, and a convolution's kernel."""
        return (self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1], *self.w2.shape[2:])

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float(self.w1.double().norm() * self.w2.double().norm())

    def named(self, path: str) -> dict[str, Tensor]:
        """The factors under the names of a module."""
        return {path + names.W1: self.w1, path + names.W2: self.w2}

    def dense(self) -> Tensor:
        """The update as one matrix [out, in] or kernel [out, in, kh, kw]."""
        whole: Tensor = torch.kron(self.w1.contiguous(), self.w2.flatten(1).contiguous())
        return whole.reshape(self.shape)

    def distance(self, other: Kron) -> float:
        """Frobenius norm of the difference; infinite where the factors have other shapes.

        With <A (x) B, C (x) D> = <A, C> <B, D> no large matrix is made.
        """
        if self.w1.shape != other.w1.shape or self.w2.shape != other.w2.shape:
            return math.inf
        first, second = self.w1.double() - other.w1.double(), self.w2.double() - other.w2.double()
        # A (x) B - C (x) D = (A - C) (x) B + C (x) (B - D)
        squares = (first.norm() * self.w2.double().norm()) ** 2 + (other.w1.double().norm() * second.norm()) ** 2
        mixed = (first * other.w1.double()).sum() * (self.w2.double() * second).sum()
        return math.sqrt(max(float(squares + 2 * mixed), 0.0))

    def nearest(self, rank: int) -> tuple[Tensor, Tensor]:
        """The nearest LoRA of a rank (or of the whole one, where that is less): A [rank, in, ...], B [out, rank, ...].

        The singular values of a Kronecker product are the products of its factors' (Van Loan 2000), and so are the
        vectors: two small SVDs say the largest of them.
        """
        u1, s1, v1 = torch.linalg.svd(self.w1.double(), full_matrices=False)
        u2, s2, v2 = _largest(self.w2.double().flatten(1), rank)
        values = (s1[:, None] * s2[None, :]).flatten()
        order = torch.argsort(values, descending=True, stable=True)
        kept = order[:rank]
        first, second = kept // len(s2), kept % len(s2)
        root = values[kept].sqrt()
        up = torch.einsum("ar,br->abr", u1[:, first], u2[:, second]).reshape(-1, len(kept)) * root
        down = torch.einsum("rc,rd->rcd", v1[first], v2[second]).reshape(len(kept), -1) * root[:, None]
        kernel = self.w2.shape[2:]
        down = down.reshape(len(kept), self.shape[1], *kernel)
        up = up.reshape(self.shape[0], len(kept), *(1 for _ in kernel))
        return down.to(self.w2.dtype), up.to(self.w2.dtype)

    def rows(self, counts: Sequence[int]) -> list[Kron] | None:
        """The update cut into so many output rows each; None where a cut would go through a block of w2."""
        block = self.w2.shape[0]
        if sum(counts) != self.shape[0] or any(count % block for count in counts):
            return None
        return [Kron(part.contiguous(), self.w2) for part in torch.split(self.w1, [count // block for count in counts])]

    def halves_swapped(self) -> Kron | None:
        """The first half of the output rows after the second; None where that is no LoKr."""
        halves = self.rows([self.shape[0] // 2] * 2)
        return None if halves is None else Kron(torch.cat([halves[1].w1, halves[0].w1]), self.w2)


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of a matrix; of a large one about the `rank` largest alone (Halko et al. 2011, arXiv:0909.4061)."""
    if min(matrix.shape) < max(LARGE, 4 * rank):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, v
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=rank + 8, niter=4)
    return u, s, v.T


def sizes(features: int, factor: int) -> tuple[int, int]:
    """(small, large) whose product is `features`; small is the largest divisor up to `factor` and the square root.

    >>> sizes(1280, 8), sizes(36, 8), sizes(7, 8)
    ((8, 160), (6, 6), (1, 7))
    """
    small = max(n for n in range(1, min(factor, math.isqrt(features)) + 1) if features % n == 0)
    return small, features // small


def krons(state: Mapping[str, Tensor]) -> dict[str, Kron]:
    """Module path -> its LoKr; LoRA keys are passed over.

    Raises:
        ModelError: a factor without the other, or one that is no matrix.
    """
    found = {}
    for path in names.module_names(key for key in state if key.endswith((names.W1, names.W2))):
        w1, w2 = state.get(path + names.W1), state.get(path + names.W2)
        if w1 is None or w2 is None:
            raise ModelError(f"`{path}` has only one factor of its LoKr: {'w1' if w2 is None else 'w2'} is there alone")
        if w1.ndim != 2 or w2.ndim not in (2, 4) or 0 in (*w1.shape, *w2.shape):
            raise ModelError(f"the factors of `{path}` are {tuple(w1.shape)} and {tuple(w2.shape)}, which is no LoKr")
        found[path] = kron = Kron(w1, w2)
        if max(kron.shape) > WIDEST:
            raise ModelError(f"the LoKr `{path}` is for a layer of {kron.shape[0]} x {kron.shape[1]}, which none is")
    return found


def from_file(stem: str, found: Mapping[str, Tensor], alpha: float | None) -> Kron:
    """The LoKr of a file's tensors: w1, w2, their factors w1_a, w1_b, w2_a, w2_b and a Tucker core t2.

    alpha / rank is a strength where a factor is itself a product; of two whole ones it is 1, whatever alpha says.

    Raises:
        ModelError: tensors that are missing or do not fit.
    """
    try:
        w1, first = _whole(found, "w1")
        w2, second = _whole(found, "w2")
    except (RuntimeError, IndexError) as error:
        raise ModelError(f"the factors of the LoKr `{stem}` do not fit together") from error
    if w1 is None or w2 is None:
        raise ModelError(f"`{stem}` has only one factor of its LoKr: {'w1' if w2 is None else 'w2'} is there alone")
    rank = second or first
    if rank is not None and alpha is not None:
        if not 0.0 < alpha < math.inf:
            raise ModelError(f"alpha of `{stem}` is {alpha}")
        w2 = w2 * (alpha / rank)
    return krons({stem + names.W1: w1, stem + names.W2: w2})[stem]


def as_lora(found: Mapping[str, Tensor], alpha: float | None) -> tuple[Tensor, Tensor] | None:
    """The LoRA that a LoKr is exactly, where w2 is a product: A and B, of strength 1; None where it is none.

    w1 (x) (a b) = (1 (x) a) (w1 (x) b) = (w1 (x) a) (1 (x) b): of the two that of the smaller rank.

    Args:
        found: a file's tensors, as for `from_file`.
        alpha: the file's.
    """
    left, right = found.get("w2_a"), found.get("w2_b")
    if left is None or right is None or right.ndim != 2 or "t2" in found:
        return None
    w1, _ = _whole(found, "w1")
    if w1 is None:
        return None
    w1 = w1 if alpha is None else w1 * (alpha / len(right))
    if w1.shape[0] <= w1.shape[1]:
        return torch.kron(w1, right), torch.kron(torch.eye(w1.shape[0]), left)
    return torch.kron(torch.eye(w1.shape[1]), right), torch.kron(w1, left)


def _whole(found: Mapping[str, Tensor], name: str) -> tuple[Tensor | None, int | None]:
    """A factor, multiplied out, and the rank of its product; (None, None) where it is not there."""
    if name in found:
        return found[name], None
    left, right, core = found.get(f"{name}_a"), found.get(f"{name}_b"), found.get(name.replace("w", "t"))
    if left is None or right is None:
        return None, None
    if core is not None:  # [r, r, kh, kw]; left [r, outputs], right [r, inputs]
        return torch.einsum("ijkl,ip,jr->prkl", core, left, right), int(right.shape[0])
    return (left @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:]), int(right.shape[0])
