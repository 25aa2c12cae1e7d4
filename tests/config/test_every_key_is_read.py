"""A key of the preset that nothing reads is a promise that nobody keeps."""

from __future__ import annotations

import ast
from pathlib import Path

import emotrain
from emotrain.config.explain import all_keys

PACKAGE = Path(emotrain.__file__).parent
CALLED = {  # what code calls a section that it has at hand, besides its own name
    "dataset": {"data", "section", "settings"},
    "folders": {"spec", "folder"},
    "stack": {"item"},
    "optimizer": {"settings"},
    "captions": {"words"},
}
# Keyword arguments of the optimizers, by their own names.
KEYWORDS = {"use_shadow", "eps", "betas", "weight_decay", "stopcoef", "sensor", "bias_correction", "generation"}
RULES = {"train.allow_small_lr"}  # it lets a value pass, which `config.rules` does
ONLY_ONE = {"network.type"}  # it has one value


def trees(*, inside: str = "") -> list[ast.Module]:
    """Of every module outside `config`, or of one room."""
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    rooms = [
        path for path in paths if (path.parts[0] == inside if inside else path.parts[0] not in ("config", "assets"))
    ]
    return [ast.parse((PACKAGE / path).read_text(encoding="utf-8")) for path in rooms]


def reads(modules: list[ast.Module]) -> set[tuple[str, str]]:
    """(section as it is called, key) of every `section.key` in the code."""
    found = set()
    for node in (node for tree in modules for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            found.add((name.rstrip("_"), node.attr.rstrip("_")))
    return found


def parameters(modules: list[ast.Module]) -> set[str]:
    """Names of all parameters of all functions."""
    functions = (node for tree in modules for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {argument.arg for node in functions for argument in (*node.args.args, *node.args.kwonlyargs)}


def unread(keys: list[str], found: set[tuple[str, str]], keywords: set[str]) -> list[str]:
    """The keys without a reader; a section is read where one of its keys is."""
    left = []
    for key in keys:
        above, _, last = key.rpartition(".")
        section = above.rpartition(".")[2] or "preset"
        if any(other.startswith(f"{key}.") for other in keys) or key in RULES | ONLY_ONE:
            continue
        if section == "optimizer" and last in keywords:
            continue
        if not any((name, last) in found for name in {section} | CALLED.get(section, set())):
            left.append(key)
    return left


def test_every_key_of_the_preset_is_read_outside_config() -> None:
    keywords = KEYWORDS & parameters(trees(inside="optim"))
    assert keywords == KEYWORDS
    assert unread(all_keys(), reads(trees()), keywords) == []


def test_a_key_that_nothing_reads_would_be_found() -> None:
    assert unread(["sample.at_noon", "sample.at_start"], reads(trees()), set()) == ["sample.at_noon"]
    assert unread(["train.optimizer.momentum"], reads(trees()), KEYWORDS) == ["train.optimizer.momentum"]
