"""A preset's file or name, and overrides -> a frozen `Preset`, or every error at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from emotrain.config import source
from emotrain.config.builtin import find_preset, shipped_presets
from emotrain.config.explain import explain, leaf
from emotrain.config.names import name_from_file
from emotrain.config.overrides import apply_override
from emotrain.config.paths import absolute, resolve_paths
from emotrain.config.prompts import is_prompt_file, prompts_of_file
from emotrain.config.rules import check_rules
from emotrain.config.schema import Preset
from emotrain.config.source import MAX_PROBLEMS, Node, place_of
from emotrain.config.text import read_text
from emotrain.config.trainers.known import refuse_foreign
from emotrain.config.words import as_mapping, child_of, merge, normalise
from emotrain.errors import ConfigError, Problem, first_line

MAX_EXTENDS = 16


@dataclass(frozen=True)
class LoadedPreset:
    """A preset, what was noted while it was read, and where its values came from."""

    preset: Preset
    notes: tuple[str, ...]
    path: Path
    _root: Node
    extends: str | None = None  # the shipped preset's name, or the file, that it changes

    def where(self, dotted: str) -> str:
        """`network.rank` -> `presets/a.yaml:12`; the file alone where the value is a default."""
        node: Node | None = self._root
        for part in dotted.split("."):
            node = child_of(node, part)
        return node.where if node is not None else self._root.source


@dataclass
class _Found:
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extends: str | None = None


def load_preset(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
    notes: list[str] | None = None,
) -> Preset:
    """Load a preset.

    Args:
        path_or_name: a YAML file, or the name of a shipped preset.
        overrides: `section.key=value` each; paths in them are relative to the current folder.
        name: of the run, in place of the preset's own.
        notes: lines about translated words and settings without effect are appended to it.

    Raises:
        ConfigError: with every problem that was found.
    """
    loaded = load(path_or_name, overrides, name)
    if notes is not None:
        notes.extend(loaded.notes)
    return loaded.preset


def load(path_or_name: str | Path, overrides: Sequence[str] = (), name: str | None = None) -> LoadedPreset:
    """As `load_preset`, with the notes and the origin of every value."""
    path = find_preset(str(path_or_name))
    found = _Found()
    if str(path_or_name) in shipped_presets():
        root = _read_file(path, _shown(path), Path.cwd(), (), found)
        found.extends = str(path_or_name)
    else:
        root = _read_file(path, str(path_or_name), path.absolute().parent, (), found)
    for override in overrides:
        root, problems, noted = apply_override(root, override)
        found.problems.extend(problems)
        found.notes.extend(noted)
    _read_prompt_files(root, Path.cwd(), found)  # of the flags
    if name is not None:
        root = merge(root, Node({"name": Node(name, "--name")}, "--name"))
    preset = _validate(root, path, found)
    if preset is None or found.problems:
        raise _as_error(found.problems)
    return LoadedPreset(preset, tuple(found.notes), path, root, found.extends)


def _shown(path: Path) -> str:
    """A file's name in messages: short where it lies under the current folder."""
    relative = os.path.relpath(path) if path.drive == Path.cwd().drive else str(path)
    return str(path) if relative.startswith("..") else relative


def _read_file(path: Path, shown: str, folder: Path, chain: tuple[Path, ...], found: _Found) -> Node:
    """One file's tree on top of the tree that it extends; its paths are relative to `folder`."""
    text = read_text(path, shown)
    refuse_foreign(text, path, shown)
    root, notes = source.parse(text, shown)
    if not isinstance(root.value, dict):
        kind = "a list" if isinstance(root.value, list) else "a single value"
        raise ConfigError(f"{shown}: {kind} is not a preset", "a preset has keys: `model: ...`")
    if not root.value:
        raise ConfigError(
            f"{shown}: an empty file is not a preset",
            "two keys are enough: `model:` and `dataset:`",
        )
    found.notes.extend(notes)
    root = replace(root, line=None)
    extends = as_mapping(root).pop("extends", None)
    tree, problems, words = normalise(root)
    found.problems.extend(problems)
    found.notes.extend(words)
    resolve_paths(tree, folder)
    _read_prompt_files(tree, folder, found)
    if extends is None or extends.value is None:
        return tree
    base = _read_extended(extends, folder, (*chain, path.resolve()), found)
    return _on_top(base, tree)


def _read_prompt_files(tree: Node, folder: Path, found: _Found) -> None:
    """`sample.prompts: prompts.txt`: the file's lines in its place."""
    prompts = leaf(tree, "sample.prompts")
    if prompts is None or not isinstance(prompts.value, list):
        return
    entries: list[Node] = []
    for node in prompts.value:
        if not isinstance(node.value, str) or not is_prompt_file(node.value):
            entries.append(node)
            continue
        path = Path(absolute(node.value, folder))
        try:
            lines = prompts_of_file(read_text(path, node.value), path)
        except (ConfigError, ValueError) as error:
            hint = "a prompt file has a prompt a line"
            place = place_of(node.where, "sample.prompts")
            found.problems.append(Problem(f"{place}: {first_line(error)}", hint))
            continue
        entries += [Node(line, str(node.value), number, text=line) for number, line in lines]
    as_mapping(as_mapping(tree)["sample"])["prompts"] = replace(prompts, value=entries)


