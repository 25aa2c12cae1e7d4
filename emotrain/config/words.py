"""Words from other trainers, and short ways to write a preset, brought to the preset's own keys.

`normalise` works on the tree of one file before anything is merged, so that an alias in a preset
overrides the own word in the preset it extends. Every translation of a foreign word leaves a note.
"""

from __future__ import annotations

from dataclasses import replace

from emotrain.config.aliases import (
    FOLDER_WORDS,
    INSIDE,
    NESTED,
    ONE_FOLDER,
    OPTIMIZER_WORDS,
    TOP,
)
from emotrain.config.schema import Preset
from emotrain.config.source import MAX_DIGITS, Node
from emotrain.errors import Problem

# Own ways to write less: no note.
QUIET = {*(("dataset", word) for word in ONE_FOLDER), ("dataset", "folder")}
# A word in place of the whole section.
SHORTHAND = {"model": "base", "stop": "mode"}
LISTS = (("dataset", "resolution"), ("dataset", "folders"), ("sample", "prompts"), ("sample", "strengths"),
         ("start_from", "stack"))  # fmt: skip
SECTIONS = {field.alias or name for name, field in Preset.model_fields.items()} - {"name"}

Path = tuple[str, ...]


class _Tree:
    """One file's preset while it is brought into shape."""

    def __init__(self, root: Node) -> None:
        self.root = Node({}, root.source, root.line)
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def put(self, path: Path, node: Node, word: str, *, foreign: bool = False) -> None:
        """Set a value by its full path; `word` is the key as the file has it."""
        children: dict[str, Node] | None = as_mapping(self.root)
        for part in path[:-1]:
            children = self._enter(children, part, node)
        if children is None or path[-1] in children:
            other = self._nearest(path)
            both = f"`{word}` and line {other.line} both set `{_shown(path)}`"
            self.problems.append(Problem(f"{node.where}: {both}", "keep one of them"))
            return
        children[path[-1]] = node
        if foreign:
            self.notes.append(f"{node.where}: `{word}` is read as `{_shown(path)}`")

    def _enter(self, children: dict[str, Node] | None, part: str, node: Node) -> dict[str, Node] | None:
        """The mapping under `part`, made if it is not there; None where something else stands."""
        if children is None or part == "0":
            return children
        if part == "folders":  # of the one folder that is written without a list
            item = Node({}, node.source, node.line)
            made = Node([item], node.source, node.line, text="made")
            there = children.setdefault(part, made)
            if there.text != "made" or not isinstance(there.value, list):
                return None
            return as_mapping(there.value[0])
        value = children.setdefault(part, Node({}, node.source, node.line)).value
        return value if isinstance(value, dict) else None

    def _nearest(self, path: Path) -> Node:
        node = self.root
        for part in path:
            if not isinstance(node.value, dict) or part not in node.value:
                break
            node = node.value[part]
        return node


def as_mapping(node: Node | None) -> dict[str, Node]:
    """The node's children, none if it is not a mapping."""
    return node.value if node is not None and isinstance(node.value, dict) else {}


def child_of(node: Node | None, part: str) -> Node | None:
    """What lies under a key of a mapping, or at a place of a list (counted from 0); None where nothing does."""
    if node is not None and isinstance(node.value, list):
        return node.value[int(part)] if is_place(part) and int(part) < len(node.value) else None
    return as_mapping(node).get(part)


def is_place(part: str) -> bool:
    """Whether a part of a dotted key is a list item's number: `2`, but no `²` and no number of 5,000 digits."""
    return part.isascii() and part.isdigit() and len(part) <= MAX_DIGITS


def merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: mappings key by key, everything else as a whole."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return replace(over, value=merged, source=over.source if over.value else base.source)


def _shown(path: Path) -> str:
    return ".".join(path).replace(".0.", "[0].")


def normalise(root: Node) -> tuple[Node, list[Problem], list[str]]:
    """Translate foreign words and spread shorthands.

    Args:
        root: the tree of one file; its value is a mapping.

    Returns:
        The tree with the preset's own keys (unknown keys stay as they are), problems, notes.
    """
    tree = _Tree(root)
    for key, node in as_mapping(root).items():
        children = _section_children(key, node)
        if key in TOP:
            path = tuple(TOP[key].split("."))
            tree.put(path, node, key, foreign=path[-1] != key)  # a key's own name, one level up, needs no note
        elif children is None:
            tree.put((key,), node, key)
        else:
            _put_section(tree, key, node, children)
    _spread(tree)
    return tree.root, tree.problems, tree.notes


def _section_children(key: str, node: Node) -> dict[str, Node] | None:
    """The children of a section, also of one written short or left empty; None for the rest."""
    if key not in SECTIONS:
        return None
    if key == "dataset" and isinstance(node.value, str):
        return {"path": node}
    if key == "dataset" and isinstance(node.value, list):
        return {"folders": node}
    if key in SHORTHAND and isinstance(node.value, str):
        return {SHORTHAND[key]: node}
    if node.value is None:
        return {}
    return node.value if isinstance(node.value, dict) else None


def _put_section(tree: _Tree, key: str, node: Node, children: dict[str, Node]) -> None:
    as_mapping(tree.root).setdefault(key, replace(node, value={}, text=None))
    words = INSIDE.get(key, {})
    for word, child in children.items():
        if word in words:
            foreign = (key, word) not in QUIET
            tree.put(tuple(words[word].split(".")), child, f"{key}.{word}", foreign=foreign)
        elif word in NESTED and (child.value is None or isinstance(child.value, dict)):
            section = as_mapping(as_mapping(tree.root)[key])
            section.setdefault(word, replace(child, value={}, text=None))
            for inner, leaf in as_mapping(child).items():
                own = NESTED[word].get(inner, inner)
                full = f"{key}.{word}.{inner}"
                tree.put((key, word, own), leaf, full, foreign=own != inner)
        else:
            tree.put((key, word), child, f"{key}.{word}")


def _spread(tree: _Tree) -> None:
    """Scalars where lists are meant, names where mappings are meant, words inside folders."""
    top = as_mapping(tree.root)
    for section, key in LISTS:
        children = as_mapping(top.get(section))
        node = children.get(key)
        if node is not None and node.value is not None and not isinstance(node.value, list):
            children[key] = replace(node, value=[node], text=None)
    train = as_mapping(top.get("train"))
    if "optimizer" in train:
        optimizer = train["optimizer"]
        if isinstance(optimizer.value, str):
            optimizer = replace(optimizer, value={"name": optimizer}, text=None)
        train["optimizer"] = _rename(tree, optimizer, OPTIMIZER_WORDS)
    for section, key, words in (("dataset", "folders", FOLDER_WORDS), ("start_from", "stack", {})):
        node = as_mapping(top.get(section)).get(key)
        if node is not None and isinstance(node.value, list):
            items = node.value
            for index, item in enumerate(items):
                if isinstance(item.value, str):
                    item = replace(item, value={"path": item}, text=None)
                items[index] = _rename(tree, item, words)


def _rename(tree: _Tree, node: Node, words: dict[str, str]) -> Node:
    """A mapping with its foreign words translated; anything else as it is."""
    if not isinstance(node.value, dict):
        return node
    renamed: dict[str, Node] = {}
    for word, child in node.value.items():
        own = words.get(word, word)
        if own in renamed:
            both = f"`{word}` and line {renamed[own].line} both set `{own}`"
            tree.problems.append(Problem(f"{child.where}: {both}", "keep one of them"))
        if own != word:
            tree.notes.append(f"{child.where}: `{word}` is read as `{own}`")
        renamed[own] = child
    return replace(node, value=renamed)
