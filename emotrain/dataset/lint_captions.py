"""What the captions say as a set: the trigger, tags that it will absorb, texts too long (no torch)."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from emotrain.dataset.captions import PLACEHOLDER, plain, split_tags
from emotrain.dataset.examples import Example
from emotrain.dataset.lint_tokens import TokenCounter
from emotrain.dataset.lint_types import Finding, TagRow
from emotrain.dataset.textfile import MAX_CAPTION_BYTES, FileProblem, printable, read_bytes

FUSES = 0.8  # share of captions from where a tag and the trigger cannot be told apart
_ENOUGH = 5  # captions from where shares mean something
_SENTENCE = 6  # mean words a tag from where captions are sentences, and their words are counted instead
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,200}>|\[/?[a-z][a-z ]*\]|\x1b")
_MOJIBAKE = re.compile("[\u00c2\u00c3\u00e2][\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2122]")
_WORD = re.compile(r"[^\W\d_][\w'-]{2,}")
_COMMON = frozenset(  # words that tie a sentence together, and those by which captioners begin one
    re.findall(
        r"\w+",
        "also and are but can for from has have her his its into not off one onto out over she some than that the "
        "their them there these they this two under upon was were who with which while "
        "appears captures captured depicts depicted displays displayed features featuring portrays seen shows shown",
    )
)


def caption_findings(
    examples: Sequence[Example],
    *,
    trigger: str | None,
    tokens: TokenCounter,
    prefix: str = "",
    suffix: str = "",
) -> list[Finding]:
    """Findings about all captions; regularisation pictures go without the trigger and do not count for the shares."""
    found: list[Finding] = []
    for example in examples:
        found += _one(example, None if example.prior else trigger, tokens, prefix, suffix)
        if example.caption_path is not None:
            found += _file(example.id, example.caption_path)
    own = [example for example in examples if not example.prior and any(example.captions)]
    found += _trigger(own, trigger)
    found += _fusing(own, trigger)
    found += _repeated(own, trigger)
    return found


def tag_table(examples: Sequence[Example], limit: int = 200) -> tuple[TagRow, ...]:
    """How many pictures have each tag, most frequent first; words where captions are sentences."""
    texts = ["\n".join(example.captions) for example in examples if any(example.captions)]
    counts = _counted(texts)
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]
    return tuple(TagRow(tag, count, count / len(texts)) for tag, count in rows)


def _counted(texts: Sequence[str]) -> Counter[str]:
    """In how many texts each tag (or word) is."""
    words = _are_sentences(texts)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(_words(text)) if words else {tag.lower() for tag in _tags(text)})
    return counts


def _tags(text: str) -> list[str]:
    """Tags of all lines; those between `|||` too."""
    return [tag for line in text.replace("|||", "\n").split("\n") for tag in split_tags(line)]


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in _COMMON]


def _are_sentences(texts: Sequence[str]) -> bool:
    tags = [tag for text in texts for tag in _tags(text)]
    return bool(tags) and sum(len(tag.split()) for tag in tags) / len(tags) >= _SENTENCE


def _one(example: Example, trigger: str | None, tokens: TokenCounter, prefix: str, suffix: str) -> list[Finding]:
    found = []
    for caption in example.captions:
        text = plain(caption, trigger=trigger, prefix=prefix, suffix=suffix)
        count = tokens.count(text)
        if count > tokens.room:
            about = "" if tokens.exact else "about "
            message = f"has a caption of {about}{count} tokens, and {tokens.room} fit"
            hint = f"this end of it is not read: `{_shortened(_beyond(text, tokens))}`"
            found.append(Finding("caption-truncated", "warning", example.id, message, hint))
        if "\ufffd" in caption or _MOJIBAKE.search(caption):
            message = f"has a caption with broken letters: `{_shortened(printable(caption))}`"
            hint = "it was saved in one encoding and read in another: write it anew in UTF-8"
            found.append(Finding("caption-mojibake", "warning", example.id, message, hint))
        if match := _MARKUP.search(caption.replace(PLACEHOLDER, "")):
            message = f"has markup in its caption: `{_shortened(printable(match[0]))}`"
            hint = "it is learned as text: take it out"
            found.append(Finding("caption-markup", "info", example.id, message, hint))
    return found


def _beyond(text: str, tokens: TokenCounter) -> str:
    """The part of `text` past the encoder's room, from a whole word on (found by bisection)."""
    words = text.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        fits = tokens.count(" ".join(words[:middle])) <= tokens.room
        low, high = (middle, high) if fits else (low, middle - 1)
    return printable(" ".join(words[low:]))


