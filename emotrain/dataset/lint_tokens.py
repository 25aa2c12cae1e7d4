"""How many tokens a caption has: counted with the model's tokenizer, else estimated (no torch)."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

ENDS = 2  # the start and end marks that CLIP puts round a text
CLIP_TOKENS = 77
LONGEST = 256  # symbols that are put together at once: a longer word is counted in parts, in place of for minutes
_PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens without start and end marks; `room` is how many fit; `exact`: no estimate."""

    count: Callable[[str], int]
    room: int
    exact: bool


def estimate_tokens(text: str) -> int:
    """About how many CLIP tokens a text has, within a tenth for English captions.

    CLIP's byte pairs keep common words whole; what is fitted here is the mean number of pieces by
    length of an English word. Other alphabets come out at about 0.6 tokens a byte.
    """
    total = 0.0
    for piece in _PIECE.findall(text.lower()):
        total += _pieces_of_word(piece) if piece[0].isalpha() else 1.0
    return round(total)


def _pieces_of_word(word: str) -> float:
    if not word.isascii():
        size = len(word.encode("utf-8", "surrogatepass"))
        return max(1.0, 0.6 * size if size > 1.5 * len(word) else size / 3)
    if len(word) <= 7:
        return 1.05
    if len(word) <= 14:
        return 1.35 if len(word) <= 11 else 1.65
    return len(word) / 5


def estimator(max_tokens: int = CLIP_TOKENS) -> TokenCounter:
    """A counter that estimates, for an encoder of `max_tokens` places."""
    return TokenCounter(estimate_tokens, max_tokens - ENDS, exact=False)


def tokenizer_in(folder: Path, max_tokens: int | None = None) -> TokenCounter | None:
    """The counter of a CLIP tokenizer folder; None where it holds none that can be read.

    Args:
        folder: with `tokenizer.json`, or `merges.txt`.
        max_tokens: places of the encoder; None takes `model_max_length`.
    """
    try:
        ranks = {pair: rank for rank, pair in enumerate(_merges(folder))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not ranks:
        return None

    @lru_cache(maxsize=65536)
    def pieces(word: str) -> int:
        letters = [_BYTES[byte] for byte in word.encode("utf-8", "replace")]
        return sum(_num_pieces(letters[k : k + LONGEST], ranks) for k in range(0, len(letters), LONGEST))

    def count(text: str) -> int:
        words = _PIECE.findall(unicodedata.normalize("NFC", text).lower())
        return sum(pieces(word) for word in words)

    return TokenCounter(count, (max_tokens or _model_max_length(folder)) - ENDS, exact=True)


def _merges(folder: Path) -> list[tuple[str, str]]:
    """The byte pairs in order of their rank."""
    if (folder / "tokenizer.json").is_file():
        model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    else:
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    return [(left, right) for left, right in pairs]


def _num_pieces(symbols: list[str], ranks: dict[tuple[str, str], int]) -> int:
    """Byte pair encoding of a word (Sennrich et al. 2016, arXiv:1508.07909): symbols that remain."""
    symbols = [*symbols[:-1], symbols[-1] + "</w>"]
    while len(symbols) > 1:
        pairs = [(ranks.get(pair, len(ranks)), k) for k, pair in enumerate(pairwise(symbols))]
        rank, place = min(pairs)
        if rank == len(ranks):
            break
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return len(symbols)


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte, as byte-level vocabularies write them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {b: chr(256 + k) for k, b in enumerate(rest)}


_BYTES = _byte_letters()


def _model_max_length(folder: Path) -> int:
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        length = int(said.get("model_max_length", CLIP_TOKENS))
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return CLIP_TOKENS
    return length if 2 < length < 100_000 else CLIP_TOKENS
