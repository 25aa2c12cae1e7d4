"""What can go wrong, said in one line each, and the exit code that belongs to it (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; 130 and 143 are 128 + the signal's number."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATASET = 3
    MODEL = 4
    CHECKPOINT = 5
    RESOURCES = 6
    DIVERGED = 7
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(frozen=True)
class Problem:
    """One thing to fix: what and where in one line without a full stop, and how to fix it."""

    message: str
    hint: str | None = None


class EmotrainError(Exception):
    """A mistake or failure that the user can act on; the command line prints it without a traceback.

    Args:
        message: what is wrong and where, one line, no full stop.
        hint: how to fix it, one line.
        problems: further ones of the same kind, where several are known at once (then `message` is the first).
    """

    exit_code = ExitCode.BUG
    of_rank: int | None = None  # where several processes train together and know of it: the one that failed
    is_silent = False  # another process tells it

    def __init__(self, message: str, hint: str | None = None, *, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = problems or (Problem(message, hint),)


class ConfigError(EmotrainError):
    """A preset, a flag or a name that cannot be used: exit 2."""

    exit_code = ExitCode.USAGE


class DatasetError(EmotrainError):
    """A data set that is missing or cannot be used: exit 3."""

    exit_code = ExitCode.DATASET


class ModelError(EmotrainError):
    """A model or LoRA file that is missing or cannot be used: exit 4."""

    exit_code = ExitCode.MODEL


class UnwritableWeightsError(ModelError):
    """Weights that no LoRA file can hold: not finite, or too large for its dtype."""


class CheckpointError(EmotrainError):
    """A checkpoint or resume that is refused, or a run folder that exists: exit 5."""

    exit_code = ExitCode.CHECKPOINT


class ResourceError(EmotrainError):
    """No memory, no disk, no device, or a locked run: exit 6."""

    exit_code = ExitCode.RESOURCES


class DivergedError(EmotrainError):
    """Numbers that are no longer finite: exit 7."""

    exit_code = ExitCode.DIVERGED


def first_line(error: BaseException) -> str:
    """What somebody else's error says first; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many more there are: `a, b and 3 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
