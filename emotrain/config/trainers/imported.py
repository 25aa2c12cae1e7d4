"""What is gathered while another trainer's config is read: a preset's values, and what became of each word."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from emotrain.config.explain import REASONS, section_at
from emotrain.config.names import name_from_file
from emotrain.config.paths import absolute, model_or_hub
from emotrain.config.prompts import FLAG, parse_prompt
from emotrain.config.schema import EMO_OPTIMIZERS, OPTIMIZERS
from emotrain.config.text import read_text
from emotrain.config.trainers.files import parse_file
from emotrain.errors import ConfigError

Kind = Literal["taken", "left out", "no equivalent"]
Values = Mapping[str, Any]
Special = Callable[["Import", str, Any], Any]

DTYPES = {
    "bf16": "bf16", "bfloat16": "bf16", "bfloat_16": "bf16", "fp16": "fp16", "float16": "fp16", "float_16": "fp16",
    "fp32": "fp32", "float32": "fp32", "float_32": "fp32", "float": "fp32", "no": "fp32",
}  # fmt: skip
QUANTIZED = {
    "float8": "fp8", "float_8": "fp8", "qfloat8": "fp8", "float_w8a8": "fp8", "int_8": "int8", "int_w8a8": "int8",
    "qint8": "int8", "int8": "int8", "uint8": "int8", "convrot8": "int8", "nfloat_4": "nf4", "nf4": "nf4",
    **dict.fromkeys(("uint4", "int4", "qint4", "uint3", "uint2"), "nf4"),
}  # fmt: skip
OFF = ("none", "off", "never", "0", "0.0", "false", "no")
OPTIMIZER_OPTIONS = ("use_shadow", "stopcoef", "notify", "weight_decay", "eps", "betas")
SD_ALONE = ("train.loss.min_snr_gamma", "train.loss.noise_offset")


@dataclass(frozen=True)
class Row:
    """One word of the other trainer's config: its value as text, and what became of it."""

    word: str
    value: str
    kind: Kind
    what: str


@dataclass(frozen=True)
class Model:
    """A kind of model that a trainer has a word for: the shipped preset for it, and what it is built like."""

    preset: str
    flow: bool
    unet: bool


