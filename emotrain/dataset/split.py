"""Parts of a data set, and its fingerprint: pure functions of the examples (no torch)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from emotrain.dataset.captions import uniform
from emotrain.dataset.examples import Example
from emotrain.dataset.images import MAX_FILE_BYTES
from emotrain.dataset.textfile import read_bytes
from emotrain.errors import ConfigError, DatasetError


def split_held_out(
    examples: Sequence[Example],
    *,
    count: int | None = None,
    fraction: float | None = None,
    seed: int,
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(train, held out): `count` pictures, or a `fraction` of them, set aside for the validation.

    Spread over shapes: pictures are ordered by aspect and every n-th is taken, at random within its
    stretch. Pictures of one content (same sha256) go together, and regularisation pictures are
    never held out. The same examples and seed give the same split, whatever their order. At least
    one picture stays to train.

    Raises:
        ValueError: not exactly one of `count` and `fraction`, or a negative one.
    """
    if (count is None) == (fraction is None) or (count or 0) < 0 or not 0 <= (fraction or 0) <= 1:
        raise ValueError(f"needs one of count and fraction, got {count} and {fraction}")
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in sorted(examples, key=lambda item: item.id):
        groups[example.sha256].append(example)
    pool = [group for group in groups.values() if not any(item.prior for item in group)]
    pool.sort(key=lambda group: (group[0].width / group[0].height, group[0].sha256))
    wanted = count if count is not None else round((fraction or 0.0) * len(pool))
    wanted = min(wanted, max(0, len(pool) - 1))
    held: set[str] = set()
    for index in range(wanted):
        stretch = pool[index * len(pool) // wanted : (index + 1) * len(pool) // wanted]
        chosen = min(stretch, key=lambda group: uniform(f"held-out/{seed}/{group[0].sha256}"))
        held |= {example.id for example in chosen}
    return (
        tuple(example for example in examples if example.id not in held),
        tuple(example for example in examples if example.id in held),
    )


def take_shard(examples: Sequence[Example], shard: str | None) -> tuple[Example, ...]:
    """This machine's part: "1/2" is the first of two. Every picture is in exactly one part.

    Raises:
        ConfigError: not such a fraction.
        DatasetError: the part is empty.
    """
    if shard is None:
        return tuple(examples)
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        hint = '"1/2" is the first of two parts, "2/2" the second'
        raise ConfigError(f"dataset.shard is `{shard}`, which is not a part of a whole", hint)
    ordered = sorted(examples, key=lambda item: item.id)[int(part) - 1 :: int(parts)]
    if not ordered:
        raise DatasetError(f"dataset.shard {shard} of {len(examples)} pictures is empty", "use fewer parts")
    mine = {example.id for example in ordered}
    return tuple(example for example in examples if example.id in mine)


def example_digests(examples: Iterable[Example]) -> dict[str, str]:
    """Per id a digest of size, picture and captions; two of these show what has changed."""
    return {example.id: _digest(example) for example in sorted(examples, key=lambda item: item.id)}


def fingerprint(examples: Iterable[Example]) -> str:
    """A digest of the whole data set: names, sizes, contents and captions."""
    lines = "".join(f"{name}\n{digest}\n" for name, digest in example_digests(examples).items())
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(example: Example) -> str:
    captions = "\n".join(example.captions).encode("utf-8", "surrogatepass")
    text = f"{example.file_size} {example.sha256} {hashlib.sha256(captions).hexdigest()}"
    if example.mask == "alpha":
        text += " alpha"
    elif example.mask is not None:
        text += f" {hashlib.sha256(read_bytes(example.mask, limit=MAX_FILE_BYTES)).hexdigest()}"
    return hashlib.sha256(text.encode()).hexdigest()
