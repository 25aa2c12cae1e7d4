"""Strict YAML: text -> a tree whose every node knows its file and line.

A preset may come from a stranger, so only the plain part of YAML is read: one UTF-8 document of
mappings, lists and scalars. Anchors, aliases, tags, duplicate keys, deep nesting and huge files are
refused. Plain scalars follow the YAML 1.2 core schema: only `true` and `false` are truth values,
`1e-4` is a number, `no`, `on` and `12:30:00` are strings (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from emotrain.errors import ConfigError, Problem

MAX_NODES = 10_000
MAX_DEPTH = 32
MAX_DIGITS = 40
MAX_PROBLEMS = 50

Scalar = str | int | float | bool | None

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_CUT_OFF = re.compile(r"[ \t]+(#\S.*)")  # people put a space behind the # of a comment
_DRIVE = re.compile(r'"[A-Za-z]:\\')

_QUOTE_HINT = "in double quotes a backslash starts an escape: use 'single quotes' for Windows paths"


@dataclass(frozen=True)
class Node:
    """A value of the tree; `line` counts from 1 and is the line of the key where there is one."""

    value: dict[str, Node] | list[Node] | Scalar
    source: str
    line: int | None = None
    text: str | None = None  # a plain scalar as it was written; of an empty one the `#...` behind it

    @property
    def where(self) -> str:
        """`presets/a.yaml:12`, or the flag the value came from."""
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def plain(self) -> object:
        """The value as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def place_of(where: str, key: str) -> str:
    """Where a value stands and its key, which a flag's place has in it already (`--set sample.base`)."""
    return where if key in where else f"{where}: {key}"


class SourceError(ConfigError):
    """Text that is not the YAML we read; carries all problems that were found."""

    def __init__(self, problems: list[Problem]) -> None:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > MAX_PROBLEMS:
            shown.append(Problem(f"and {len(problems) - MAX_PROBLEMS} more problems of this kind"))
        super().__init__(shown[0].message, shown[0].hint, problems=tuple(shown))


def parse(text: str, source: str) -> tuple[Node, list[str]]:
    """Parse one document.

    Args:
        text: YAML.
        source: the file's name in messages, or the flag.

    Returns:
        The root, and notes: lines about what looks like a slip but is legal.

    Raises:
        SourceError: every problem that was found.
    """
    try:
        loader = _Loader(text, source)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        message = f"{source}:{line}: character U+{error.character:04X} is not allowed in YAML"
        raise SourceError([Problem(message)]) from error
    try:
        root = loader.get_single_node()
        tree = Node({}, source, 1) if root is None else loader.tree(root, root.start_mark.line + 1)
    except _TooMuch as error:
        loader.problems.append(error.problem)
    except yaml.MarkedYAMLError as error:
        loader.problems.append(_explain_syntax(error, text, source))
    else:
        if not loader.problems:
            return tree, loader.notes
    raise SourceError(loader.problems)


