"""Strict YAML: text -> a tree whose every node knows its file and line.

A preset may come from a stranger, so only the plain part of YAML is read: one UTF-8 document of
mappings, lists and scalars. Anchors, aliases, tags, duplicate keys, deep nesting and huge files are
refused. Plain scalars follow the YAML 1.2 core schema: only `true` and `false` are truth values,
`1e-4` is a number, `no`, `on` and `12:30:00` are strings (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from yaml import events

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
_DRIVE = re.compile(r'"[A-Za-z]:\\')

_QUOTE_HINT = "in double quotes a backslash starts an escape: use 'single quotes' for Windows paths"


@dataclass(frozen=True)
class Node:
    """A value of the tree; `line` counts from 1 and is the line of the key where there is one."""

    value: dict[str, Node] | list[Node] | Scalar
    source: str
    line: int | None = None
    text: str | None = None  # a plain scalar as it was written

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
    builder = _Builder(text, source)
    try:
        root = builder.document()
    except yaml.MarkedYAMLError as error:
        builder.problems.append(_explain_syntax(error, text, source))
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        builder.problems.append(Problem(f"{source}:{line}: character U+{error.character:04X} is not allowed in YAML"))
    except _TooMuch as error:
        builder.problems.append(error.problem)
    else:
        if not builder.problems:
            return root, builder.notes
    raise SourceError(builder.problems)


class _TooMuch(Exception):
    """A limit was passed; reading on makes no sense."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class _Builder:
    """Events -> nodes. Events come lazily, so a limit stops the parser as well."""

    def __init__(self, text: str, source: str) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._text = text
        self._source = source
        self._num_nodes = 0
        self._events: Iterator[events.Event] = yaml.parse(text, Loader=yaml.SafeLoader)

    def document(self) -> Node:
        """The only document of the stream; an empty stream gives an empty mapping."""
        root = Node({}, self._source, 1)
        num_documents = 0
        for event in self._events:
            if isinstance(event, events.DocumentStartEvent):
                num_documents += 1
                if num_documents == 2:
                    line = _line(event)
                    message = f"{self._source}:{line}: a second document starts here"
                    raise _TooMuch(Problem(message, "a preset is one document: remove the `---`"))
            elif isinstance(event, events.NodeEvent):
                root = self._node(event, 0, _line(event))
        return root

    def _problem(self, line: int, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(f"{self._source}:{line}: {message}", hint))

    def _node(self, event: Any, depth: int, line: int) -> Node:
        self._num_nodes += 1
        here = f"{self._source}:{_line(event)}"
        if self._num_nodes > MAX_NODES:
            raise _TooMuch(Problem(f"{here}: more than {MAX_NODES} values, which no preset has"))
        if depth > MAX_DEPTH:
            raise _TooMuch(Problem(f"{here}: nested more than {MAX_DEPTH} levels deep"))
        if isinstance(event, events.AliasEvent):
            self._problem(line, f"alias `*{event.anchor}`: anchors and aliases are not read here",
                          "write the value out, or share it through `extends:`")  # fmt: skip
            return Node(None, self._source, line)
        if event.anchor is not None:
            self._problem(line, f"anchor `&{event.anchor}`: anchors and aliases are not read here",
                          "write the value out, or quote it if it is text")  # fmt: skip
        if event.tag not in (None, "!"):
            self._problem(line, f"tag `{event.tag}`: tags are not read here",
                          "write the plain value, or quote it if it is text")  # fmt: skip
        if isinstance(event, events.MappingStartEvent):
            return self._mapping(depth, line)
        if isinstance(event, events.SequenceStartEvent):
            return self._sequence(depth, line)
        assert isinstance(event, events.ScalarEvent)
        return self._scalar(event, line)

    def _sequence(self, depth: int, line: int) -> Node:
        items: list[Node] = []
        while not isinstance(event := next(self._events), events.SequenceEndEvent):
            items.append(self._node(event, depth + 1, _line(event)))
        return Node(items, self._source, line)

    def _mapping(self, depth: int, line: int) -> Node:
        children: dict[str, Node] = {}
        while not isinstance(event := next(self._events), events.MappingEndEvent):
            key_line = _line(event)
            if isinstance(event, events.ScalarEvent):
                self._node(event, depth, key_line)  # counts it, and refuses anchors and tags
                key = str(event.value)
            else:
                self._node(event, depth + 1, key_line)
                self._problem(key_line, "a key is a list or mapping", "keys are words")
                key = ""
            value = next(self._events)
            child = self._node(value, depth + 1, key_line)
            if key in children:
                self._problem(key_line, f"`{key}` is set twice (first in line "
                              f"{children[key].line})", "keep one of them")  # fmt: skip
            else:
                children[key] = child
        return Node(children, self._source, line)

    def _scalar(self, event: events.ScalarEvent, line: int) -> Node:
        if event.style is not None:  # quoted or block: text as it is
            start, end = event.start_mark, event.end_mark
            written = self._text[start.index : end.index] if start and end else ""
            if _DRIVE.match(written) and any(ord(letter) < 32 for letter in event.value):
                self.notes.append(f"{self._source}:{line}: {written} holds a tab or line break; {_QUOTE_HINT}")
            return Node(event.value, self._source, line)
        text: str = event.value
        if _INT.fullmatch(text) and len(text) > MAX_DIGITS:
            self._problem(line, f"a number of {len(text)} digits")
            return Node(0, self._source, line)
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


def _line(event: events.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


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