class Import:
    """A preset in the making.

    Args:
        folder: of the config: where its relative paths are looked for first, then in the current folder.
        models: the trainer's words for the kinds of model.
    """

    def __init__(self, folder: Path, models: Mapping[str, Model]) -> None:
        self.folder = folder
        self.models = models
        self.values: dict[str, Any] = {}
        self.rows: list[Row] = []
        self.num_off = 0  # words that are off or empty
        self.kind: Model | None = None
        self.folders: dict[str, dict[str, Any]] = {}  # by path
        self._captions: dict[str, list[tuple[str, Any]]] = {}

    def choose(self, word: str, value: str) -> None:
        """Say which kind of model is trained.

        Raises:
            ConfigError: one that cannot be trained here.
        """
        if value not in self.models:
            raise ConfigError(f"{word} is `{value}`, which cannot be trained here", f"known: {', '.join(self.models)}")
        self.kind = self.models[value]

    def take(self, word: str, value: Any, place: str, converted: Any = None) -> None:
        """Set `place`, such as `network.rank`, to a word's value, or to what that was converted to."""
        new = value if converted is None else converted
        if place in SD_ALONE and self.kind is not None and self.kind.flow:
            self.leave(word, value, "it is of the SD models alone")
            return
        try:
            new = _kind_of(place).validate_python(new)
        except ValidationError:
            self.leave(word, value, f"{place} takes no such value")
            return
        *sections, key = place.split(".")
        at = self.values
        for section in sections:
            at = at.setdefault(section, {})
        if key in at and at[key] != new:
            self.leave(word, value, f"{place} is {shown(at[key])} by a word before it")
            return
        at[key] = list(new) if isinstance(new, tuple) else new
        same = shown(new) == shown(value) or (isinstance(new, str) and os.path.isabs(new))
        self.rows.append(Row(word, shown(value), "taken", place if same else f"{place}: {shown(new)}"))

    def set(self, word: str, value: Any, place: str, new: None) -> None:
        section, key = place.split(".")
        self.values.setdefault(section, {})[key] = new
        self.rows.append(Row(word, shown(value), "taken", f"{place}: null"))

    def leave(self, word: str, value: Any, why: str) -> None:
        """Say why a word is not in the preset."""
        self.rows.append(Row(word, shown(value), "left out", why))

    def lack(self, word: str, value: Any, instead: str = "") -> None:
        """Say that there is nothing like it."""
        self.rows.append(Row(word, shown(value), "no equivalent", instead))

    def read(self, words: Values, places: Mapping[str, str], special: Mapping[str, Special], prefix: str = "") -> None:
        """Go through a section word by word.

        Args:
            words: key -> value as the file has them.
            places: key -> where it belongs in a preset.
            special: keys that need a function of their own; it is called with what is off, too.
            prefix: of the keys in the rows, such as `train.`.
        """
        for word, value in words.items():
            if word in special:
                special[word](self, prefix + word, value)
            elif is_off(value):
                self.num_off += 1
            elif word in places:
                self.take(prefix + word, value, places[word])
            elif word in REASONS:
                self.leave(prefix + word, value, re.sub(r"^leave it out(: |, or )", "", REASONS[word]))
            else:
                self.lack(prefix + word, value)

    def path(self, text: str) -> str:
        """A path of the config as an absolute one: beside the config, else below the current folder if it is there."""
        beside = absolute(text, self.folder)
        return absolute(text, Path.cwd()) if not os.path.exists(beside) and os.path.exists(text) else beside

    def file(self, word: str, value: Any, place: str) -> None:
        """A model's file, folder or hub id."""
        found = model_or_hub(str(value), self.folder)
        self.take(word, value, place, found if os.path.exists(found) else model_or_hub(str(value), Path.cwd()))

    def stack(self, word: str, value: Any, weight: float, *, sample: bool = True) -> None:
        """An earlier LoRA that lies frozen below the new one; `sample` says whether samples are drawn with it."""
        listed = self.values.setdefault("start_from", {}).setdefault("stack", [])
        listed.append({"path": self.path(str(value)), "weight": weight} | ({} if sample else {"sample": False}))
        told = f"start_from.stack, weight {weight:g}" + ("" if sample else ", sample: false")
        self.rows.append(Row(word, shown(value), "taken", told))

    def beside(self, word: str, value: Any) -> Any:
        """The values of a file that a config names; None, and said, where it is not there."""
        path = Path(self.path(str(value)))
        if not path.is_file():
            self.leave(word, value, "no such file")
            return None
        return parse_file(path, str(value))

    def name(self, word: str, value: Any) -> None:
        """The run's name."""
        if not is_off(value):
            self.take(word, value, "name", name_from_file(Path(f"{value}.yaml")))

    def add_folder(self, word: str, path: Any, **settings: Any) -> None:
        """A folder of pictures; the same one again, at another resolution, changes nothing."""
        where = self.path(str(path))
        if is_off(path) or where in self.folders:
            why = "it has no path" if is_off(path) else "the same folder again; all resolutions hold for all folders"
            self.leave(word, path, why)
            return
        if settings.get("prior") == 0:
            self.leave(word, path, "regularisation pictures that count nothing")
            return
        own: dict[str, Any] = {}
        for key, value in settings.items():
            if value in (None, False, ""):
                continue
            try:
                own[key] = _kind_of(f"dataset.folders.{key}").validate_python(value)
            except ValidationError:
                self.leave(f"{word}: {key}", value, f"dataset.folders.{key} takes no such value")
        self.folders[where] = own
        told = ", ".join(f"{key}: {shown(value) if key != 'mask' else Path(value).name}" for key, value in own.items())
        self.rows.append(Row(word, shown(path), "taken", f"dataset.folders ({told})" if told else "dataset.folders"))

    def halve(self, word: str) -> None:
        """Regularisation pictures are half of the samples, as those trainers show them that say nothing of it."""
        priors = ["prior" in own for own in self.folders.values()]
        if sorted(priors) == [False, True]:
            for own in self.folders.values():
                own.pop("repeats", None)
            self.take(word, "half of all samples", "dataset.balance", "equal")
        elif any(priors) and not all(priors):
            self.leave(word, "half of all samples", "several folders: `dataset.balance` gives each its share")

    def caption(self, word: str, value: Any, place: str, converted: Any = None) -> None:
        """A setting that they have for each folder, and a preset once: see `settle_captions`."""
        self._captions.setdefault(place, []).append((word, value if converted is None else converted))

    def settle_captions(self) -> None:
        """Take each caption setting as the first folder has it, and say where another one differs."""
        for place, found in self._captions.items():
            word, value = found[0]
            self.take(word, value, f"dataset.captions.{place}")
            for other_word, other in found[1:]:
                if other != value:
                    self.leave(other_word, other, f"dataset.captions.{place} is one for all folders: {shown(value)}")

    def sizes(self, word: str, values: Any) -> None:
        """`1024`, `[512, 768]`, `[[832, 1216]]`: the sides of squares of the same area."""
        if sides := sides_of(values):
            have = self.values.get("dataset", {}).get("resolution", [])
            if set(sides) <= set(have):
                return
            self.values.get("dataset", {}).pop("resolution", None)
            self.take(word, values, "dataset.resolution", tuple(sorted({*have, *sides})))
        else:
            self.leave(word, values, "it is no size")

    def optimizer(self, word: str, name: str, lr: tuple[str, Any], options: tuple[str, Values]) -> None:
        """An emo optimizer is taken with its options; every other one is left out with its learning rate."""
        lr_word, rate = lr
        option_word, given = options
        plain = name.rpartition(".")[2].casefold().replace("_", "").replace("-", "")
        if plain in EMO_OPTIMIZERS:
            self.take(word, name, "train.optimizer.name", plain)
            for key, value in given.items():
                if key in OPTIMIZER_OPTIONS:
                    self.take(f"{option_word}: {key}", value, f"train.optimizer.{key}")
                else:
                    self.lack(f"{option_word}: {key}", value)
            if not is_off(rate):
                self.leave(lr_word, rate, "an emo optimizer has its own")
            return
        ours = next((one for one in reversed(OPTIMIZERS[len(EMO_OPTIMIZERS) :]) if one in plain), None)
        if plain:
            keep = f"; `train: {{optimizer: {ours}, lr: {shown(rate or 1e-4)}}}` would keep it" if ours else ""
            self.leave(word, name, f"EmoSens takes its place{keep}")
        if not is_off(rate):
            self.leave(lr_word, rate, "EmoSens has no learning rate to set: it is 1.0")
        for key, value in given.items():
            self.leave(f"{option_word}: {key}", value, f"it belongs to {name or 'their optimizer'}")

    def prompts(self, word: str, lines: Sequence[str]) -> None:
        """Sample prompts with their flags; flags that are not known here are cut off, and said."""
        found = []
        for line in lines:
            text, *parts = FLAG.split(f" {line.strip()}")
            if not text.strip() or text.strip().startswith("#"):
                continue
            kept = text.strip()
            for flag, value in zip(parts[::2], parts[1::2], strict=True):
                try:
                    parse_prompt(f"{kept} --{flag} {value}")
                    kept = f"{kept} --{flag} {value.strip()}"
                except ValueError:
                    self.lack(f"{word}: --{flag}", value.strip())
            found.append(kept)
        if found:
            self.values.setdefault("sample", {})["prompts"] = found
            many = f"{len(found)} prompts" if len(found) > 1 else found[0]
            self.rows.append(Row(word, many, "taken", "sample.prompts"))

    def finish(self) -> dict[str, Any]:
        """The preset's values in the order that people write them."""
        self.settle_captions()
        dataset = self.values.setdefault("dataset", {})
        sides = dataset.get("resolution")
        if sides and "min" not in dataset.get("buckets", {}):  # the preset below may have those of another resolution
            dataset.setdefault("buckets", {})
            dataset["buckets"] |= {"min": max(min(sides) // 2 // 64, 1) * 64}
            dataset["buckets"].setdefault("max", None)
        dataset["folders"] = [{"path": path, **settings} for path, settings in self.folders.items()]
        train = self.values.get("train", {})
        if {"micro_batch_size", "gradient_accumulation_steps"} & set(train):  # together they are what was chosen
            train.setdefault("micro_batch_size", 1)
            train.setdefault("gradient_accumulation_steps", 1)
        order = ("name", "model", "dataset", "network", "start_from", "train", "validate", "sample", "save", "log")
        return {key: self.values[key] for key in order if self.values.get(key)}


@cache
def _kind_of(place: str) -> TypeAdapter[Any]:
    *sections, key = place.split(".")
    section = section_at(tuple(sections))
    assert section is not None, place
    field = next(field for name, field in section.model_fields.items() if key in (name, field.alias))
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return TypeAdapter(kind)


def is_off(value: Any) -> bool:
    """Whether a value says that a setting is not used: zero, false, nothing."""
    return not value or (isinstance(value, str) and value.casefold() in OFF)


def shown(value: Any) -> str:
    """A value for a table's cell."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(one) for one in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(one)}" for key, one in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def sides_of(values: Any) -> tuple[int, ...]:
    """Sides of squares; () where there is none."""
    if number(values, 0.0) > 0:
        return (int(values),)
    found = []
    for value in values if isinstance(values, list) else ():
        sides = [number(side, 0.0) for side in (value[:2] if isinstance(value, list) else [value, value])]
        if len(sides) == 2 and min(sides) > 0:
            found.append(round(math.sqrt(sides[0] * sides[1])))
    return tuple(found)


def first_line(out: Import, word: str, name: Any) -> str | None:
    """The first line of a text file that a config names."""
    path = Path(out.path(str(name)))
    if not path.is_file():
        out.leave(word, name, "no such file")
        return None
    lines = [line.strip() for line in read_text(path, str(name)).splitlines() if line.strip()]
    if len(lines) > 1:
        out.leave(word, name, "a folder has one caption: the first line")
    return lines[0] if lines else None


def prompt_line(prompt: str, **flags: Any) -> str:
    """A sample prompt with the flags that a preset's prompts have; flags without a value are left out."""
    line = " ".join(prompt.split())
    return line + "".join(f" --{flag} {value}" for flag, value in flags.items() if value not in (None, "", False))


def chosen(place: str, words: Mapping[str, Any]) -> Special:
    """A word whose values are looked up in a table (in lower case); what is not in it has no equivalent."""

    def take(out: Import, word: str, value: Any) -> None:
        key = shown(value).casefold()
        if key in words:
            out.take(word, value, place, words[key])
        elif is_off(value):
            out.num_off += 1
        else:
            out.lack(word, value)

    return take


def unless_off(take: Special) -> Special:
    """`take` for a word that is in use; one that is off is counted alone."""

    def taken(out: Import, word: str, value: Any) -> None:
        if is_off(value):
            out.num_off += 1
        else:
            take(out, word, value)

    return taken


def because(why: str) -> Special:
    """A word that is left out for a reason; nothing is said where it is off."""
    return unless_off(lambda out, word, value: out.leave(word, value, why))


def switch(place: str, on: Any = True) -> Special:
    """A word that sets `place` to `on`, and nothing where it is off."""
    return unless_off(lambda out, word, value: out.take(word, value, place, on))


def file_at(place: str) -> Special:
    """A word for a model's file, folder or hub id."""
    return unless_off(lambda out, word, value: out.file(word, value, place))


def kind_of_adapter(*plain: str) -> Special:
    """The word for the kind of network: one of `plain`, else something that has no equivalent."""

    def tell(out: Import, word: str, value: Any) -> None:
        if value in plain:
            out.leave(word, value, "it is a LoRA")
        elif value == "lycoris.kohya":
            out.leave(word, value, "its network_args say which kind")
        elif str(value).lower().endswith("lokr"):
            out.take(word, value, "network.type", "lokr")
        else:
            out.lack(word, value, "a plain LoRA is trained in its place")

    return tell


def factor(out: Import, word: str, value: Any) -> None:
    """The size of a LoKr's small factor; -1, which is the default of all of them, says none."""
    if isinstance(value, int) and value > 0:
        out.take(word, value, "network.factor")
    else:
        out.num_off += 1


def section(words: Any, key: str) -> Values:
    """The mapping under a key, empty where something else is."""
    found = words.get(key) if isinstance(words, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def items(words: Any, key: str) -> list[Values]:
    """The mappings of the list under a key, none where something else is."""
    return [one for one in each(words.get(key) if isinstance(words, Mapping) else None) if isinstance(one, Mapping)]


def each(value: Any) -> list[Any]:
    """A list as it is, and nothing where something else is."""
    return value if isinstance(value, list) else []


def number(value: Any, default: float = 1.0) -> float:
    """A number, or `default` where there is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def repeats_of(out: Import, word: str, value: Any) -> int | None:
    """How often an epoch sees each picture: a whole number of 2 and more, else None."""
    wanted = number(value)
    whole = max(math.floor(wanted + 0.5), 1)
    if whole != wanted:
        out.leave(word, value, f"repeats are whole numbers: {whole}")
    return whole if whole > 1 else None


def off_at(usual: Any, instead: str = "") -> Special:
    """A word without an equivalent, of which nothing is said where it has the value that it has by itself."""

    def lack(out: Import, word: str, value: Any) -> None:
        if is_off(value) or value == usual:
            out.num_off += 1
        else:
            out.lack(word, value, instead)

    return lack


def _idle(out: Import, word: str, value: Any) -> None:
    out.num_off += 1


def _skip(out: Import, word: str, value: Any) -> None:
    """A word that is read elsewhere."""


SKIP: Special = _skip
IDLE: Special = _idle  # a word that says nothing of what is trained: how it is started, what is shown
BASE, VAE, TEXT_ENCODER = file_at("model.base"), file_at("model.vae"), file_at("model.text_encoder")
CONTINUES = unless_off(lambda out, word, value: out.take(word, value, "start_from.continue", out.path(str(value))))
IN_FLOAT32 = because("the LoRA is trained in float32")
CHECKPOINTING = because("it is on where the model does not fit without")
BLOCKS = because("blocks move by themselves where memory is short")
ATTENTION = because("attention is always the fused one")
ENCODERS = because("text encoders leave the GPU when all is encoded")
CACHED = because("latents and text are always cached")
