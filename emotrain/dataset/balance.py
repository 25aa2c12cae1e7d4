"""Folders by share: how often each folder's pictures come so that an epoch has the shares asked for (no torch).

Shares come out of whole repeats: the smallest ones that are within two hundredths of every share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from emotrain.config.paths import folder_names
from emotrain.config.schema import Folder
from emotrain.dataset.examples import Example
from emotrain.errors import ConfigError

Balance = Literal["repeats", "equal"] | Mapping[str, float]
NEAR = 0.02  # of all samples: as near as a share has to come
FINEST = 20  # repeats of the folder that is seen least, at most
MOST = 1000  # times as often as the folder that is seen least


@dataclass(frozen=True)
class FolderShare:
    """One folder: its pictures, how often an epoch shows each of them, and its share of the samples (0..1)."""

    name: str
    pictures: int
    repeats: float  # the mean, where subfolders have repeats of their own
    share: float

    def describe(self) -> str:
        """Such as `mika 70 % (24 pictures x 3)`."""
        return f"{self.name} {self.share:.0%} ({self.pictures} pictures x {self.repeats:g})".replace("%", " %")


def balanced(examples: Sequence[Example], folders: Sequence[Folder], balance: Balance) -> tuple[Example, ...]:
    """The examples with the repeats that give their folders the shares of `balance`.

    A folder's own `repeats` do not count then; those of its subfolders (`10_name`) go on dividing its share.

    Raises:
        ConfigError: shares so far apart that one picture would come MOST times as often as another.
    """
    if balance == "repeats":
        return tuple(examples)
    counts = _samples(examples, folders)
    present = [index for index, count in enumerate(counts) if count]
    wanted = _wanted(folders, balance)
    rates = {index: wanted[index] / counts[index] for index in present}
    least, most = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    if rates[most] > MOST * rates[least]:
        names = folder_names([folder.path for folder in folders])
        times = f"{rates[most] / rates[least]:,.0f} times as often as one of {names[least]}"
        raise ConfigError(
            f"dataset.balance shows each picture of {names[most]} {times}",
            f"give {names[least]} a larger share, or leave it out of dataset.folders",
        )
    times_of = _whole_repeats(rates, counts, wanted)
    return tuple(
        replace(one, repeats=one.repeats // folders[one.folder].repeats * times_of[one.folder]) for one in examples
    )


def folder_shares(examples: Sequence[Example], folders: Sequence[Folder]) -> tuple[FolderShare, ...]:
    """What share of an epoch each folder has, of examples with their repeats as they are trained."""
    names = folder_names([folder.path for folder in folders])
    total = sum(one.repeats for one in examples)
    own = [[one.repeats for one in examples if one.folder == index] for index in range(len(folders))]
    return tuple(
        FolderShare(name, len(repeats), round(sum(repeats) / len(repeats), 2), sum(repeats) / total)
        for name, repeats in zip(names, own, strict=True)
        if repeats
    )


def _wanted(folders: Sequence[Folder], balance: Balance) -> list[float]:
    """The share of every folder, in any unit."""
    if isinstance(balance, str):
        return [1.0] * len(folders)
    return [float(balance[name]) for name in folder_names([folder.path for folder in folders])]


def _samples(examples: Sequence[Example], folders: Sequence[Folder]) -> list[int]:
    """Samples of each folder without its own repeats."""
    counts = [0] * len(folders)
    for one in examples:
        counts[one.folder] += one.repeats // folders[one.folder].repeats
    return counts


def _whole_repeats(rates: Mapping[int, float], counts: Sequence[int], wanted: Sequence[float]) -> dict[int, int]:
    """Whole repeats of each folder: the first within NEAR of all shares, else the nearest."""
    lowest, whole = min(rates.values()), sum(wanted[index] for index in rates)
    tried = []
    for scale in range(1, FINEST + 1):
        times = {index: max(1, round(scale * rate / lowest)) for index, rate in rates.items()}
        total = sum(times[index] * counts[index] for index in times)
        error = max(abs(times[index] * counts[index] / total - wanted[index] / whole) for index in times)
        if error <= NEAR:
            return times
        tried.append((error, scale, times))
    return min(tried)[2]
