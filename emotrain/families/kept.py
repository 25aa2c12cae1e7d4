"""The base of one run of a queue, kept in the computer's memory for the next run that has the same (no torch)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from emotrain.families.ram import ram

# The keys of a preset's `model` that decide what is read.
WORDS = ("base", "family", "vae", "text_encoder", "tokenizer", "revision", "dtype", "prediction")
SPARE = 2 << 30  # bytes that stay free beside what is kept

Pieces = dict[str, Any]


class KeptBase:
    """Holds what was loaded for one model; each run gets modules of its own around the same weights.

    A run moves, quantises and extends its modules: that puts other tensors into them, and leaves those here alone.

    Args:
        processes: of this machine that keep one each.

    Attributes:
        next: the model of the run after this one, its values of `WORDS`; only that one is kept.
        reused: whether the last `load` had nothing to read.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self.next: tuple[Any, ...] = ()
        self.reused = False
        self._held: tuple[tuple[Any, ...], Hashable, Pieces] | None = None

    def load(self, model: tuple[Any, ...], paths: list[str], read: Callable[[], Pieces]) -> Pieces:
        """The pieces of a model: those that are held if its files are as they were, else what `read` gives.

        Args:
            model: its values of `WORDS`.
            paths: its files and folders.
            read: modules and what belongs to them, on the CPU.
        """
        stamp = tuple(map(stamp_of, paths))
        self.reused = self._held is not None and self._held[:2] == (model, stamp)
        held, self._held = self._held if self.reused else None, None  # what is not used goes before another is read
        pieces = read() if held is None else held[2]
        if model != self.next or not _room_for(pieces, self.processes):
            return pieces
        self._held = model, stamp, pieces
        return {part: _around_the_same_weights(piece) for part, piece in pieces.items()}

    @property
    def nbytes(self) -> int:
        """Of the weights that are held."""
        return 0 if self._held is None else _nbytes(self._held[2])

    def drop(self) -> None:
        """Let go of what is held: the next run reads its files."""
        self._held = None


def _around_the_same_weights(piece: Any) -> Any:
    from torch import nn

    if not isinstance(piece, nn.Module):
        return piece
    same: dict[int, Any] = {id(value): nn.Parameter(value.data, requires_grad=False) for value in piece.parameters()}
    same |= {id(value): value.data for value in piece.buffers()}
    return copy.deepcopy(piece, same)


def _room_for(pieces: Pieces, processes: int) -> bool:
    """Whether what a run makes of it, on a GPU or quantised, leaves the computer's memory room for it, in each process.

    All of them see the same free memory before any has taken its part.
    """
    return ram().free > processes * _nbytes(pieces) + SPARE


def _nbytes(pieces: Pieces) -> int:
    from torch import nn

    models = [piece for piece in pieces.values() if isinstance(piece, nn.Module)]
    return sum(value.nbytes for model in models for value in model.parameters())


def stamp_of(path: str) -> Hashable:
    """What changes when the files of a path do; nothing of a hub's id, which its revision tells apart."""
    files = [Path(path), *(Path(path).rglob("*") if Path(path).is_dir() else ())]
    stats = [file.stat() for file in files if file.exists()]
    return tuple(sorted((one.st_ino, one.st_size, one.st_mtime_ns) for one in stats))
