"""A data set in memory, encoded: batches are a pure function of (seed, micro-step).

Order, flips and captions are computed from the seed, the epoch and the picture's id, never drawn
from a random state that moves; so there is nothing to save, and a resumed run sees what the first
one would have seen. No picture is
dropped: where a bucket does not fill its last batch, that batch is smaller.

Shape letters: B samples, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from emotrain.batch import Batch, Conditioning, Labels
from emotrain.dataset.buckets import Placement
from emotrain.dataset.cache import Cache, Tensors
from emotrain.dataset.captions import EMPTY, pick, uniform
from emotrain.dataset.examples import Example
from emotrain.dataset.settings import LoaderSettings
from emotrain.dataset.split import fingerprint
from emotrain.errors import DatasetError, ResourceError

NO_SHARES: Mapping[str, float] = {}
KEPT_PLANS = 4  # epochs whose order is remembered
DEFAULT_LIMIT = 4 * 2**30  # bytes of embeddings in memory


@dataclass(frozen=True)
class Item:
    """A picture at a placement: latents float32 [C, h, w], mask float32 [1, h, w], on the CPU."""

    example: Example
    placement: Placement
    latents: Tensor
    flipped: Tensor | None
    mask: Tensor | None

    @property
    def key(self) -> str:
        """Distinguishes the placements of one picture."""
        return f"{self.example.id}@{self.placement.bucket_w}x{self.placement.bucket_h}"


class TextRows(Mapping[str, Tensors]):
    """Embeddings per text, without the batch axis; a mapping: in memory as far as they fit, the rest from the cache.

    One T5 embedding of FLUX.1 takes 4 MiB even in 16 bits, so 500 captions with 8 variants each are 16 GiB. What does
    not fit is read when a batch asks for it: milliseconds, before a step that takes seconds on models of that size.

    Args:
        cache: where entries can be read back from.
        limit: bytes kept in memory; texts that the cache could not keep are held above it too.
    """

    def __init__(self, cache: Cache, limit: int = DEFAULT_LIMIT) -> None:
        self.nbytes = 0
        self._cache = cache
        self._limit = limit
        self._held: dict[str, Tensors] = {}
        self._keys: dict[str, str] = {}  # of the texts that are not held

    def add(self, text: str, key: str, row: Tensors) -> None:
        """Take a text's embeddings, whose cache entry is `key`."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in row.values())
        if self.nbytes + size <= self._limit or not self._cache.has("texts", key):
            self._held[text] = row
            self.nbytes += size
        else:
            self._keys[text] = key

    def __getitem__(self, text: str) -> Tensors:
        """The embeddings of a text.

        Raises:
            KeyError: a text that was not added.
            ResourceError: it lay in the cache, and is gone or damaged.
        """
        if text in self._held:
            return self._held[text]
        row = self._cache.get("texts", self._keys[text])
        if row is None:
            message = f"cache {self._cache.folder} was cleared or damaged while a run was using it"
            raise ResourceError(message, "`emotrain resume` encodes the captions again and goes on")
        return row

    def __iter__(self) -> Iterator[str]:
        yield from self._held
        yield from self._keys

    def __len__(self) -> int:
        return len(self._held) + len(self._keys)


