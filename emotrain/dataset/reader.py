"""One data folder: each entry is an example, belongs to one, or is skipped (no torch)."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from emotrain.config.schema import Folder
from emotrain.dataset.examples import CaptionSource, Example, Severity, Skipped
from emotrain.dataset.images import MAX_FILE_BYTES, SUFFIXES, Note, read_header
from emotrain.dataset.metadata import METADATA, Listing, read_listing, read_sidecar
from emotrain.dataset.textfile import FileProblem, clean_lines, printable, read_bytes, read_captions
from emotrain.dataset.walk import UNREAD, Entry, composed, inside, stem_key

NOT_READ = frozenset(
    (
        *(".heic", ".heif", ".jxl", ".jp2", ".psd", ".psb", ".xcf", ".svg", ".eps", ".ai", ".raw"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".tga", ".exr", ".hdr", ".ico"),
        ".pdf",
    )
)
VIDEOS = frozenset((".mp4", ".mov", ".webm", ".mkv", ".avi"))
FRAMES = "save the frames that you want to train on as pictures"
SIDECAR = ".json"
MASK_ENDINGS = ("-masklabel", "_mask", "-mask")
MASK_NAMES = "a mask is named like its picture: cat.png, cat_mask.png or cat-masklabel.png for cat.jpg"
Key = tuple[str, ...]
Found = tuple[tuple[str, ...], CaptionSource, Path | None, tuple[Note, ...]]


@dataclass
class FolderReader:
    """Reads one folder's entries; the results gather in its fields."""

    spec: Folder
    root: Path
    name: str  # first part of its examples' ids
    index: int
    caption_suffixes: Sequence[str]  # the first found is the caption
    default_caption: str | None
    masks: dict[Key, Path] | Literal["alpha"] | None
    examples: list[Example] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    captions: int = 0
    listings: int = 0
    listed_missing: list[Path] = field(default_factory=list)
    used_masks: set[Path] = field(default_factory=set)

    def read(self, entries: Sequence[Entry], tell: Callable[[], None]) -> None:
        """Sort the entries, then read every picture; `tell` is called after each."""
        pictures, texts, listings = self._sort(entries)
        listing = self._read_listings(listings)
        by_key: dict[Key, list[Entry]] = defaultdict(list)
        for entry in self._without_masks(pictures):
            by_key[stem_key(entry.parts)].append(entry)
        caption_files = self._choose_captions(texts, by_key)
        for key, twins in by_key.items():
            text = caption_files.get(key)
            for entry in twins:
                if text is not None and len(twins) > 1:
                    self._ambiguous(entry, twins, text)
                else:
                    self._read_picture(entry, text, listing)
                tell()
        if isinstance(self.masks, dict):
            for path in sorted(set(self.masks.values()) - self.used_masks):
                reason = "is a mask without a picture of its name"
                self.skipped.append(Skipped(path, "unused-mask", reason, "warning", MASK_NAMES, self.index))
        present = {entry.parts for entry in entries}
        self.listed_missing += [self.root.joinpath(*parts) for parts in listing if parts not in present]

    def _without_masks(self, pictures: Sequence[Entry]) -> list[Entry]:
        """The pictures without those that are masks of others by their name (`cat-masklabel.png` of `cat.png`)."""
        keys = {composed(stem_key(entry.parts)) for entry in pictures}
        masks = {
            composed(stem_key(entry.parts)): entry.path
            for entry in pictures
            if entry.path.stem.endswith(MASK_ENDINGS[0]) and mask_key(entry.parts) in keys
        }
        if not masks:
            return list(pictures)
        if self.masks is None:
            self.masks = {(*key[:-1], key[-1].removesuffix(MASK_ENDINGS[0])): path for key, path in masks.items()}
        return [entry for entry in pictures if composed(stem_key(entry.parts)) not in masks]

    def _sort(self, entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry], list[Entry]]:
        pictures: list[Entry] = []
        texts: list[Entry] = []
        listings: list[Entry] = []
        for entry in entries:
            suffix = entry.path.suffix.lower()
            if entry.problem is not None:
                reason = UNREAD.get(entry.problem) or f"cannot be read ({entry.detail})"
                error = suffix in SUFFIXES or entry.problem == "unreadable"
                severity: Severity = "info" if entry.problem == "run-folder" else "error" if error else "warning"
                self._skip(entry, entry.problem, reason, severity)
            elif not entry.repeats:
                hint = "name the folder 1_... to use it"
                self._skip(entry, "zero-repeats", "lies in a folder that is named 0_: left out", "warning", hint)
            elif entry.path.name.lower() in METADATA:
                listings.append(entry)
            elif suffix in SUFFIXES:
                pictures.append(entry)
            elif suffix in (*self.caption_suffixes, SIDECAR):
                texts.append(entry)
            elif suffix in VIDEOS:
                self._skip(entry, "unsupported", f"is a video ({suffix}), which is not read", "warning", FRAMES)
            elif suffix in NOT_READ:
                reason = f"is a {suffix} file, which is not read: convert it to PNG or JPEG"
                self._skip(entry, "unsupported", reason, "warning")
            else:
                self._skip(entry, "other-file", "is neither a picture nor a caption", "info")
        return pictures, texts, listings

    def _read_listings(self, entries: Sequence[Entry]) -> Listing:
        listing: Listing = {}
        for entry in entries:
            try:
                self._refuse_foreign(entry)
                listing.update(read_listing(entry.path, entry.parts[:-1]))
                self.listings += 1
            except FileProblem as problem:
                self._skip(entry, "metadata", problem.reason, "error", problem.hint)
        return listing

    def _choose_captions(self, texts: Sequence[Entry], pictures: dict[Key, list[Entry]]) -> dict[Key, Entry]:
        chosen: dict[Key, Entry] = {}
        order = (*self.caption_suffixes, SIDECAR)
        folded: dict[Key, list[Key]] = defaultdict(list)
        for key in pictures:
            folded[_folded(key)].append(key)
        for entry in sorted(texts, key=lambda text: order.index(text.path.suffix.lower())):
            key = picture_key(entry.parts, pictures, folded)
            if key not in pictures and entry.path.suffix.lower() == SIDECAR:
                self._skip(entry, "other-file", "is neither a picture nor a caption", "info")
            elif key not in pictures:
                self._skip(entry, "orphan-caption", "is a caption without a picture of its name", "warning")
            elif key in chosen:
                self._skip(
                    entry,
                    "second-caption",
                    f"is not used: {printable(chosen[key].path.name)} is the caption",
                    "warning",
                )
            else:
                chosen[key] = entry
                self.captions += 1
        return chosen

    def _ambiguous(self, entry: Entry, twins: Sequence[Entry], text: Entry) -> None:
        others = ", ".join(printable(other.path.name) for other in twins if other is not entry)
        reason = f"shares the caption {printable(text.path.name)} with {others}"
        self._skip(
            entry,
            "ambiguous-caption",
            reason,
            "error",
            "keep one of them, or rename one and its caption",
        )

    def _read_picture(self, entry: Entry, text: Entry | None, listing: Listing) -> None:
        try:
            data = read_bytes(entry.path, limit=MAX_FILE_BYTES)
            header = read_header(data, path=entry.path)
            captions, source, caption_path, notes = self._caption(entry, text, listing)
        except FileProblem as problem:
            self._skip(entry, problem.code, problem.reason, "error", problem.hint)
            return
        mask, mask_notes = self._mask(entry)
        self.examples.append(
            Example(
                id="/".join(printable(part) for part in (self.name, *entry.parts)),
                path=entry.path,
                width=header.width,
                height=header.height,
                captions=captions,
                sha256=hashlib.sha256(data).hexdigest(),
                file_size=len(data),
                repeats=self.spec.repeats * entry.repeats,
                flip=self.spec.flip,
                mask=mask,
                weight=1.0 if self.spec.prior is None else self.spec.prior,
                prior=self.spec.prior is not None,
                folder=self.index,
                caption_source=source,
                caption_path=caption_path,
                notes=header.notes + notes + mask_notes,
            )
        )

    def _caption(self, entry: Entry, text: Entry | None, listing: Listing) -> Found:
        if text is not None:
            try:
                self._refuse_foreign(text)
                captions, lines = self._read_text(text)
            except FileProblem as problem:
                code = problem.code if problem.code.startswith("caption-") else f"caption-{problem.code}"
                name = printable(text.path.name)
                reason = f"has a caption that cannot be used: {name} {problem.reason}"
                raise FileProblem(code, entry.path, reason, problem.hint) from problem
            notes: tuple[Note, ...] = ()
            if not captions:
                notes = (Note("caption-empty", f"has an empty caption file, {printable(text.path.name)}"),)
            elif lines:
                notes = (Note("caption-lines", f"has a caption of {lines} lines: joined into one"),)
            return captions or ("",), "file", text.path, notes
        if listing.get(entry.parts):
            return listing[entry.parts], "metadata", None, ()
        if self.spec.caption is not None:
            return (name_in_words(self.spec.caption, entry),), "folder", None, ()
        if self.default_caption is not None:
            return (name_in_words(self.default_caption, entry),), "default", None, ()
        return ("",), "none", None, (Note("caption-missing", "has no caption"),)

    @staticmethod
    def _read_text(text: Entry) -> tuple[tuple[str, ...], int]:
        """Captions of a caption file, and how many lines were joined."""
        if text.path.suffix.lower() == SIDECAR:
            return read_sidecar(text.path), 0
        return read_captions(text.path)

    def _mask(self, entry: Entry) -> tuple[Path | Literal["alpha"] | None, tuple[Note, ...]]:
        if self.masks is None or self.masks == "alpha":
            return self.masks, ()
        key = composed(stem_key(entry.parts))
        mask = self.masks.get(key) or self.masks.get(key[-1:])
        if mask:
            self.used_masks.add(mask)
        return mask, () if mask else (Note("mask-missing", "has no mask: all of it is learned"),)

    def _refuse_foreign(self, entry: Entry) -> None:
        """Captions end up in LoRA files, so a link must not fetch them from elsewhere."""
        if entry.is_link and not inside(entry.path, self.root):
            raise FileProblem(
                "caption-link",
                entry.path,
                "is a link out of the data folder",
                "copy the file into the folder",
            )

    def _skip(
        self,
        entry: Entry,
        code: str,
        reason: str,
        severity: Severity,
        hint: str | None = None,
    ) -> None:
        self.skipped.append(Skipped(entry.path, code, reason, severity, hint, self.index))


