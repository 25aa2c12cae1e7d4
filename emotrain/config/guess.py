"""The likely word behind a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`, None if none is."""
    by_fold = {one.casefold().replace("-", "_"): one for one in known}
    folded = word.casefold().replace("-", "_")
    if folded in by_fold:
        return by_fold[folded]
    found = get_close_matches(folded, by_fold, n=1, cutoff=0.6)
    if found:
        return by_fold[found[0]]
    longer = [one for one in by_fold if len(folded) > 2 and one.startswith(folded)]
    return by_fold[longer[0]] if len(longer) == 1 else None


def likely(word: str, known: Iterable[str]) -> str | None:
    """A hint that names the nearest known word, None if none is near."""
    found = nearest(word, known)
    return None if found is None else f"did you mean `{found}`?"
