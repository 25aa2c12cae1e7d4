"""A first preset from a folder of pictures and a model's file, each decision with its reason."""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emotrain.config.builtin import shipped_presets
from emotrain.config.load import load
from emotrain.dataset.examples import Example
from emotrain.dataset.walk import REPEATS
from emotrain.errors import EmotrainError
from emotrain.families.table import FAMILIES, Sniffed, sniff
from emotrain.runs.layout import Layout, layout_of

DEFAULT = "sdxl"  # where no model is named
SHARED = 0.8  # share of captions that begin with the trigger
TAGS = 0.6  # share of captions that are lists of tags
# First words of captions that are about anything; a trigger is a word that is about one thing alone.
ORDINARY = frozenset((
    "", "a", "an", "the", "this", "that", "there", "in", "on", "at", "my", "two", "three", "one", "1girl", "1boy",
    "2girls", "2boys", "solo", "woman", "man", "girl", "boy", "person", "people", "portrait", "photo", "photograph",
    "picture", "image", "illustration", "drawing", "painting", "sketch", "closeup", "close", "full", "view",
    "anime", "masterpiece", "best", "high", "highly", "score_9", "score_8_up", "score_7_up", "score_6_up",
    "no_humans", "rating_safe",
))  # fmt: skip
MAX_PROMPT = 160  # characters
NO_MODEL = "memory: chosen at the start by what is free on the GPU; `emotrain plan` counts it beforehand"


@dataclass(frozen=True)
class Proposal:
    """A preset's text, and why each of its lines is there, a sentence each."""

    name: str
    text: str
    reasons: tuple[str, ...]


def propose(folder: Path, model: str | None, beside: Path) -> Proposal:
    """Look at pictures, captions and the model, and write a preset.

    Args:
        folder: of pictures.
        model: as `model.base` in a preset, or None.
        beside: the folder that the preset will lie in; its paths are relative to that.

    Raises:
        DatasetError: the folder is missing, or holds no usable picture.
        ModelError: the model is missing or of no known kind.
        ConfigError: an unknown `builtin:` name.
    """
    layout = layout_of(folder)
    examples = layout.examples
    found = None if model is None else sniff(model)
    repeats, plain = kohya_name(folder.name)
    within = {example.id.split("/")[1] if example.id.count("/") > 1 else "" for example in examples}
    if len(within) == 1 and kohya_name(inner := within.pop())[0]:
        plain = kohya_name(inner)[1]  # kohya's layout of one subject: `img/10_mika woman`
    reasons: list[str] = []
    captions = [example.captions[0] for example in examples if example.captions[0].strip()]
    tags = are_tags(captions)
    base = family_preset(found, tags)
    reasons.append(_why_base(model, found, base))
    if found is not None and found.distilled:
        reasons.append(
            f"model: {found.name} is distilled to few steps, which plain training undoes: train on the base model and "
            "draw on this one (sample.base), or put a training adapter under the LoRA (start_from.stack)"
        )
    trigger, why = trigger_of(captions, plain)
    reasons.append(why)
    if repeats:
        reasons.append(
            f"repeats: the folder's name asks for {repeats}, which change nothing with one folder; it is no trigger"
        )
    reasons += layout.reasons
    usual = FAMILIES[found.family if found else DEFAULT].resolution
    resolution, why = resolution_of(examples, found.resolution if found else usual)
    reasons.append(why)
    reasons.append(_why_captions(len(examples), captions, tags))
    prompts = prompts_of(captions, trigger)
    reasons.append(f"sample.prompts: {len(prompts)}, from the longest to the shortest of your captions")
    first = Draft(base, model, found, layout, trigger, resolution, usual, tags, tuple(prompts))
    quantize, why = (None, NO_MODEL) if model is None else _memory(first)
    reasons.append(why)
    text = replace(first, quantize=quantize).text(beside)
    return Proposal(_slug(plain) or "my-lora", text, tuple(reasons))