class _TooMuch(Exception):
    """A limit was passed; reading on makes no sense."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class _Loader(yaml.SafeLoader):
    """PyYAML's own nodes with their marks, refusing what is not plain; then our tree of them."""

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._text, self._source = text, source
        self._count = self._depth = 0

    def _problem(self, line: int, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(f"{self._source}:{line}: {message}", hint))

    def compose_document(self) -> yaml.Node | None:
        """The one document; a second one is refused where it starts."""
        root: yaml.Node | None = super().compose_document()
        if not self.check_event(yaml.StreamEndEvent):
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            message = f"{self._source}:{line}: a second document starts here"
            raise _TooMuch(Problem(message, "a preset is one document: remove the `---`"))
        return root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node, unless there are too many or they lie too deep; aliases become empty."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        self._count += 1
        if self._count > MAX_NODES:
            message = f"{self._source}:{line}: more than {MAX_NODES} values, which no preset has"
            raise _TooMuch(Problem(message))
        if self._depth > MAX_DEPTH:
            raise _TooMuch(Problem(f"{self._source}:{line}: nested more than {MAX_DEPTH} levels deep"))
        if self.check_event(yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            self._problem(line, f"alias `*{event.anchor}`: anchors and aliases are not read here",
                          "write the value out, or share it through `extends:`")  # fmt: skip
            return yaml.ScalarNode("", "", event.start_mark, event.end_mark)
        if event.anchor is not None:
            self._problem(line, f"anchor `&{event.anchor}`: anchors and aliases are not read here",
                          "write the value out, or quote it if it is text")  # fmt: skip
            event.anchor = None
        if event.tag not in (None, "!"):
            self._problem(line, f"tag `{event.tag}`: tags are not read here",
                          "write the plain value, or quote it if it is text")  # fmt: skip
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def tree(self, node: yaml.Node, line: int) -> Node:
        """Our tree of PyYAML's nodes; `line` is the key's, where there is one."""
        if isinstance(node, yaml.SequenceNode):
            return Node([self.tree(item, item.start_mark.line + 1) for item in node.value], self._source, line)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, line)
        children: dict[str, Node] = {}
        for key_node, value in node.value:
            at = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(at, "a key is a list or mapping", "keys are words")
                continue
            key, child = str(key_node.value), self.tree(value, at)
            if key in children:
                self._problem(at, f"`{key}` is set twice (first in line {children[key].line})", "keep one of them")
            else:
                children[key] = child
        return Node(children, self._source, line)

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Node:
        text: str = node.value
        if node.style is not None:  # quoted or block: text as it is
            written = self._text[node.start_mark.index : node.end_mark.index]
            if _DRIVE.match(written) and any(ord(letter) < 32 for letter in text):
                self.notes.append(f"{self._source}:{line}: {written} holds a tab or line break; {_QUOTE_HINT}")
            return Node(text, self._source, line)
        if _INT.fullmatch(text) and len(text) > MAX_DIGITS:
            self._problem(line, f"a number of {len(text)} digits")
            return Node(0, self._source, line)
        if cut_off := _CUT_OFF.match(self._text, node.end_mark.index):
            comment = cut_off[1].rstrip()
            at = f"{self._source}:{node.end_mark.line + 1}"
            self.notes.append(f"{at}: `{comment}` is a comment in YAML; if it is part of the text, quote all of it")
            return Node(resolve_scalar(text), self._source, line, text or comment)
        return Node(resolve_scalar(text), self._source, line, text)


def resolve_scalar(text: str) -> Scalar:
    """A plain scalar's value by the YAML 1.2 core schema (without its octal and hexadecimal)."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return int(text) if len(text) <= MAX_DIGITS else text
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text) or _NAN.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def _explain_syntax(error: yaml.MarkedYAMLError, text: str, source: str) -> Problem:
    """PyYAML's message in our shape: file:line:column, the reason, and the usual cause."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    column = mark.column + 1 if mark else 1
    lines = text.splitlines()
    at = lines[line - 1] if line <= len(lines) else ""
    reason = (error.problem or error.context or "not YAML").replace("\n", " ")
    hint = None
    if "'\\t'" in reason or at.lstrip(" ").startswith("\t"):
        reason, hint = "a tab is used for indentation", "YAML wants spaces: replace the tab by two"
    elif "cannot start any token" in reason:
        reason = f"a value cannot begin with {reason.split(chr(39))[1]!r}" if reason.count("'") > 1 else reason
        hint = f'quotes make it text: "{at.partition(":")[2].strip()}"'
    elif "unknown escape character" in reason:
        hint = _QUOTE_HINT
    elif "[trigger]" in at:
        hint = 'a text that starts with `[` needs quotes: "[trigger], portrait"'
    elif "mapping values are not allowed" in reason:
        reason = "a `:` stands where no key can be"
        hint = "is the line above indented differently, or does a text with `: ` need quotes?"
    elif error.context and error.context_mark and error.context.startswith("while parsing a flow"):
        opened = error.context_mark.line + 1
        hint = f"is the bracket opened in line {opened} closed?"
    return Problem(f"{source}:{line}:{column}: {reason}", hint)
