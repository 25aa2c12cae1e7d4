"""Every picture and text through the frozen encoders once, by way of the cache.

One text at a time, and on the CPU one picture: what an encoder gives for it then depends on it alone. A GPU may be
given several pictures of one size at once: the same to rounding. Reading and decoding run ahead in two threads.

Shape letters: H W height and width in pixels; C latent channels, h w latent height and width; S tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emotrain.dataset.buckets import Placement, place
from emotrain.dataset.cache import Cache, Tensors, content_key, narrow
from emotrain.dataset.examples import Example
from emotrain.dataset.images import (
    MAX_FILE_BYTES,
    Picture,
    decode_picture,
    load_mask,
    parse_background,
)
from emotrain.dataset.loader import DEFAULT_LIMIT, CachedDataset, Item, TextRows
from emotrain.dataset.settings import LoaderSettings
from emotrain.dataset.split import take_shard
from emotrain.dataset.textfile import FileProblem, printable, read_bytes
from emotrain.errors import DatasetError, ModelError, Problem

Progress = Callable[[str, int, int], None]  # phase ("pictures" or "captions"), done, total
AHEAD = 4  # pictures decoded before they are needed
MOST_WAITING = 32  # pictures decoded that wait for others of their size


class Encoder(Protocol):
    """What this room needs of a model family."""

    vae_scale: int
    pictures_at_once: int

    def encode_images(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in -1..1 -> latents float32 [B, C, h, w]."""

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Texts -> named embeddings, one row per text."""

    def vae_identity(self) -> str:
        """A digest of all that encode_images depends on."""

    def text_identity(self) -> str:
        """A digest of all that encode_texts depends on."""


@dataclass
class _Job:
    """One placement with what the cache knew of it; `None` is still to be made."""

    example: Example
    placement: Placement
    keys: dict[bool, str]  # flipped or not -> entry
    found: dict[bool, Tensor | None]
    mask: Tensor | None
    pixels: Tensor | None = None


def _silent(phase: str, done: int, total: int) -> None:
    pass


def prepare(
    family: Encoder,
    examples: Sequence[Example],
    settings: LoaderSettings,
    cache: Cache | None = None,
    progress: Progress = _silent,
    *,
    also_flipped: Collection[str] = (),
) -> CachedDataset:
    """Encode what the cache does not hold, and keep all of it in memory.

    Args:
        family: the encoders; not needed any more afterwards.
        examples: of `scan`, each id once; with `settings.shard`, only this machine's part is taken.
        settings: sizes, captions, batch size, seed.
        cache: default: `Cache()`.
        progress: told `(phase, done, total)`; phases are "pictures" and "captions".
        also_flipped: ids that are encoded flipped as well, besides those with `flip`.

    Raises:
        DatasetError: nothing to learn, or pictures that cannot be decoded or have changed.
        ModelError: an encoder gives numbers that are not finite.
    """
    cache = Cache() if cache is None else cache
    chosen = take_shard(examples, settings.shard)
    if not chosen:
        raise DatasetError("data set holds no pictures", "`emotrain lint` says what is in a folder")
    _check_ids(chosen)
    work = [
        (example, place(example.width, example.height, settings.rules))
        for example in sorted(chosen, key=lambda example: example.id)
    ]
    items = encode_pictures(
        family, work, also_flipped=also_flipped, background=settings.background, cache=cache, progress=progress
    )
    texts = {example.id: settings.texts(example) for example in chosen}
    rows: Mapping[str, Tensors] = {}
    if settings.encode_texts:
        every = {"", *(text for several in texts.values() for text in several)}
        if settings.class_word is not None:
            every |= {settings.class_text(example) for example in chosen}
        rows = encode_texts(family, every, cache=cache, progress=progress, limit=settings.text_memory)
    return CachedDataset(items, texts, rows, settings)


def _check_ids(examples: Sequence[Example]) -> None:
    """Two scans can give one id to different pictures; samples could then not be told apart."""
    twice = [name for name, count in Counter(example.id for example in examples).items() if count > 1]
    if twice:
        reason = f"two pictures have the id {twice[0]}"
        raise DatasetError(reason, "give the folders of the data set and of validate different names")


def encode_pictures(
    encoder: Encoder,
    work: Sequence[tuple[Example, tuple[Placement, ...]]],
    *,
    also_flipped: Collection[str],
    background: str,
    cache: Cache,
    progress: Progress,
) -> list[Item]:
    """All placements of all pictures, in order; with `flip` or in `also_flipped`, flipped as well.

    Raises:
        DatasetError: pictures that cannot be decoded or have changed since the scan; `problems`
            names all.
        ModelError: the VAE gives numbers that are not finite.
    """
    reader = _Reader(encoder.vae_scale, encoder.vae_identity(), frozenset(also_flipped), background, cache)
    jobs: list[_Job] = []
    waiting = _Waiting(encoder, cache)
    problems: list[Problem] = []
    for done, future in enumerate(_run_ahead(reader.read, work), start=1):
        try:
            found = future.result()
        except FileProblem as problem:
            problems.append(Problem(problem.message, problem.hint))
            found = []
        for job in found if not problems else ():
            waiting.add(job)
            jobs.append(job)
        progress("pictures", done, len(work))
    if problems:
        raise DatasetError(problems[0].message, problems[0].hint, problems=tuple(problems))
    waiting.encode_all()
    return [_item(job) for job in jobs]


def encode_texts(
    encoder: Encoder,
    texts: Iterable[str],
    *,
    cache: Cache,
    progress: Progress,
    limit: int = DEFAULT_LIMIT,
) -> TextRows:
    """Embeddings per text, without the batch axis; 16-bit where that loses nothing.

    `limit` bytes of them are held in memory, the rest stays in the cache.

    Raises:
        ModelError: a text encoder gives numbers that are not finite.
    """
    identity = encoder.text_identity()
    unique = sorted(set(texts))
    rows = TextRows(cache, limit)
    for done, text in enumerate(unique, start=1):
        key = content_key(text=text, encoder=identity)
        rows.add(text, key, cache.lookup("texts", key, partial(_encode_text, encoder, text)))
        progress("captions", done, len(unique))
    return rows


def _encode_text(encoder: Encoder, text: str) -> Tensors:
    with torch.no_grad():
        embeds = encoder.encode_texts([text])
    rows = {name: narrow(rows[0].detach().cpu().clone()) for name, rows in embeds.items()}
    if not all(bool(row.isfinite().all()) for row in rows.values() if row.is_floating_point()):
        hint = "set model.dtype to fp32"
        raise ModelError(f"text encoder gives numbers that are not finite for `{printable(text)}`", hint)
    return rows


class _Waiting:
    """Decoded pictures until there are enough of one size to encode them together."""

    def __init__(self, encoder: Encoder, cache: Cache) -> None:
        self.encoder, self.cache = encoder, cache
        self.by_size: dict[torch.Size, list[tuple[_Job, bool]]] = {}

    def add(self, job: _Job) -> None:
        """Take what a job still lacks, and encode what is enough."""
        lacking = [flipped for flipped, known in job.found.items() if known is None]
        for flipped in lacking:
            assert job.pixels is not None
            same = self.by_size.setdefault(job.pixels.shape, [])
            same.append((job, flipped))
            if len(same) >= self.encoder.pictures_at_once:
                self._encode(job.pixels.shape)
        if not lacking:
            job.pixels = None
        if sum(map(len, self.by_size.values())) > MOST_WAITING:
            self._encode(max(self.by_size, key=lambda size: len(self.by_size[size])))

    def encode_all(self) -> None:
        """Encode all that still waits."""
        for size in list(self.by_size):
            self._encode(size)

    def _encode(self, size: torch.Size) -> None:
        asked = self.by_size.pop(size)
        pixels = [job.pixels.flip(-1) if flipped else job.pixels for job, flipped in asked if job.pixels is not None]
        with torch.no_grad():
            made = self.encoder.encode_images(torch.stack(pixels)).detach().cpu().float()
        for (job, flipped), latents in zip(asked, made, strict=True):
            if not bool(latents.isfinite().all()):
                hint = "set model.dtype to fp32, or model.vae to one made for fp16"
                raise ModelError(f"VAE gives numbers that are not finite for {job.example.id}", hint)
            job.found[flipped] = latents.clone()
            self.cache.put("latents", job.keys[flipped], {"latents": latents})
            if None not in job.found.values():
                job.pixels = None


def _item(job: _Job) -> Item:
    upright, mask = job.found[False], job.mask
    assert upright is not None
    if mask is not None and bool((mask == 1.0).all()):
        mask = None
    return Item(job.example, job.placement, upright, job.found.get(True), mask)


@dataclass(frozen=True)
class _Reader:
    """Looks a picture up in the cache, and decodes it where anything is missing."""

    vae_scale: int
    vae_identity: str
    also_flipped: frozenset[str]
    background: str
    cache: Cache

    def read(self, example: Example, placements: Sequence[Placement]) -> list[_Job]:
        sides = [False, True] if example.flip or example.id in self.also_flipped else [False]
        jobs = []
        picture: Picture | None = None
        for placement in placements:
            keys = {side: self._latents_key(example, placement, side) for side in sides}
            found = {side: _only(self.cache.get("latents", key), "latents") for side, key in keys.items()}
            job = _Job(example, placement, keys, found, None)
            mask_key = self._mask_key(example, placement)
            if mask_key is not None:
                job.mask = _only(self.cache.get("masks", mask_key), "mask")
            if None in found.values() or (mask_key is not None and job.mask is None):
                picture = picture or self._decode(example)
                job.pixels = to_pixels(picture.image, placement)
            if mask_key is not None and job.mask is None and picture is not None:
                job.mask = self._make_mask(example, placement, picture)
                self.cache.put("masks", mask_key, {"mask": job.mask})
            jobs.append(job)
        return jobs

    def _decode(self, example: Example) -> Picture:
        data = read_bytes(example.path, limit=MAX_FILE_BYTES)
        if hashlib.sha256(data).hexdigest() != example.sha256:
            reason = "has changed since the data set was read"
            raise FileProblem("changed", example.path, reason, "start again")
        return decode_picture(data, background=self.background, path=example.path)

    def _make_mask(self, example: Example, placement: Placement, picture: Picture) -> Tensor:
        if example.mask == "alpha":
            mask = picture.alpha or Image.new("L", picture.image.size, 255)
        else:
            assert example.mask is not None
            mask = load_mask(example.mask)
        return to_mask(mask, placement, self.vae_scale)

    def _latents_key(self, example: Example, placement: Placement, flipped: bool) -> str:
        return content_key(
            picture=example.sha256,
            place=_numbers(placement),
            mirrored=flipped,
            background=parse_background(self.background),
            vae=self.vae_identity,
        )

    def _mask_key(self, example: Example, placement: Placement) -> str | None:
        if example.mask is None:
            return None
        source = "alpha"
        if example.mask != "alpha":
            source = hashlib.sha256(read_bytes(example.mask, limit=MAX_FILE_BYTES)).hexdigest()
        place = _numbers(placement)
        return content_key(picture=example.sha256, mask=source, place=place, vae_scale=self.vae_scale)


def _numbers(placement: Placement) -> list[int]:
    place = placement
    return [
        place.bucket_w, place.bucket_h, place.resize_w, place.resize_h,
        place.crop_left, place.crop_top,
    ]  # fmt: skip


def _only(entry: Tensors | None, name: str) -> Tensor | None:
    return None if entry is None else entry.get(name)


def _run_ahead(
    read: Callable[[Example, Sequence[Placement]], list[_Job]],
    work: Sequence[tuple[Example, tuple[Placement, ...]]],
) -> Iterator[Future[list[_Job]]]:
    """Results in order, a few of them worked on before they are asked for."""
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="emotrain-read") as pool:
        pending: deque[Future[list[_Job]]] = deque()
        for example, placements in work:
            pending.append(pool.submit(read, example, placements))
            if len(pending) > AHEAD:
                yield pending.popleft()
        while pending:
            yield pending.popleft()


def to_pixels(image: Image.Image, placement: Placement) -> Tensor:
    """An RGB picture scaled (Lanczos) and cut as placed: float32 [3, H, W] in -1..1."""
    values = np.asarray(_placed(image, placement, Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(values / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def to_mask(mask: Image.Image, placement: Placement, vae_scale: int) -> Tensor:
    """A gray mask of the whole picture as the weight of each latent: float32 [1, h, w] in 0..1.

    The mask is stretched to the picture where their sizes differ; a latent's weight is the mean of
    its pixels.
    """
    placed = _placed(mask.convert("L"), placement, Image.Resampling.BOX)
    size = (placement.bucket_w // vae_scale, placement.bucket_h // vae_scale)
    values = np.asarray(placed.resize(size, Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(values / 255.0)[None]


def _placed(image: Image.Image, placement: Placement, resampling: Image.Resampling) -> Image.Image:
    size = (placement.resize_w, placement.resize_h)
    if image.size != size:
        image = image.resize(size, resampling)
    left, top = placement.crop_left, placement.crop_top
    return image.crop((left, top, left + placement.bucket_w, top + placement.bucket_h))