def _shortened(text: str, length: int = 80) -> str:
    text = " ".join(text.split()).replace("`", "'")
    return text if len(text) <= length else text[: length - 1] + "…"


def _file(name: str, path: Path) -> list[Finding]:
    """What reading a caption file hides: its encoding, and control characters left out."""
    try:
        data = read_bytes(path, limit=MAX_CAPTION_BYTES)
    except FileProblem:
        return []  # changed since the scan; the run's own check says so
    where = printable(path.name)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        message = f"has a caption in UTF-16, {where}: it is read all the same"
        return [Finding("caption-utf16", "info", name, message, "other tools want UTF-8")]
    text = data.decode("utf-8", "ignore")
    odd = {c for c in text if unicodedata.category(c) == "Cc" and c not in "\t\n\r"}
    if odd:
        shown = " ".join(sorted(printable(c) for c in odd))
        message = f"has control characters in its caption ({shown}): they are left out"
        return [Finding("caption-control", "warning", name, message, "save it as plain text")]
    return []


def _has_trigger(example: Example, trigger: str) -> bool:
    word = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)
    return any(PLACEHOLDER in caption or word.search(caption) for caption in example.captions)


def _trigger(examples: Sequence[Example], trigger: str | None) -> list[Finding]:
    if trigger is None:
        return _likely_trigger(examples)
    having = [example for example in examples if _has_trigger(example, trigger)]
    if not having or len(having) == len(examples):
        return []
    lacking = [example.id for example in examples if not _has_trigger(example, trigger)]
    message = f"has the trigger `{printable(trigger)}` in {len(having)} of {len(examples)} captions"
    hint = "emotrain puts it first in all of them; other trainers would not"
    return [Finding("trigger-missing", "info", None, message, hint, tuple(lacking))]


def _likely_trigger(examples: Sequence[Example]) -> list[Finding]:
    """A first tag of nearly all captions, though not all: a trigger that was forgotten in some."""
    if len(examples) < _ENOUGH:
        return []
    firsts = {
        example.id: {tags[0].lower() for caption in example.captions if (tags := split_tags(caption))}
        for example in examples
    }
    counts = Counter(tag for tags in firsts.values() for tag in tags)
    tag, count = counts.most_common(1)[0] if counts else ("", 0)
    if not FUSES * len(examples) <= count < len(examples):
        return []
    lacking = tuple(name for name, tags in firsts.items() if tag not in tags)
    shown = _shortened(printable(tag))
    message = f"begins {count} of {len(examples)} captions with `{shown}`, the others not"
    hint = "if it is your trigger, name it in the preset (dataset.trigger): it then comes first in all"
    return [Finding("trigger-missing", "warning", None, message, hint, lacking)]


def _fusing(examples: Sequence[Example], trigger: str | None) -> list[Finding]:
    if len(examples) < _ENOUGH:
        return []
    own = {tag.lower() for tag in split_tags(trigger or "")} | {
        (trigger or "").lower(),
        PLACEHOLDER,
    }
    own |= set(_words(trigger or ""))
    texts = ["\n".join(example.captions) for example in examples]
    first = Counter(tags[0].lower() for text in texts if (tags := _tags(text)))
    found = []
    for tag, count in _counted(texts).most_common():
        if count < FUSES * len(texts):
            break
        if tag in own or (trigger is None and first[tag] >= FUSES * len(texts)):
            continue  # the trigger itself, or what looks like one
        share = f"{count} of {len(texts)} captions"
        message = f"has `{_shortened(printable(tag))}` in {share}: it may be absorbed by the trigger"
        hint = "take it out of the captions if it is the subject's own, else add pictures without it"
        found.append(Finding("tag-fuses", "warning", None, message, hint))
    return found


def _repeated(examples: Sequence[Example], trigger: str | None) -> list[Finding]:
    """One caption on most pictures: they can only be called together."""
    by_text: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for example in examples:
        if example.caption_source in ("file", "metadata"):
            by_text[tuple(caption.strip().lower() for caption in example.captions)].append(example.id)
    found = []
    for texts, names in by_text.items():
        alone = [texts == (word,) for word in ((trigger or "").lower(), PLACEHOLDER)]
        if len(names) < max(_ENOUGH, len(examples) / 2) or any(alone):
            continue
        shown = _shortened(printable(texts[0]))
        message = f"has the same caption on {len(names)} of {len(examples)} pictures: `{shown}`"
        hint = "say what differs, so that it can be asked for or left out later"
        found.append(Finding("caption-repeated", "info", None, message, hint, tuple(names)))
    return found
