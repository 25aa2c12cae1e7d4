"""One data folder: each entry is an example, belongs to one, or is skipped (no torch)."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from emotrain.config.schema import Folder
from emotrain.dataset.examples import CaptionSource, Example, Skipped
from emotrain.dataset.images import MAX_FILE_BYTES, SUFFIXES, Note, read_header
from emotrain.dataset.metadata import METADATA, Listing, read_listing
from emotrain.dataset.textfile import FileProblem, clean_lines, printable, read_bytes, read_captions
from emotrain.dataset.walk import UNREAD, Entry, inside, stem_key

NOT_READ = frozenset(
    (
        *(".heic", ".heif", ".jxl", ".jp2", ".psd", ".psb", ".xcf", ".svg", ".eps", ".ai", ".raw"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".tga", ".exr", ".hdr", ".ico"),
        *(".pdf", ".mp4", ".mov", ".webm", ".mkv", ".avi"),
    )
)
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

    def read(self, entries: Sequence[Entry], tell: Callable[[], None]) -> None:
        """Sort the entries, then read every picture; `tell` is called after each."""
        pictures, texts, listings = self._sort(entries)
        listing = self._read_listings(listings)
        by_key: dict[Key, list[Entry]] = defaultdict(list)
        for entry in pictures:
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
        present = {entry.parts for entry in entries}
        self.listed_missing += [self.root.joinpath(*parts) for parts in listing if parts not in present]

    def _sort(self, entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry], list[Entry]]:
        pictures: list[Entry] = []
        texts: list[Entry] = []
        listings: list[Entry] = []
        for entry in entries:
            suffix = entry.path.suffix.lower()
            if entry.problem is not None:
                reason = UNREAD.get(entry.problem) or f"cannot be read ({entry.detail})"
                error = suffix in SUFFIXES or entry.problem == "unreadable"
                self._skip(entry, entry.problem, reason, "error" if error else "warning")
            elif entry.path.name.lower() == METADATA:
                listings.append(entry)
            elif suffix in SUFFIXES:
                pictures.append(entry)
            elif suffix in self.caption_suffixes:
                texts.append(entry)
            elif suffix in NOT_READ:
                self._skip(
                    entry,
                    "unsupported",
                    f"is a {suffix} file, which is not read: convert it to PNG or JPEG",
                    "warning",
                )
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
        for entry in sorted(texts, key=lambda text: self.caption_suffixes.index(text.path.suffix.lower())):
            key = stem_key(entry.parts)
            if key not in pictures:
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
                captions = read_captions(text.path)
            except FileProblem as problem:
                code = problem.code if problem.code.startswith("caption-") else f"caption-{problem.code}"
                name = printable(text.path.name)
                reason = f"has a caption that cannot be used: {name} {problem.reason}"
                raise FileProblem(code, entry.path, reason, problem.hint) from problem
            notes = (
                () if captions else (Note("caption-empty", f"has an empty caption file, {printable(text.path.name)}"),)
            )
            return captions or ("",), "file", text.path, notes
        if listing.get(entry.parts):
            return listing[entry.parts], "metadata", None, ()
        if self.spec.caption is not None:
            return (name_in_words(self.spec.caption, entry),), "folder", None, ()
        if self.default_caption is not None:
            return (name_in_words(self.default_caption, entry),), "default", None, ()
        return ("",), "none", None, (Note("caption-missing", "has no caption"),)

    def _mask(self, entry: Entry) -> tuple[Path | Literal["alpha"] | None, tuple[Note, ...]]:
        if self.masks is None or self.masks == "alpha":
            return self.masks, ()
        key = stem_key(entry.parts)
        mask = self.masks.get(key) or self.masks.get(key[-1:])
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
        severity: Literal["error", "warning", "info"],
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


def index_masks(entries: Sequence[Entry]) -> Iterator[tuple[Key, Path]]:
    """Mask pictures by the stem that they share with their picture."""
    for entry in entries:
        if entry.problem is None and entry.path.suffix.lower() in SUFFIXES:
            yield stem_key(entry.parts), entry.path
