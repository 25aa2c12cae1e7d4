"""As much of JSON Schema as the preset's schema uses: what a value breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "array": (list,), "object": (dict,),
}  # fmt: skip
KNOWN = {
    "type", "anyOf", "enum", "const", "$ref", "properties", "additionalProperties", "items", "prefixItems", "required",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems",
    "minProperties", "pattern", "title", "description", "default", "$defs", "$schema",
}  # fmt: skip


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "") -> Iterator[str]:
    """Every rule that a value breaks; a word of the schema that is not known here is an error of the test."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        yield from problems(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
    if "anyOf" in schema:
        tries = [list(problems(value, one, root, where)) for one in schema["anyOf"]]
        if all(tries):
            yield from min(tries, key=lambda found: (found[0].startswith(f"{where} is not of type"), len(found)))
    if "type" in schema:
        kinds = KINDS[schema["type"]]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            yield f"{where} is not of type {schema['type']}"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where} is none of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{where} is not {schema['const']}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        for word, broken in (("minimum", value.__lt__), ("maximum", value.__gt__), ("exclusiveMinimum", value.__le__)):
            if word in schema and broken(schema[word]) is True:
                yield f"{where} breaks {word} {schema[word]}"
    if isinstance(value, list) and "items" in schema:
        for k, one in enumerate(value):
            yield from problems(one, schema["items"], root, f"{where}[{k}]")
    if isinstance(value, dict):
        more = schema.get("additionalProperties", True)
        for key, one in value.items():
            if key in schema.get("properties", {}):
                yield from problems(one, schema["properties"][key], root, f"{where}.{key}")
            elif more is False:
                yield f"{where}.{key} is no key"
            elif isinstance(more, dict):
                yield from problems(one, more, root, f"{where}.{key}")
        yield from (f"{where}.{key} is missing" for key in schema.get("required", ()) if key not in value)
