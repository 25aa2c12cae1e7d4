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
        copied: bytes of the model that were converted while they were read; others are pages of its files, which the
            system takes back when it needs them.
        beside: bytes that the run takes of the computer's memory besides.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self.next: tuple[Any, ...] = ()
        self.reused = False
        self.copied = self.beside = 0
        self._held: tuple[tuple[Any, ...], Hashable, Pieces, int] | None = None

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
        if model != self.next or not self._has_room():
            return pieces
        self._held = model, stamp, pieces, self.copied
        return {part: _around_the_same_weights(piece) for part, piece in pieces.items()}

    @property
    def nbytes(self) -> int:
        """Of the weights that are held, but for those that are pages of files: these count as free."""
        return 0 if self._held is None else self._held[3]

    def _has_room(self) -> bool:
        """Whether the base may stay in each process: all see the same free memory before any has taken its part."""
        return ram().free > self.processes * self.beside + SPARE

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


def stamp_of(path: str) -> Hashable:
    """What changes when the files of a path do; nothing of a hub's id, which its revision tells apart."""
    files = [Path(path), *(Path(path).rglob("*") if Path(path).is_dir() else ())]
    stats = [file.stat() for file in files if file.exists()]
    return tuple(sorted((one.st_ino, one.st_size, one.st_mtime_ns) for one in stats))
