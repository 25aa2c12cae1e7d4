"""What lies in the data folders: examples, and every other file with its reason (no torch).

The rules:
  * Folders are read with all their subfolders. A subfolder named `N_name` (N up to 999) sees its
    pictures N times an epoch, times the folder's own `repeats`; the nearest such name counts.
  * A folder that is listed by itself, or holds masks, is not part of the folder around it.
  * Hidden and system files are left out silently and counted. Links to folders are not followed;
    links to pictures are.
  * A picture's caption is, first found: the same-stem `.txt` (or the configured extension), the
    same-stem `.caption` or `.json`, its line in a `metadata.jsonl` or `metadata.csv` at or above it
    (`file_name`, `text`), the folder's `caption`, `captions.default`, nothing. The lines of a caption
    file are one caption; a line `%%%` begins another one. Names match in Unicode's NFC, else as
    `a.png.txt`, else but for capitals. `[name]` in a folder's caption or in the default stands for
    the file name in words.
  * A folder that holds a run of emotrain is left out, and so is one named `0_name`.
  * `cat-masklabel.png` beside `cat.png` is its mask.
  * Two pictures of one stem cannot share a caption file: neither is used.
Nothing is written into the folders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from emotrain import assets
from emotrain.config.builtin import DATASETS, check_name
from emotrain.config.paths import folder_names
from emotrain.config.schema import Folder as FolderSpec
from emotrain.dataset.examples import Example, Scan, Skipped
from emotrain.dataset.images import SUFFIXES
from emotrain.dataset.reader import FolderReader, index_masks
from emotrain.dataset.textfile import printable
from emotrain.dataset.walk import walk
from emotrain.errors import DatasetError, Problem

__all__ = ["Example", "FolderSpec", "Scan", "Skipped", "require_pictures", "resolve_folder", "scan"]


def resolve_folder(path: str) -> Path:
    """A folder's place on disk; `builtin:example` and `builtin:example-heldout` come with emotrain.

    Raises:
        ConfigError: an unknown `builtin:` name.
    """
    if not path.startswith("builtin:"):
        return Path(path).expanduser()
    check_name(path, DATASETS, "data set")
    return Path(next(iter(assets.__path__))) / path.removeprefix("builtin:")


def scan(
    folders: Sequence[FolderSpec],
    *,
    caption_extension: str = ".txt",
    default_caption: str | None = None,
    leave_out: Sequence[Path] = (),
    beside: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Read all folders; `progress(done, total)` is told of every picture.

    Only headers are read: damage further in shows when pictures are decoded, in lint or `prepare`. Folders in
    `leave_out` are not entered; ids do not meet those of a scan of the folders in `beside`.

    Raises:
        DatasetError: a folder is missing, no folder or listed twice; `problems` names all of these.
        ConfigError: an unknown `builtin:` name.
    """
    roots = tuple(resolve_folder(folder.path) for folder in folders)
    mask_roots = [
        Path(folder.mask).expanduser() for folder in folders if folder.mask not in (None, "alpha") and folder.mask
    ]
    _check_folders(roots, mask_roots)
    apart = (*roots, *mask_roots, *leave_out)
    trees = [walk(root, leave_out=[other for other in apart if other != root]) for root in roots]
    total = sum(entry.path.suffix.lower() in SUFFIXES for tree in trees for entry in tree.entries)
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    readers = []
    names = folder_names(roots, [other.resolve().name for other in beside])
    for index, (folder, root, name) in enumerate(zip(folders, roots, names, strict=True)):
        reader = FolderReader(folder, root, name, index, _suffixes(caption_extension), default_caption, _masks(folder))
        reader.read(trees[index].entries, tell)
        readers.append(reader)
    return Scan(
        examples=_with_unique_ids([example for reader in readers for example in reader.examples]),
        skipped=tuple(item for reader in readers for item in reader.skipped),
        captions=sum(reader.captions for reader in readers),
        listings=sum(reader.listings for reader in readers),
        hidden=sum(tree.hidden for tree in trees),
        files=sum(len(tree.entries) + tree.hidden for tree in trees),
        listed_missing=tuple(path for reader in readers for path in reader.listed_missing),
        folders=roots,
    )


def require_pictures(found: Scan) -> Scan:
    """`found`, if there is anything to learn in it.

    Raises:
        DatasetError: no usable picture; says what became of every file.
    """
    if any(not example.prior for example in found.examples):
        return found
    where = ", ".join(printable(folder) for folder in found.folders)
    problems = [Problem(f"{printable(item.path)} {item.reason}", item.hint) for item in found.errors()[:20]]
    first = Problem(
        f"no usable picture in {where} ({found.totals()})",
        "`emotrain lint` says what is wrong with each file",
    )
    if found.examples:
        first = Problem(
            f"all {len(found.examples)} pictures in {where} are regularisation pictures (`prior`): nothing to learn",
            "add the folder with the pictures that the LoRA is to learn",
        )
    raise DatasetError(first.message, first.hint, problems=(first, *problems))


def _check_folders(roots: Sequence[Path], mask_roots: Sequence[Path]) -> None:
    problems = []
    seen: set[Path] = set()
    for root in (*roots, *mask_roots):
        if not root.exists():
            problems.append(Problem(f"{printable(root)} does not exist", "paths are relative to the preset's file"))
        elif not root.is_dir():
            problems.append(Problem(f"{printable(root)} is not a folder", "name the folder that holds the pictures"))
    own = {root.resolve() for root in roots}
    for root in mask_roots:
        if root.resolve() in own:
            problems.append(
                Problem(
                    f"{printable(root)} is the mask folder of the pictures in it: each would mask itself",
                    "keep masks in a folder of their own, or name them cat-masklabel.png beside cat.png without `mask`",
                )
            )
    for root in roots:
        if root.resolve() in seen:
            problems.append(
                Problem(
                    f"{printable(root)} is listed twice in dataset.folders",
                    "use `repeats` to see it more often",
                )
            )
        seen.add(root.resolve())
    if problems:
        raise DatasetError(problems[0].message, problems[0].hint, problems=tuple(problems))


def _suffixes(extension: str) -> tuple[str, ...]:
    suffix = "." + extension.lower().lstrip(".")
    return (suffix, ".caption") if suffix == ".txt" else (suffix,)


def _masks(folder: FolderSpec) -> dict[tuple[str, ...], Path] | Literal["alpha"] | None:
    if folder.mask is None or folder.mask == "alpha":
        return "alpha" if folder.mask else None
    return dict(index_masks(walk(Path(folder.mask).expanduser()).entries))


def _with_unique_ids(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Escaped names can meet (bytes that are no UTF-8, and a name that spells their escape)."""
    seen: dict[str, int] = {}
    unique = []
    for example in examples:
        count = seen[example.id] = seen.get(example.id, 0) + 1
        unique.append(example if count == 1 else replace(example, id=f"{example.id}#{count}"))
    return tuple(unique)
