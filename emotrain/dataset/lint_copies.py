"""Copies within the data set, and leaks into the held-out pictures, as findings (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from emotrain.dataset.duplicates import grouped, near_duplicates, same_bytes
from emotrain.dataset.examples import Example
from emotrain.dataset.lint_types import Finding
from emotrain.errors import listed

_TAKE_OUT = "keep the best one; where you want it seen more often, use `repeats`"
_LEAK = "take it out of one of them: a held-out picture that is trained on measures nothing"
Item = tuple[Example, bool]  # a picture, and whether it is held out


def copy_findings(
    examples: Sequence[Example],
    looks: Sequence[bytes],
    held_out: Sequence[Example] = (),
    held_out_looks: Sequence[bytes] = (),
) -> list[Finding]:
    """Exact and near copies. A look is empty where the picture could not be decoded.

    Raises:
        ValueError: not one look per picture.
    """
    if len(examples) != len(looks) or len(held_out) != len(held_out_looks):
        raise ValueError("one look per picture")
    items: list[Item] = [(example, False) for example in examples]
    items += [(example, True) for example in held_out]
    all_looks = [*looks, *held_out_looks]
    found: list[Finding] = []
    behind: set[int] = set()  # exact copies: only their first is compared by its look
    for group in same_bytes([example.sha256 for example, _ in items]):
        found += _group_findings([items[place] for place in group], exact=True)
        first_held_out = next((place for place in group if items[place][1]), group[0])
        behind |= set(group) - {group[0], first_held_out}
    places = [k for k, look in enumerate(all_looks) if look and k not in behind]
    for near in grouped(near_duplicates([all_looks[place] for place in places])):
        members = [items[places[k]] for k in near]
        if len({example.sha256 for example, _ in members}) > 1:
            found += _group_findings(members, exact=False)
    return found


def _group_findings(members: Sequence[Item], *, exact: bool) -> list[Finding]:
    """One finding for the copies in training, one for a leak."""
    own = [example for example, is_held_out in members if not is_held_out]
    held_out = [example for example, is_held_out in members if is_held_out]
    found = []
    if len(own) > 1:
        first, *others = own
        names = tuple(example.id for example in others)
        what = "is the same file as" if exact else "shows the same picture as"
        message = f"{what} {listed(names, 3)}"
        if len({example.captions for example in own}) > 1:
            message += ", with other captions"
        code = "duplicate" if exact else "near-duplicate"
        found.append(Finding(code, "warning", first.id, message, _TAKE_OUT, names))
    if own and held_out:
        names = tuple(example.id for example in held_out)
        what = "the same file as" if exact else "the same picture as"
        message = f"is trained on, and {what} {listed(names, 3)}, which is held out"
        found.append(Finding("leak", "warning", own[0].id, message, _LEAK, names))
    return found
