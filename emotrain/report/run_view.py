"""What the page of a run shows, as plain values; whoever reads the run's folder fills it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from emotrain.dataset.lint_types import PictureRow
from emotrain.dataset.ranking import PictureScore

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Curves:
    """(step, value) of everything that is drawn; empty where nothing was written."""

    loss: Points = ()
    validation: Points = ()
    scalar: Points = ()
    trust: Points = ()
    pulse: Points = ()
    likeness: Points = ()


@dataclass(frozen=True)
class PromptRow:
    """One prompt and its pictures: small JPEGs in the order of the gallery's columns, empty where there is none."""

    prompt: str
    negative: str = ""
    details: str = ""  # seed, steps, guidance, size, the model that drew
    pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Gallery:
    """Samples. `columns` are steps in their order; `lora` says that the last column is the LoRA file's own."""

    columns: tuple[str, ...] = ()
    rows: tuple[PromptRow, ...] = ()
    lora: bool = False
    pixelated: bool = False  # the pictures are so small that they are enlarged without smoothing


@dataclass(frozen=True)
class Settings:
    """Every key of the preset; `changed` are those that differ from `base`: (key, value, value there)."""

    base: str = ""
    changed: tuple[tuple[str, str, str], ...] = ()
    every: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LoraFacts:
    """The file that is handed over."""

    path: str
    facts: tuple[tuple[str, str], ...] = ()  # (label, value)
    trigger: str = ""


@dataclass(frozen=True)
class RunView:
    """One run."""

    name: str  # of the run
    path: str  # its folder
    status: str  # signal, max_steps, interrupted, diverged, running, crashed, damaged, or another stop reason
    why: str = ""  # the reason in a sentence
    command: str = ""  # how it is resumed, where it can be
    # (label, value) for the head and the comparison; a label is the same in every run
    facts: tuple[tuple[str, str], ...] = ()
    last_step: int | None = None
    best_step: int | None = None  # of the LoRA
    best_loss: float | None = None  # its validation loss
    base_loss: float | None = None  # without the LoRA
    # what the samples' likeness to the pictures is held against: (label, value)
    likeness: tuple[tuple[str, float], ...] = ()
    same_validation: object = None  # runs with equal values were validated on the same pictures and noise
    curves: Curves = field(default_factory=Curves)
    gallery: Gallery = field(default_factory=Gallery)
    settings: Settings = field(default_factory=Settings)
    ranking: tuple[PictureScore, ...] = ()
    pictures: Mapping[str, PictureRow] = field(default_factory=dict)
    actions: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by id, what the run did about a picture
    lora: LoraFacts | None = None
    missing: tuple[str, ...] = ()  # what could not be read, a sentence each
