"""The preset's reference, from the schema: a JSON schema for editors and a page for people."""

from __future__ import annotations

import json
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from emotrain.config.aliases import FOLDER_WORDS, INSIDE, ONE_FOLDER, TOP
from emotrain.config.explain import section_in
from emotrain.config.schema import Preset

SCHEMA_FILE = "preset.schema.json"  # beside the presets that are written for the user
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"


def schema_text() -> str:
    """The schema as a file."""
    return json.dumps(preset_schema(), indent=2, ensure_ascii=False) + "\n"


def preset_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a preset as it is written, with the short forms that loading accepts."""
    schema = Preset.model_json_schema(by_alias=True)
    properties = schema["properties"]
    text = {"type": "string"}
    properties["extends"] = {**text, "description": "a shipped preset's name, or a path"}
    properties["model"] = {"anyOf": [text, properties["model"]]}
    properties["dataset"] = {"anyOf": [text, properties["dataset"]]}
    definitions = schema["$defs"]
    sections = {name: definitions[name]["properties"] for name in definitions}
    folder = sections["DatasetSection"]["folders"]
    folder["items"] = {"anyOf": [text, folder["items"]]}
    optimizer = sections["TrainSection"]["optimizer"]
    sections["TrainSection"]["optimizer"] = {"anyOf": [text, optimizer]}
    for section, key, kind in (
        ("DatasetSection", "resolution", {"type": "integer"}),
        ("SampleSection", "prompts", text),
    ):
        sections[section][key] = {"anyOf": [kind, sections[section][key]]}
    for name in ("name", "model", "dataset"):  # an extended preset may bring them
        if name in schema.get("required", []):
            schema["required"].remove(name)
    definitions["ModelSection"].pop("required", None)
    definitions["DatasetSection"].pop("required", None)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "emotrain preset"
    return schema


def preset_page() -> str:
    """docs/reference/preset.md: every key with its kind, default and meaning; then the aliases."""
    lines = [
        "# The preset, key by key",
        "",
        "Generated from the code by `python docs/build_reference.py`. Two keys are enough: `model:` and",
        "`dataset:`, a string each. `extends:` takes the name of a shipped preset or a path, and the",
        "preset holds only what differs. Paths are relative to the preset's file.",
        "",
    ]
    lines += _section_lines("", Preset)
    lines += _alias_lines()
    return "\n".join(lines).rstrip() + "\n"


def _section_lines(prefix: str, section: type[BaseModel]) -> list[str]:
    lines: list[str] = []
    if prefix:
        lines += [f"## `{prefix}`", "", (section.__doc__ or "").strip(), ""]
    lines += ["| key | value | default | |", "|---|---|---|---|"]
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        key = field.alias or name
        below = section_in(field.annotation)
        if below is None:
            lines.append(_row(key, field))
            continue
        full = f"{prefix}.{key}" if prefix else key
        inner.append((full, below))
        many = "a list of mappings" if get_origin(field.annotation) is tuple else "a mapping"
        lines.append(f"| `{key}` | {many}, see [`{full}`](#{full.replace('.', '')}) | | |")
    lines.append("")
    for full, below in inner:
        lines += _section_lines(full, below)
    return lines


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_written(field.get_default())}`"
    kind = _kind(field.annotation, field.metadata).replace("|", "\\|")
    return f"| `{key}` | {kind} | {default} | {(field.description or '').replace('|', chr(92) + '|')} |"


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return json.dumps(value).strip('"') if not isinstance(value, str) or not value else value


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """A type in a reader's words."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{word}`" for word in get_args(annotation)).replace("\\|", "|")
    if origin in (Union, types.UnionType):
        return " | ".join(_kind(one, []) for one in get_args(annotation))
    if origin is tuple:
        return f"list of {_kind(get_args(annotation)[0], [])}"
    if origin is dict:
        key, value = get_args(annotation)
        return "mapping of folder to share" if key is str else f"mapping of regular expression to {_kind(value, [])}"
    if hasattr(annotation, "__metadata__"):
        inner, *extra = get_args(annotation)
        return _kind(inner, list(extra))
    if annotation is type(None):
        return "`null`"
    names = {bool: "`true` | `false`", int: "whole number", float: "number", str: "text"}
    return names.get(annotation, "text") + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    found: dict[str, Any] = {}
    for item in metadata:
        for part in getattr(item, "metadata", None) or [item]:
            for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                limit = getattr(part, key, None)
                if limit is not None:
                    found[sign] = limit
    return "".join(f" {sign} {limit:g}" for sign, limit in found.items())


def _alias_lines() -> list[str]:
    lines = [
        "## Words from other trainers",
        "",
        "They are accepted; a note says what they were read as, but for a key of our own one level up.",
        "",
        "| word | read as |",
        "|---|---|",
    ]
    pairs = {(word, to.replace(".0.", "[].")) for word, to in TOP.items()}
    for section, words in INSIDE.items():
        pairs |= {
            (f"{section}.{word}", to.replace(".0.", "[]."))
            for word, to in words.items()
            if not (section == "dataset" and word in (*ONE_FOLDER, "folder"))
        }
    pairs |= {(f"dataset.folders[].{w}", f"dataset.folders[].{to}") for w, to in FOLDER_WORDS.items()}
    lines += [f"| `{word}` | `{to}` |" for word, to in sorted(pairs)]
    return lines
