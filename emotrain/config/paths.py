"""Paths in a preset.

Paths are relative to the file they stand in; `~` is the home folder; `$NAME` and `%NAME%` stay as
they are, so that a preset means the same thing to everybody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from emotrain.config.builtin import is_builtin
from emotrain.config.source import Node
from emotrain.config.words import as_mapping

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
MODEL_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_FILE_ENDINGS = (*MODEL_FILES, ".yaml", ".json")


def absolute(text: str, folder: Path) -> str:
    """A path as an absolute one, without touching the disk; `builtin:` names and "" stay."""
    if not text or is_builtin(text) or _DRIVE.match(text):
        return text
    if text == "~" or text.startswith(("~/", "~\\")):
        return os.path.normpath(os.path.expanduser(text))
    return os.path.normpath(os.path.join(os.path.abspath(folder), text))


def model_or_hub(text: str, folder: Path) -> str:
    """As `absolute`, but `organisation/name` is a hub id unless such a path exists."""
    clear = text.startswith((".", "~", "/")) or "\\" in text
    if not clear and HUB_ID.fullmatch(text) and not text.lower().endswith(_FILE_ENDINGS):
        path = absolute(text, folder)
        return path if os.path.exists(path) else text
    return absolute(text, folder)


def run_or_file(text: str, folder: Path) -> str:
    """As `absolute`, but a bare word is a run's name unless such a file, or a run in such a folder, exists.

    The pictures of a run `mika` mostly lie in a folder `mika`.
    """
    path = absolute(text, folder)
    bare = not set(text) & set("/\\~") and not text.lower().endswith(_FILE_ENDINGS)
    return text if bare and not (os.path.isfile(path) or os.path.isfile(os.path.join(path, "run.json"))) else path


def folder_names(paths: Sequence[str | Path], taken: Sequence[str] = ()) -> list[str]:
    """A name per folder: its own, with #2, #3 where several share one (those in `taken` too)."""
    seen, names = list(taken), []
    for path in paths:
        text = str(path)
        name = text.rpartition(":")[2] if is_builtin(text) else Path(text).expanduser().resolve().name
        count = seen.count(name)
        seen.append(name)
        names.append(f"{name or 'data'}#{count + 1}" if count else name or "data")
    return names


def resolve_paths(root: Node, folder: Path) -> None:
    """Make the paths of one file's tree absolute, in place; they are relative to `folder`."""
    top = as_mapping(root)

    def change(children: dict[str, Node], key: str, how: object) -> None:
        node = children.get(key)
        if node is not None and isinstance(node.value, str):
            children[key] = replace(node, value=how(node.value, folder))  # type: ignore[operator]

    change(as_mapping(top.get("model")), "base", model_or_hub)
    change(as_mapping(top.get("model")), "vae", model_or_hub)
    change(as_mapping(top.get("model")), "text_encoder", absolute)
    change(as_mapping(top.get("model")), "tokenizer", absolute)
    change(as_mapping(top.get("sample")), "base", model_or_hub)
    change(as_mapping(top.get("validate")), "folder", absolute)
    change(as_mapping(top.get("validate")), "likeness", absolute)
    change(as_mapping(top.get("start_from")), "continue", run_or_file)
    for section, key, how in (("dataset", "folders", absolute), ("start_from", "stack", run_or_file)):
        items = as_mapping(top.get(section)).get(key)
        for item in items.value if items is not None and isinstance(items.value, list) else ():
            change(as_mapping(item), "path", how)
            mask = as_mapping(item).get("mask")
            if mask is not None and mask.value != "alpha":
                change(as_mapping(item), "mask", absolute)