def _read_extended(extends: Node, folder: Path, chain: tuple[Path, ...], found: _Found) -> Node:
    """The tree behind `extends:`, without the run's name.

    A shipped preset has no folder of its own: its paths are relative to the file that extends it,
    or to the current folder where it is named on the command line.
    """
    empty = Node({}, extends.source)
    word = extends.value
    if not isinstance(word, str):
        hint = "it takes one name or path"
        found.problems.append(Problem(f"{extends.where}: extends is not a preset's name", hint))
        return empty
    try:
        beside = Path(absolute(word, folder))
        target = beside if beside.is_file() else find_preset(word)
    except ConfigError as error:
        found.problems.append(Problem(f"{extends.where}: {error.message}", error.hint))
        return empty
    if not target.is_file():
        found.problems.append(Problem(f"{extends.where}: extends `{word}`, which does not exist"))
        return empty
    if target.resolve() in chain or len(chain) > MAX_EXTENDS:
        what = "which extends it again" if target.resolve() in chain else "one of too many"
        found.problems.append(Problem(f"{extends.where}: extends `{word}`, {what}"))
        return empty
    try:
        is_shipped = target in shipped_presets().values()
        if len(chain) == 1:
            found.extends = target.stem if is_shipped else str(target.absolute())
        own_folder = folder if is_shipped else target.absolute().parent
        tree = _read_file(target, _shown(target), own_folder, chain, found)
    except ConfigError as error:
        found.problems.extend(error.problems)
        return empty
    as_mapping(tree).pop("name", None)
    return tree


def _on_top(base: Node, over: Node) -> Node:
    """`merge`, but another optimizer brings neither the old one's words nor its lr.

    Pictures of one's own bring neither the trigger nor the sample prompts of a shipped preset's example.
    """
    new, old = leaf(over, "train.optimizer.name"), leaf(base, "train.optimizer.name")
    train = as_mapping(as_mapping(base).get("train"))
    if new is not None and new.value != (old.value if old is not None else "emosens"):
        train.pop("optimizer", None)
        train.pop("lr", None)
    if leaf(over, "dataset.folders") is not None:
        shipped = {_shown(path) for path in shipped_presets().values()}
        for section, key in (("dataset", "trigger"), ("sample", "prompts")):
            keys = as_mapping(as_mapping(base).get(section))
            if key in keys and keys[key].source in shipped:
                del keys[key]
    return merge(base, over)


def _validate(root: Node, path: Path, found: _Found) -> Preset | None:
    """The preset; None where problems were added to `found`."""
    if "name" not in as_mapping(root):
        as_mapping(root)["name"] = Node(name_from_file(path), root.source)
    problems, notes = check_rules(root)
    found.notes.extend(notes)
    try:
        preset: Preset | None = Preset.model_validate(_strict(root.plain()))
    except ValidationError as error:
        preset = _validate_as_text(error, root, found)
    found.problems.extend(problems)
    return preset


def _validate_as_text(error: ValidationError, root: Node, found: _Found) -> Preset | None:
    """Once more, with plain scalars as they were written where text is wanted: `trigger: 007`."""
    values = root.plain()
    for detail in error.errors(include_url=False):
        if detail["type"] in ("string_type", "literal_error"):
            _write_as_text(values, root, detail["loc"])
    try:
        return Preset.model_validate(_strict(values))
    except ValidationError as left:
        found.problems.extend(explain(left, root))
        return None


def _write_as_text(values: Any, root: Node, loc: tuple[int | str, ...]) -> None:
    node = root
    for part in loc:
        children: Any = node.value
        in_mapping = isinstance(children, dict) and part in children
        if not in_mapping and not (isinstance(children, list) and part in range(len(children))):
            return
        node = children[part]
        if node.text is not None and node.value is not None:
            values[part] = node.text
            return
        values = values[part]


def _strict(values: Any) -> Any:
    """Lists as tuples, which is what the frozen sections hold."""
    if isinstance(values, dict):
        return {key: _strict(value) for key, value in values.items()}
    if isinstance(values, list):
        return tuple(_strict(value) for value in values)
    return values


def _as_error(problems: list[Problem]) -> ConfigError:
    shown = list(dict.fromkeys(problems))
    if len(shown) > MAX_PROBLEMS:
        more = len(shown) - MAX_PROBLEMS
        shown = [*shown[:MAX_PROBLEMS], Problem(f"and {more} more problems of this kind")]
    return ConfigError(shown[0].message, shown[0].hint, problems=tuple(shown))
