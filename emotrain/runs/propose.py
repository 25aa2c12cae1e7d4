"""A first preset from a folder of pictures and a model's file, each decision with its reason (no torch)."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emotrain.config.builtin import shipped_presets
from emotrain.dataset.examples import Example
from emotrain.dataset.scan import FolderSpec, require_pictures, scan
from emotrain.dataset.walk import REPEATS
from emotrain.families.table import FAMILIES, Sniffed, sniff

DEFAULT = "sdxl"  # where no model is named
SHARED = 0.8  # share of captions that begin with the trigger
TAGS = 0.6  # share of captions that are lists of tags
SCHEMA = "preset.schema.json"
# First words of captions that are about anything; a trigger is a word that is about one thing alone.
ORDINARY = frozenset((
    "", "a", "an", "the", "this", "that", "there", "in", "on", "at", "my", "two", "three", "one", "1girl", "1boy",
    "2girls", "2boys", "solo", "woman", "man", "girl", "boy", "person", "people", "portrait", "photo", "photograph",
    "picture", "image", "illustration", "drawing", "painting", "sketch", "closeup", "close", "full", "view",
    "anime", "masterpiece", "best", "high", "highly", "score_9", "score_8_up", "score_7_up", "score_6_up",
    "no_humans", "rating_safe",
))  # fmt: skip
MAX_PROMPT = 160  # characters


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
    examples = require_pictures(scan((FolderSpec(path=str(folder)),))).examples
    found = None if model is None else sniff(model)
    repeats, plain = kohya_name(folder.name)
    reasons: list[str] = []
    captions = [example.captions[0] for example in examples if example.captions[0].strip()]
    tags = are_tags(captions)
    base = family_preset(found, tags)
    reasons.append(_why_base(model, found, base))
    trigger, why = trigger_of(captions, plain)
    reasons.append(why)
    if repeats:
        reasons.append(
            f"repeats: the folder's name asks for {repeats}, which change nothing with one folder; it is no trigger"
        )
    usual = FAMILIES[found.family if found else DEFAULT].resolution
    resolution, why = resolution_of(examples, found.resolution if found else usual)
    reasons.append(why)
    reasons.append(_why_captions(len(examples), captions, tags))
    masked = sum(example.mask is not None for example in examples)
    if masked:
        reasons.append(f"masks: {masked} of {len(examples)} pictures have one")
    prompts = prompts_of(captions, trigger)
    reasons.append(f"sample.prompts: {len(prompts)}, from the longest to the shortest of your captions")
    reasons.append("memory: chosen at the start by what is free on the GPU; `emotrain plan` counts it beforehand")
    text = _preset(base, model, found, folder, beside, trigger, resolution, usual, tags, prompts)
    return Proposal(_slug(plain) or "my-lora", text, tuple(reasons))


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
    return next((name for name in names if name in shipped_presets()), None)


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


def _preset(
    base: str | None, model: str | None, found: Sniffed | None, folder: Path, beside: Path, trigger: str,
    resolution: int, usual: int, tags: bool, prompts: Sequence[str],
) -> str:  # fmt: skip
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# (`emotrain presets schema > {SCHEMA}` writes it; editors then complete and check the keys)",
    ]
    if base is not None:
        lines.append(f"extends: {base}")
    if model is not None:
        lines.append(f"model: {_quoted(relative_path(model, beside) if found and found.kind != 'hub' else model)}")
    lines += ["dataset:", f"  trigger: {_quoted(trigger)}  # the word that will call the LoRA"]
    if resolution != usual or base is None:
        lines.append(f"  resolution: {resolution}")
        step = found.bucket_step if found else 64
        lines.append(f"  buckets: {{step: {step}, min: {max(resolution // 2 // step, 1) * step}, max: null}}")
    if tags:
        lines.append("  captions: {shuffle: true, keep_tokens: 1, variants: 8}  # tags, the first of which stays")
    lines += ["  folders:", f"    - path: {_quoted(relative_path(str(folder), beside))}"]
    lines += ["sample:", "  prompts:", *(f"    - {_quoted(prompt)}" for prompt in prompts)]
    return "\n".join(lines) + "\n"


def relative_path(path: str, beside: Path) -> str:
    """A path as a preset in the folder `beside` has it: relative where it lies below that."""
    if path.startswith("builtin:"):
        return path
    own = os.path.relpath(Path(path).expanduser().absolute(), beside.absolute())
    return f"./{own}" if not own.startswith("..") else str(Path(path).expanduser().absolute())


def _quoted(text: str) -> str:
    """A YAML string; JSON's strings are."""
    return text if re.fullmatch(r"\./[\w./-]+", text) else json.dumps(text, ensure_ascii=False)