def _memory(draft: Draft) -> tuple[str | None, str]:
    """What the card means for the preset; what cannot be planned yet is said, and `emotrain check` says all of it."""
    from emotrain.runs.card import memory_proposal

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "preset.yaml"
        path.write_text(draft.text(Path(name)), encoding="utf-8")
        try:
            return memory_proposal(load(path).preset)
        except EmotrainError as error:
            return None, f"memory: it cannot be planned yet: {error.message}"


def kohya_name(name: str) -> tuple[int, str]:
    """`10_mika woman` -> (10, "mika"): repeats and the first word, as kohya's folders are named; else (0, name)."""
    found = REPEATS.fullmatch(name)
    return (int(found[1]), (name.partition("_")[2].split() or [name])[0]) if found else (0, name)


def are_tags(captions: Sequence[str]) -> bool:
    """Whether most captions are lists of short, comma-separated tags."""

    def tagged(caption: str) -> bool:
        parts = [part for part in caption.split(",") if part.strip()]
        return len(parts) >= 4 and statistics.mean(len(part.split()) for part in parts) <= 3

    return bool(captions) and sum(map(tagged, captions)) >= TAGS * len(captions)


def family_preset(found: Sniffed | None, tags: bool) -> str | None:
    """The shipped preset for a model; None where there is none for its family."""
    if found is None:
        return DEFAULT
    if tags and (preset := FAMILIES[found.family].tag_presets.get(found.prediction)):
        return preset
    names = (found.variant, found.family, next(iter(FAMILIES[found.family].variants)))
    shipped = shipped_presets()
    name = next((name for name in names if name in shipped), None)
    return f"{name}-turbo" if found.distilled and f"{name}-turbo" in shipped else name


def trigger_of(captions: Sequence[str], plain: str) -> tuple[str, str]:
    """The word that most captions begin with, else one made of the folder's name; and why."""
    first = Counter(re.split(r"[,.;:\s]", caption.strip(), maxsplit=1)[0] for caption in captions)
    if first:
        word, count = first.most_common(1)[0]
        if count >= SHARED * len(captions) and word.casefold() not in ORDINARY and len(captions) > 1:
            return word, f"dataset.trigger: `{word}`, which {count} of {len(captions)} captions begin with"
        parts = Counter(part for caption in captions for part in {part.strip() for part in caption.split(",")})
        for word, count in parts.most_common():
            made_up = re.fullmatch(r"\w*[_\d]\w*", word) is not None and word.casefold() not in ORDINARY
            if made_up and count >= SHARED * len(captions) and len(captions) > 1:
                return word, f"dataset.trigger: `{word}`, which {count} of {len(captions)} captions have as a tag"
    slug = _slug(plain).replace("-", "_") or "mystyle"
    return slug, f"dataset.trigger: `{slug}`, after the folder: no word stands first in most captions"


