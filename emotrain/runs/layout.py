"""How somebody's folder of pictures is laid out: subfolders, masks, regularisation pictures (no torch)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from emotrain.dataset.examples import Example
from emotrain.dataset.images import SUFFIXES
from emotrain.dataset.scan import FolderSpec, require_pictures, scan
from emotrain.dataset.walk import REPEATS

UNEQUAL = 1.5  # times as many pictures as the smallest folder has: from there on shares are made equal
MASKS = ("masks", "mask")
REGULARISATION = frozenset(("reg", "regs", "regularisation", "regularization", "class_images"))


@dataclass(frozen=True)
class Part:
    """One entry of `dataset.folders`."""

    path: Path
    mask: Path | None = None
    prior: bool = False


@dataclass(frozen=True)
class Layout:
    """The folders to train on, whether their shares are to be equal, the pictures, and why, a sentence each."""

    parts: tuple[Part, ...]
    equal: bool
    examples: tuple[Example, ...]
    reasons: tuple[str, ...]


def layout_of(folder: Path) -> Layout:
    """Look at a folder and what is below and beside it.

    Raises:
        DatasetError: it is missing, or holds no usable picture.
    """
    examples = require_pictures(scan((FolderSpec(path=str(folder)),))).examples
    if (masked := _with_masks(folder)) is not None:
        return masked
    below: dict[str, list[Example]] = defaultdict(list)
    for one in examples if folder.is_dir() else ():
        first, *more = one.path.relative_to(folder).parts
        below[first if more else ""].append(one)
    named = {name: found[1] for name in below if (found := REPEATS.fullmatch(name))}
    if named:
        said = ", ".join(f"{name}: {times}" for name, times in named.items())
        return Layout((Part(folder),), False, examples, (f"repeats: those in the subfolders' names ({said})",))
    if len(below) < 2 or "" in below:
        return Layout((Part(folder),), False, examples, ())
    counts = {name: len(pictures) for name, pictures in below.items()}
    prior = [name for name in below if name.casefold() in REGULARISATION]
    reasons = [f"dataset.folders: {len(below)} subfolders, each by itself"]
    reasons += [f"prior: {name} holds regularisation pictures, by its name" for name in prior]
    equal = max(counts.values()) >= UNEQUAL * min(counts.values())
    if equal:
        said = ", ".join(f"{count} in {name}" for name, count in counts.items())
        reasons.append(f"dataset.balance: equal, since there are {said}: each folder comes as often as the others")
    parts = tuple(Part(folder / name, prior=name in prior) for name in below)
    return Layout(parts, equal, examples, tuple(reasons))


def _with_masks(folder: Path) -> Layout | None:
    """The layout of a folder with masks inside or beside it: most of them are called as its pictures are."""
    inside = [folder / name for name in MASKS]
    beside = [folder.with_name(f"{folder.name}{join}{name}") for name in MASKS for join in "_-"]
    for place in (*inside, *beside, *(folder.with_name(name) for name in MASKS)):
        if not place.is_dir() or place.resolve() == folder.resolve():
            continue
        examples = scan((FolderSpec(path=str(folder), mask=str(place)),)).examples
        masked = sum(one.mask is not None for one in examples)
        if masked and 2 * masked >= sum(path.suffix.lower() in SUFFIXES for path in place.iterdir()):
            reason = f"mask: {place}, which has one for {masked} of {len(examples)} pictures"
            return Layout((Part(folder, place),), False, examples, (reason,))
    return None