def name_in_words(caption: str, entry: Entry) -> str:
    """`[name]` becomes the file name in words: "red_car-02 (1).png" gives "red car"."""
    if "[name]" not in caption:
        return caption
    words = re.sub(r"[_\-\s]+", " ", entry.path.stem)
    words = re.sub(r"(\s*\(\d+\)|\s+\d+)+\s*$", "", words)
    return caption.replace("[name]", " ".join(clean_lines(words)))


def picture_key(parts: Key, pictures: Mapping[Key, object], folded: Mapping[Key, Sequence[Key]]) -> Key:
    """The picture that a caption file belongs to.

    The same stem; else the same in Unicode's NFC; else `a.png.txt`; else the same but for capitals. Only where one
    picture alone can be meant.
    """
    key = stem_key(parts)
    if key in pictures:
        return key
    stem, suffix = os.path.splitext(key[-1])
    for wanted in (key, (*key[:-1], stem)) if suffix.lower() in SUFFIXES else (key,):
        if wanted in pictures:
            return wanted
        near = folded.get(_folded(wanted), ())
        same = [other for other in near if composed(other) == composed(wanted)]
        if len(same or near) == 1:
            return (same or near)[0]
    return key


def _folded(key: Key) -> Key:
    return tuple(part.casefold() for part in composed(key))


def mask_key(parts: Key) -> Key:
    """The stem of the picture that a mask belongs to: `cat-masklabel.png` and `cat_mask.png` are of `cat.jpg`."""
    key = composed(stem_key(parts))
    ending = next((ending for ending in MASK_ENDINGS if key[-1].endswith(ending)), "")
    return (*key[:-1], key[-1].removesuffix(ending))


def index_masks(entries: Sequence[Entry]) -> Iterator[tuple[Key, Path]]:
    """Mask pictures by the stem that they share with their picture; a name without an ending goes first."""
    masks = [entry for entry in entries if entry.problem is None and entry.path.suffix.lower() in SUFFIXES]
    for entry in sorted(masks, key=lambda entry: mask_key(entry.parts) == composed(stem_key(entry.parts))):
        yield mask_key(entry.parts), entry.path