def resolution_of(examples: Sequence[Example], wanted: int) -> tuple[int, str]:
    """The model's own resolution, or less where most pictures are smaller; and why."""
    side = statistics.median((example.width * example.height) ** 0.5 for example in examples)
    if side >= 0.9 * wanted:
        return (
            wanted,
            f"dataset.resolution: {wanted}, the model's; the pictures are large enough (median {side:.0f} px)",
        )
    step = 64 if wanted >= 256 else 16
    smaller = max(int(side) // step * step, min(wanted, max(wanted // 2, step)))
    return (
        smaller,
        f"dataset.resolution: {smaller}, since half of the pictures are below {side:.0f} px (model: {wanted})",
    )


def prompts_of(captions: Sequence[str], trigger: str) -> list[str]:
    """Up to three prompts, from the longest, middle and shortest caption; the trigger is written [trigger]."""
    kept = sorted({_without(caption, trigger)[:MAX_PROMPT].strip(" ,.") for caption in captions} - {""}, key=len)
    chosen = [kept[-1], kept[len(kept) // 2], kept[0]] if len(kept) >= 3 else list(reversed(kept))
    return [f"[trigger], {caption}" for caption in dict.fromkeys(chosen)] or ["[trigger]"]


def _without(caption: str, trigger: str) -> str:
    line = " ".join(caption.split())
    return re.sub(rf"^{re.escape(trigger)}\b[\s,]*", "", line, flags=re.IGNORECASE)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.casefold()).strip("-_")[:40]


def _why_base(model: str | None, found: Sniffed | None, base: str | None) -> str:
    if found is None:
        return f"extends: {DEFAULT}, since no model was named; `emotrain init FOLDER MODEL` looks at yours"
    if base is None:
        return f"model: {model} is {found.describe()}, for which no preset is shipped"
    return f"extends: {base}, since {model} is {found.describe()}"


def _why_captions(count: int, captions: Sequence[str], tags: bool) -> str:
    said = f"captions: {len(captions)} of {count} pictures have one"
    return f"{said}; lists of tags, so they are shuffled behind the first" if tags else f"{said}; kept as they are"


@dataclass(frozen=True)
class Draft:
    """All that goes into the preset."""

    base: str | None
    model: str | None
    found: Sniffed | None
    layout: Layout
    trigger: str
    resolution: int
    usual: int
    tags: bool
    prompts: tuple[str, ...]
    quantize: str | None = None

    def text(self, beside: Path) -> str:
        """The preset's text; its paths are relative to the folder `beside`."""
        return "\n".join((*self._model(beside), *self._dataset(beside), *self._sample())) + "\n"

    def _model(self, beside: Path) -> Iterator[str]:
        if self.base is not None:
            yield f"extends: {self.base}"
        if self.model is None:
            return
        hub = self.found is None or self.found.kind == "hub"
        base = _quoted(self.model if hub else relative_path(self.model, beside))
        if self.quantize is None:
            yield f"model: {base}"
        else:
            yield from ("model:", f"  base: {base}", f"  quantize: {self.quantize}  # to fit into this machine's card")

    def _dataset(self, beside: Path) -> Iterator[str]:
        yield from ("dataset:", f"  trigger: {_quoted(self.trigger)}  # the word that will call the LoRA")
        if self.resolution != self.usual or self.base is None:
            yield f"  resolution: {self.resolution}"
            step = self.found.bucket_step if self.found else 64
            yield f"  buckets: {{step: {step}, min: {max(self.resolution // 2 // step, 1) * step}, max: null}}"
        if self.tags:
            yield "  captions: {shuffle: true, keep_tokens: 1, variants: 8}  # tags, the first of which stays"
        yield "  folders:"
        for part in self.layout.parts:
            yield f"    - path: {_quoted(relative_path(str(part.path), beside))}"
            if part.mask is not None:
                yield f"      mask: {_quoted(relative_path(str(part.mask), beside))}"
            if part.prior:
                yield "      prior: 1.0  # regularisation pictures, and what their loss counts"
        if self.layout.equal:
            yield "  balance: equal  # or a share for each: {name: 0.7, other: 0.3}"

    def _sample(self) -> Iterator[str]:
        yield from ("sample:", "  prompts:", *(f"    - {_quoted(prompt)}" for prompt in self.prompts))


def relative_path(path: str, beside: Path) -> str:
    """A path as a preset in the folder `beside` has it: relative where it lies below that."""
    if path.startswith("builtin:"):
        return path
    own = os.path.relpath(Path(path).expanduser().absolute(), beside.absolute())
    return f"./{own}" if not own.startswith("..") else str(Path(path).expanduser().absolute())


def _quoted(text: str) -> str:
    """A YAML string; JSON's strings are."""
    return text if re.fullmatch(r"\./[\w./-]+", text) else json.dumps(text, ensure_ascii=False)
