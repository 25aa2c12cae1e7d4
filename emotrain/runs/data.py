"""The folders of a preset, scanned once: what is trained on, and what is only measured with (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from emotrain.config.schema import Preset
from emotrain.dataset.balance import balanced
from emotrain.dataset.examples import Example
from emotrain.dataset.scan import Scan, require_pictures, resolve_folder, scan
from emotrain.dataset.split import example_digests, split_held_out, take_shard
from emotrain.errors import DatasetError

HELD_OUT = ((24, 4), (12, 3))  # from so many pictures on, so many are kept for the validation


@dataclass(frozen=True)
class Scans:
    """`held_out` is None where the preset names no `validate.folder`."""

    train: Scan
    held_out: Scan | None


def scan_preset(preset: Preset) -> Scans:
    """Scan the folders of a preset.

    A held-out folder inside a training folder is not trained on, and its pictures get ids of their own even where a
    training folder has the same name. Its captions are read as those of the first training folder.

    Raises:
        DatasetError: a folder is missing or listed twice.
        ConfigError: an unknown `builtin:` name.
    """
    data, own = preset.dataset, preset.validate_.folder
    words = data.captions
    held_roots = [] if own is None else [resolve_folder(own)]
    for root in held_roots:
        if root.resolve() in {resolve_folder(folder.path).resolve() for folder in data.folders}:
            raise DatasetError(
                f"validate.folder is {own}, which dataset.folders trains on",
                "name another folder, or leave it out: a few pictures are then held out by themselves",
            )
    train = scan(data.folders, caption_extension=words.extension, default_caption=words.default, leave_out=held_roots)
    if own is None:
        return Scans(train, None)
    folder = data.folders[0].model_copy(update={"path": own, "repeats": 1, "prior": None, "mask": None, "flip": False})
    held_out = scan(
        (folder,),
        caption_extension=words.extension,
        default_caption=words.default,
        leave_out=train.folders,
        beside=train.folders,
    )
    return Scans(train, held_out)


@dataclass(frozen=True)
class Pictures:
    """The data set of one run: what is trained on, and what is only measured with."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]  # empty: the validation uses flipped training pictures

    @property
    def all(self) -> tuple[Example, ...]:
        """Both."""
        return (*self.train, *self.held_out)

    @property
    def own(self) -> list[Example]:
        """Of those that are trained on, the subject's: no regularisation pictures."""
        return [example for example in self.train if not example.prior]


def evenly(examples: Sequence[Example], most: int) -> list[Example]:
    """At most so many of them, evenly spaced."""
    count = min(len(examples), most)
    return [examples[number * len(examples) // count] for number in range(count)]


def read_pictures(preset: Preset, known: Mapping[str, str] | None = None) -> Pictures:
    """Scan the folders, take this machine's shard, set the held-out pictures aside, balance the others.

    `known` are the digests by id of the run that goes on: folders that were only renamed keep the ids they had.
    """
    scans = scan_preset(preset)
    return pictures_of(preset, scans if known is None else as_known(scans, known))


def as_known(scans: Scans, known: Mapping[str, str]) -> Scans:
    """Scans in which a folder of another name has its old ids, where most of what it held is in it as it was.

    Ids begin with the folder's name, and order, validation and logs go by them; and what differs is told by picture.
    """
    both = [scan for scan in (scans.train, scans.held_out) if scan is not None]
    now = _by_folder(example_digests(example for scan in both for example in scan.examples))
    before = _by_folder(known)
    names = {}
    for name in now.keys() - before.keys():
        others = before.keys() - now.keys()
        same = [old for old in others if 2 * len(before[old].items() & now[name].items()) > len(before[old])]
        if len(same) == 1:
            names[name] = same[0]
    if len(set(names.values())) < len(names):  # two folders hold what one held: which of them it was is not known
        return scans

    def named(scan: Scan) -> Scan:
        examples = []
        for example in scan.examples:
            name, _, rest = example.id.partition("/")
            examples.append(replace(example, id=f"{names.get(name, name)}/{rest}"))
        return replace(scan, examples=tuple(examples))

    return Scans(named(scans.train), None if scans.held_out is None else named(scans.held_out))


def _by_folder(digests: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Digests by the first part of their ids, and by the rest."""
    folders: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        folder, _, rest = name.partition("/")
        folders.setdefault(folder, {})[rest] = digest
    return folders


def pictures_of(preset: Preset, scans: Scans) -> Pictures:
    """As `read_pictures`, where the folders are scanned.

    Raises:
        DatasetError: no usable picture.
        ConfigError: shares that no repeats can give.
    """
    data, validate = preset.dataset, preset.validate_
    train = take_shard(require_pictures(scans.train).examples, data.shard)
    if scans.held_out is not None:
        held = require_pictures(scans.held_out).examples[: max(validate.probe_images, 1)]
    elif validate.fraction == "auto":
        usable = sum(not example.prior for example in train)
        count = next((held for enough, held in HELD_OUT if usable >= enough), 0)
        train, held = split_held_out(train, count=count, seed=preset.train.seed)
    else:
        train, held = split_held_out(train, fraction=float(validate.fraction), seed=preset.train.seed)
    return Pictures(balanced(train, data.folders, data.balance), held)


def as_shown(preset: Preset, scans: Scans) -> Scan:
    """The training folders' scan with how often an epoch shows each picture: 0 times where it is held out.

    Raises:
        ConfigError: shares that no repeats can give.
        DatasetError: this machine's shard is empty.
    """
    if all(example.prior for example in scans.train.examples):
        return scans.train
    repeats = {example.id: example.repeats for example in pictures_of(preset, scans).train}
    shown = tuple(replace(one, repeats=repeats.get(one.id, 0)) for one in scans.train.examples)
    return replace(scans.train, examples=shown)
