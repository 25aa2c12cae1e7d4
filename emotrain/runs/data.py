"""The folders of a preset, scanned once: what is trained on, and what is held out by its own folder (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from emotrain.config.schema import Preset
from emotrain.dataset.scan import Scan, resolve_folder, scan
from emotrain.errors import DatasetError


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
