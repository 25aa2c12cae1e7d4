"""`--set section.key=value` on top of a preset's tree.

The value is a plain scalar, or YAML where it starts with a bracket or a quote. Paths are relative
current folder, as everywhere on a command line.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from emotrain.config import source
from emotrain.config.paths import resolve_paths
from emotrain.config.source import Node
from emotrain.config.words import child_of, is_place, merge, normalise
from emotrain.errors import ConfigError, Problem


def apply_override(root: Node, override: str) -> tuple[Node, list[Problem], list[str]]:
    """Set one value.

    Args:
        root: a whole preset's tree with absolute paths.
        override: `train.seed=1`; list items by their number, from 0: `dataset.folders.0.repeats=2`.

    Returns:
        The new tree, problems, notes on foreign words.

    Raises:
        ConfigError: it has not the form key=value.
    """
    key, node = _split(override)
    parts = key.split(".")
    if any(is_place(part) for part in parts):
        problems = _set_item(root, parts, node)
        resolve_paths(root, Path.cwd())  # the others are absolute already
        return root, problems, []
    for part in reversed(parts):
        node = Node({part: node}, node.source)
    tree, problems, notes = normalise(node)
    resolve_paths(tree, Path.cwd())
    return merge(root, tree), problems, notes


def _split(override: str) -> tuple[str, Node]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"--set {override}: this is not key=value", "e.g. `--set network.rank=8`")
    if key == "extends":
        raise ConfigError("--set extends: only a file can extend a preset")
    origin = f"--set {key}"
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        try:
            return key, replace(source.parse(text, origin)[0], line=None)
        except source.SourceError:
            pass  # such as `[trigger], portrait`: it is text
    return key, Node(source.resolve_scalar(text), origin, None, text)


def _set_item(root: Node, parts: list[str], node: Node) -> list[Problem]:
    """Set a value inside a list, in place: the list must hold that item already."""
    missing = [Problem(f"{node.source}: the preset has no such list or item")]
    at = root
    for part in parts[:-1]:
        inner = child_of(at, part)
        if inner is None:
            return missing
        at = inner
    last = parts[-1]
    if isinstance(at.value, dict):
        at.value[last] = node
    elif isinstance(at.value, list) and child_of(at, last) is not None:
        at.value[int(last)] = node
    else:
        return missing
    return []
