"""From a caption to the texts a model sees: pure functions of text and seed (no torch).

A caption is a list of tags between commas; a sentence is one long tag. Its parts, in the order they
come out:

    trigger, prefix, kept tags, free tags, kept tail, suffix

  * The trigger comes first and is never dropped or shuffled. It is not put twice: where a tag of
    the caption is the trigger, that tag moves to the front, and a sentence that begins with it has
    it already. A caption that says `[trigger]` gets it there and nowhere else.
  * `|||` ends the kept tags and, the second time, begins the kept tail; without it the first
    `keep_tokens` tags (not counting the trigger) are kept.
  * Free tags are shuffled, and each is left out with the probability `tag_dropout`.
  * `{a|b|c}` takes one of its words.
  * Prefix and suffix are joined with a space: write your own comma where you want one.

All of it is drawn ahead, into `variants`, so that text embeddings can be cached; a step only picks
one.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

WILDCARD = re.compile(r"\{([^{}|]*\|[^{}]*)\}")
COMMA = re.compile(r"(?<![\w.])(\d{1,3}(?:,\d{3})+)(?![\w])|,")  # a number such as 1,000 is taken whole
SEPARATOR = "|||"
PLACEHOLDER = "[trigger]"
EMPTY = -1  # `pick`: this sample goes without a caption


@dataclass(frozen=True)
class _Parts:
    """A caption taken apart: tags before, between and after."""

    lead: str  # the trigger, or "" where the caption holds it itself
    kept: tuple[str, ...]
    free: tuple[str, ...]
    tail: tuple[str, ...]
    held: frozenset[str] = frozenset()  # of the free tags, those that hold the trigger


def variants(
    captions: str | Sequence[str],
    *,
    trigger: str | None = None,
    shuffle: bool = False,
    keep_tokens: int = 0,
    tag_dropout: float = 0.0,
    prefix: str = "",
    suffix: str = "",
    count: int = 8,
    seed: int = 0,
) -> tuple[str, ...]:
    """All texts that a picture with these captions is trained with.

    One text a caption where nothing varies; else `count` texts for each of them, so that every
    caption has the same share. The first one of each is the plain one: nothing shuffled or dropped,
    first words of the wildcards. The texts depend on the captions and the seed, not on the
    picture's name.

    Raises:
        ValueError: `count` below 1, `keep_tokens` below 0 or `tag_dropout` outside 0..1.
    """
    if count < 1 or keep_tokens < 0 or not 0.0 <= tag_dropout <= 1.0:
        raise ValueError(f"bad count {count}, keep_tokens {keep_tokens} or tag_dropout {tag_dropout}")
    several = [captions] if isinstance(captions, str) else list(captions) or [""]
    word = (trigger or "").strip()
    varied = any(_varies(text, word, keep_tokens, shuffle, tag_dropout) for text in several)
    texts = []
    for caption in several:
        for index in range(count if varied else 1):
            rng = random.Random(f"{seed}\n{index}\n{caption}") if index else None
            parts = _take_apart(_resolve(caption, rng), word, keep_tokens)
            free = list(parts.free) if rng is None else _vary(parts, shuffle, tag_dropout, rng)
            if prefix.strip() and word and PLACEHOLDER not in caption:
                parts = replace(parts, lead=word)
            texts.append(_join(parts, free, prefix.strip(), suffix.strip()))
    return tuple(texts)


def plain(caption: str, *, trigger: str | None = None, prefix: str = "", suffix: str = "") -> str:
    """The text of one caption with nothing varied."""
    return variants(caption, trigger=trigger, prefix=prefix, suffix=suffix, count=1)[0]


def fill_trigger(prompt: str, trigger: str | None) -> str:
    """A prompt with `[trigger]` replaced; where there is no trigger it goes, with its comma."""
    if trigger:
        return prompt.replace(PLACEHOLDER, trigger)
    first, *others = prompt.split(PLACEHOLDER)
    behind = [piece.lstrip().removeprefix(",").lstrip() for piece in others]
    pieces = [first, *behind]
    return " ".join([*(piece.rstrip() for piece in pieces[:-1]), pieces[-1]]).strip(" ,")


def pick(seed: int, visit: int, example_id: str, n_variants: int, dropout: float = 0.0) -> int:
    """Which variant a picture is shown with at its `visit`-th showing (without repeats, the epoch).

    Variants take turns, from a start that depends on (seed, example_id), so all are seen equally
    often; `EMPTY` (-1) with the probability `dropout`. A pure function.

    Raises:
        ValueError: no variants, or `dropout` outside 0..1.
    """
    if n_variants < 1 or not 0.0 <= dropout <= 1.0:
        raise ValueError(f"bad n_variants {n_variants} or dropout {dropout}")
    if dropout and uniform(f"dropout/{seed}/{visit}/{example_id}") < dropout:
        return EMPTY
    start = int(uniform(f"variant/{seed}/{example_id}") * n_variants)
    return (start + visit) % n_variants


def uniform(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2.0**53


def split_tags(text: str) -> tuple[str, ...]:
    """The tags of a caption: what lies between commas, none empty; `1,000` is one number."""
    pieces, start = [], 0
    for match in COMMA.finditer(text):
        if match[1] is None:
            pieces.append(text[start : match.start()])
            start = match.end()
    return tuple(tag for part in (*pieces, text[start:]) if (tag := " ".join(part.split())))


def _resolve(caption: str, rng: random.Random | None) -> str:
    """Wildcards replaced, inner ones first; the first word each without `rng`."""
    while match := WILDCARD.search(caption):
        words = match[1].split("|")
        word = words[0] if rng is None else rng.choice(words)
        caption = caption[: match.start()] + word.strip() + caption[match.end() :]
    return caption


def _vary(parts: _Parts, shuffle: bool, tag_dropout: float, rng: random.Random) -> list[str]:
    """The free tags as they come out; where they are shuffled, those that hold the trigger come first."""
    kept = [tag for tag in parts.free if tag in parts.held or rng.random() >= tag_dropout]
    if not shuffle:
        return kept
    loose = [tag for tag in kept if tag not in parts.held]
    rng.shuffle(loose)
    return [tag for tag in kept if tag in parts.held] + loose


def _varies(caption: str, trigger: str, keep_tokens: int, shuffle: bool, tag_dropout: float) -> bool:
    if WILDCARD.search(caption):
        return True
    parts = _take_apart(caption, trigger, keep_tokens)
    free = [tag for tag in parts.free if tag not in parts.held]
    return (shuffle and len(free) > 1) or (tag_dropout > 0.0 and len(free) > 0)


def _take_apart(caption: str, trigger: str, keep_tokens: int) -> _Parts:
    head, *further = fill_trigger(caption, trigger).split(SEPARATOR, 2)
    groups = [split_tags(text) for text in (head, *further)]
    own = split_tags(trigger)
    begins = bool(own) and [tag.casefold() for tag in groups[0][: len(own)]] == [tag.casefold() for tag in own]
    if begins:
        groups[0] = groups[0][len(own) :]
    if not further:
        groups = [groups[0][:keep_tokens], groups[0][keep_tokens:]]
    kept, free, tail = (*groups, ())[:3]
    if not own or begins:
        return _Parts(trigger, kept, free, tail)
    word = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)
    if PLACEHOLDER in caption or word.match(", ".join((*kept, *free, *tail))):
        held = frozenset(tag for tag in free if word.search(tag))
        return _Parts("", kept, free, tail, held)
    same = trigger.casefold()
    kept, free, tail = (tuple(tag for tag in group if tag.casefold() != same) for group in (kept, free, tail))
    return _Parts(trigger, kept, free, tail)


def _join(parts: _Parts, free: Sequence[str], prefix: str, suffix: str) -> str:
    body = ", ".join((*parts.kept, *free, *parts.tail))
    said = " ".join(piece for piece in (prefix, body, suffix) if piece)
    text = ", ".join(piece for piece in (parts.lead, said) if piece)
    return re.sub(r"(\s*,)+", ",", text).strip(" ,")