class CachedDataset:
    """Encoded pictures and texts, and the order they come in.

    Args:
        items: pictures at their placements.
        texts: per id all texts it is trained with, the plain one first.
        rows: embeddings per text, with one for "" (or {} where texts are not encoded ahead).
        settings: batch size, seed and caption dropout.

    Raises:
        DatasetError: no items.
    """

    def __init__(
        self,
        items: Sequence[Item],
        texts: dict[str, tuple[str, ...]],
        rows: Mapping[str, Tensors],
        settings: LoaderSettings,
    ) -> None:
        if not items:
            raise DatasetError("data set holds no pictures to train on", "hold fewer of them out")
        self.items = tuple(items)
        self.settings = settings
        self._texts = texts
        self._rows = rows
        self._plans: dict[int, list[list[tuple[int, int]]]] = {}
        self._buckets: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for index, item in enumerate(self.items):
            showings = [(index, repeat) for repeat in range(item.example.repeats)]
            self._buckets.setdefault(item.placement.size, []).extend(showings)
        self.examples = tuple({item.example.id: item.example for item in self.items}.values())
        self.num_images = len(self.examples)
        size = settings.micro_batch_size
        self.batches_per_epoch = sum(-(-len(group) // size) for group in self._buckets.values())
        self.fingerprint = fingerprint(self.examples)

    def batch(self, micro_step: int, shares: Mapping[str, float] = NO_SHARES) -> Batch:
        """The micro-batch of that number (from 0): a pure function of it, the seed and `shares`.

        Args:
            micro_step: the number.
            shares: by id, how often pictures are shown in comparison with what the data set says (0: never). Another
                of the same folder and size comes in their place, where there is one that is not in `shares`.

        Raises:
            ValueError: a negative number.
        """
        return self._collate(self._samples(micro_step, shares), micro_step // self.batches_per_epoch)

    def labels(self, micro_step: int, shares: Mapping[str, float] = NO_SHARES) -> Labels:
        """What `batch` would hold, without its tensors; arguments as there."""
        samples = self._samples(micro_step, shares)
        height, width = samples[0][0].latents.shape[-2:]
        captioned = tuple(bool(said) for _, said, _ in samples)
        return Labels(tuple(item.example.id for item, _, _ in samples), captioned, (height, width))

    def _samples(self, micro_step: int, shares: Mapping[str, float]) -> list[tuple[Item, str, bool]]:
        """Picture, text and whether it is flipped, of every sample of a micro-batch."""
        if micro_step < 0:
            raise ValueError(f"micro_step is {micro_step}")
        epoch, number = divmod(micro_step, self.batches_per_epoch)
        seed = self.settings.seed
        samples = []
        planned = self._plan(epoch)[number]
        for index, repeat in planned:
            item = self.items[index]
            visit = epoch * item.example.repeats + repeat
            if shares and uniform(f"shown/{seed}/{visit}/{item.key}") >= shares.get(item.example.id, 1.0):
                item, visit = self._instead(item, visit, [place for place, _ in planned], shares)
            texts = self._texts[item.example.id]
            chosen = pick(seed, visit, item.key, len(texts), self.settings.dropout)
            flipped = item.example.flip and uniform(f"flip/{seed}/{visit}/{item.key}") < 0.5
            samples.append((item, "" if chosen == EMPTY else texts[chosen], flipped))
        return samples

    def _instead(self, item: Item, visit: int, planned: Sequence[int], shares: Mapping[str, float]) -> tuple[Item, int]:
        """Another picture of the same folder and size, and a visit of its own; not one of the batch if possible."""
        others = [
            index
            for index in dict.fromkeys(index for index, _ in self._buckets[item.placement.size])
            if self.items[index].example.folder == item.example.folder and self.items[index].example.id not in shares
        ]
        others = [index for index in others if index not in planned] or others
        if not others:
            return item, visit
        place = int(uniform(f"instead/{self.settings.seed}/{visit}/{item.key}") * len(others))
        return self.items[others[place]], -1 - visit  # its own visits count from 0

    def size_of(self, micro_step: int) -> tuple[int, int]:
        """Pixels of a micro-batch, and of one of its pictures."""
        epoch, number = divmod(micro_step, self.batches_per_epoch)
        showings = self._plan(epoch)[number]
        width, height = self.items[showings[0][0]].placement.size
        return len(showings) * width * height, width * height

    def largest(self) -> int:
        """The micro-step of the first epoch whose batch takes the most memory."""
        return max(range(self.batches_per_epoch), key=self.size_of)

    def fixed(self, ids: Iterable[str], flip: bool = False) -> list[Batch]:
        """These pictures with their plain captions, at their first placement; a batch per bucket.

        Raises:
            KeyError: an id that is not in the data set.
            ValueError: `flip` of a picture that was not encoded flipped.
        """
        first: dict[str, Item] = {}
        for item in self.items:
            first.setdefault(item.example.id, item)
        groups: dict[tuple[int, int], list[Item]] = {}
        for name in dict.fromkeys(ids):
            groups.setdefault(first[name].placement.size, []).append(first[name])
        return [
            self._collate([(item, self._texts[item.example.id][0], flip) for item in group], 0)
            for group in groups.values()
        ]

    def class_texts(self, ids: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """Captions with the class word in the trigger's place, and their embeddings, float32, a row each.

        {} where texts are not encoded ahead.

        Raises:
            KeyError: an id that is not in the data set.
        """
        known = {example.id: example for example in self.examples}
        texts = tuple(self.settings.class_text(known[name]) for name in ids)
        return texts, self._embeds(texts)

    def without(self, ids: Iterable[str]) -> CachedDataset:
        """The data set less these pictures; tensors are shared.

        Raises:
            DatasetError: nothing is left.
        """
        gone = set(ids)
        items = [item for item in self.items if item.example.id not in gone]
        return CachedDataset(items, self._texts, self._rows, self.settings)

    def placements(self) -> tuple[Placement, ...]:
        """All placements, for the table of buckets."""
        return tuple(item.placement for item in self.items)

    def nbytes(self) -> int:
        """Bytes of all tensors held in memory."""
        tensors = [t for i in self.items for t in (i.latents, i.flipped, i.mask) if t is not None]
        held = self._rows.nbytes if isinstance(self._rows, TextRows) else 0
        return held + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _plan(self, epoch: int) -> list[list[tuple[int, int]]]:
        """(item, repeat) of every batch of an epoch.

        Each showing has a time in 0..1 at random; of a picture with n repeats one falls into each n-th of
        the epoch. A bucket's showings are cut into batches as they come, and a batch takes the time of one
        of them.
        """
        if epoch not in self._plans:
            rng = random.Random(f"order/{self.settings.seed}/{epoch}")
            batches: list[tuple[float, list[tuple[int, int]]]] = []
            for _, group in sorted(self._buckets.items()):
                times = [(repeat + rng.random()) / self.items[i].example.repeats for i, repeat in group]
                order = sorted(zip(times, group, strict=True))
                for start, end in _cuts(len(order), self.settings.micro_batch_size, rng):
                    batch = [showing for _, showing in order[start:end]]
                    batches.append((order[rng.randrange(start, end)][0], batch))
            while len(self._plans) >= KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = [batch for _, batch in sorted(batches)]
        return self._plans[epoch]

    def _embeds(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if not self._rows:
            return {}
        rows = [self._rows[text] for text in texts]
        return {name: _stacked([row[name] for row in rows]) for name in rows[0]}

    def _collate(self, samples: Sequence[tuple[Item, str, bool]], epoch: int) -> Batch:
        latents = torch.stack([_side(item, flipped) for item, _, flipped in samples])
        text = self._embeds([said for _, said, _ in samples])
        masks = None
        if any(item.mask is not None for item, _, _ in samples):
            masks = torch.stack([_mask(item, flipped) for item, _, flipped in samples])
        return Batch(
            latents=latents,
            text=text,
            conditioning=_conditioning(samples),
            weights=torch.tensor([item.example.weight for item, _, _ in samples], dtype=torch.float32),
            masks=masks,
            ids=tuple(item.example.id for item, _, _ in samples),
            epoch=epoch,
            texts=tuple(said for _, said, _ in samples),
        )


def _cuts(count: int, size: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Start and end of the batches of `count` samples; the one that is not full lies anywhere."""
    sizes = [size] * (count // size) + [count % size] * (count % size > 0)
    rng.shuffle(sizes)
    ends = list(accumulate(sizes))
    yield from zip([0, *ends[:-1]], ends, strict=True)


def _side(item: Item, flipped: bool) -> Tensor:
    if not flipped:
        return item.latents
    if item.flipped is None:
        raise ValueError(f"{item.example.id} was not encoded flipped: name it in prepare(also_flipped=...)")
    return item.flipped


def _stacked(rows: list[Tensor]) -> Tensor:
    """Embeddings of a batch in float32; rows of fewer tokens are filled up with zeros (False in a mask)."""
    wide = [row.float() if row.is_floating_point() else row for row in rows]
    return pad_sequence(wide, batch_first=True)


def _mask(item: Item, flipped: bool) -> Tensor:
    if item.mask is None:
        return torch.ones((1, *item.latents.shape[-2:]))
    return item.mask.flip(-1) if flipped else item.mask


def _conditioning(samples: Sequence[tuple[Item, str, bool]]) -> Conditioning:
    original, crops, target = [], [], []
    for item, _, flipped in samples:
        placed = item.placement
        left = placed.resize_w - placed.bucket_w - placed.crop_left if flipped else placed.crop_left
        original.append((item.example.height, item.example.width))
        crops.append((placed.crop_top, left))
        target.append((placed.bucket_h, placed.bucket_w))
    return Conditioning(torch.tensor(original), torch.tensor(crops), torch.tensor(target))
