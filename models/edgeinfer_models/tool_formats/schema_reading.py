"""What forms that are no JSON must know of a JSON schema: an object's properties, a value's types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from edgeinfer.errors import ToolsInvalid
from edgeinfer_models.tool_formats.held_schema import held_json
from edgeinfer_models.tool_formats.tools import Tool

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_MAX_REFERENCES = 16
_NOTES = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
    "$defs", "definitions", "$schema", "$id", "$anchor", "strict", "example", "discriminator",
    "propertyOrdering", "contentMediaType", "contentEncoding",
})  # fmt: skip
_COMPOSED = ("$ref", "anyOf", "oneOf", "allOf", "not", "if", "patternProperties", "dependentSchemas")


@dataclass(frozen=True)
class Property:
    name: str
    schema: Any
    is_required: bool


@dataclass(frozen=True)
class ObjectShape:
    """others: the schema of properties that have no name here; None where there may be none."""

    properties: tuple[Property, ...]
    others: Any | None


def shape_of(
    schema: Mapping[str, Any], where: str, *, strict: bool, is_outermost: bool = True
) -> ObjectShape:
    """Raises ToolsInvalid for a strict schema that says more than that. schema: of type object.

    is_outermost: a tool's parameters, where properties without a name are wanted only if it says so.
    """
    composed = [key for key in _COMPOSED if key in schema]
    limits = [key for key in ("minProperties", "maxProperties", "propertyNames") if key in schema]
    if strict and (composed or limits):
        raise unsupported(where, (composed + limits)[0])
    declared = schema.get("properties")
    declared = declared if isinstance(declared, dict) else {}
    required = schema.get("required")
    required = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    names = dict.fromkeys([*declared, *required])
    properties = tuple(Property(name, declared.get(name, True), name in required) for name in names)
    is_closed = not composed and (is_outermost or bool(properties))
    others = schema.get("additionalProperties", not is_closed)
    return ObjectShape(properties, None if others is False else others)


def resolve(schema: Any, root: Mapping[str, Any]) -> Any:
    """Follows `$ref` inside the document; True (anything) where it leads nowhere."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        schema = _target(schema["$ref"], root)
    return True


def _target(reference: Any, root: Mapping[str, Any]) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return True
    target: Any = root
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        target = target.get(key) if isinstance(target, Mapping) else None
    return True if target is None else target


def lost_beside_reference(schema: Any, root: Mapping[str, Any]) -> str | None:
    """A keyword beside a `$ref`, which `resolve` leaves behind, if there is one."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            return None
        keys = [key for key in schema if key == "type" or _says(key, frozenset({"$ref"}))]
        if keys:
            return str(keys[0])
        schema = _target(schema["$ref"], root)
    return "$ref"


def listed_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values of `enum` or `const` that have the schema's type; None without either."""
    if "const" in schema:
        values = [schema["const"]]
    elif isinstance(schema.get("enum"), list):
        values = schema["enum"]
    else:
        return None
    declared = schema.get("type", list(ALL_TYPES))
    types = {declared} if isinstance(declared, str) else {str(each) for each in declared or ()}
    return [value for value in values if types & _types_of_value(value)] or values


def _types_of_value(value: Any) -> set[str]:
    kind = type_name(value)
    if kind == "integer" or (kind == "number" and float(value).is_integer()):
        return {"integer", "number"}
    return {kind}


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The JSON types a value may have, as far as the schema says; too many rather than too few."""
    schema = resolve(schema, root)
    if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
        return ALL_TYPES
    if "const" in schema:
        return frozenset({type_name(schema["const"])})
    if isinstance(schema.get("enum"), list):
        return frozenset(type_name(value) for value in schema["enum"])
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset({declared})
    if isinstance(declared, list):
        return frozenset(str(each) for each in declared)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return frozenset().union(*(types_of(each, root, depth + 1) for each in schema[key]))
    if isinstance(schema.get("properties"), dict):
        return frozenset({"object"})
    return ALL_TYPES


def type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def says_more(schema: Any, than: frozenset[str] = frozenset()) -> str | None:
    """A keyword of the schema beside notes, `type` and `than`, if there is one."""
    keys = schema.keys() if isinstance(schema, Mapping) else ()
    return next((str(key) for key in keys if _says(key, than)), None)


def _says(keyword: Any, than: frozenset[str]) -> bool:
    return keyword not in _NOTES | than | {"type"} and not str(keyword).startswith("x-")


def inner_json(schema: Any, tool: Tool, *path: str) -> str:
    """The schema of a part of a tool's parameters as a document of its own, for `%json`."""
    root = tool.parameters
    own = dict(schema) if isinstance(schema, Mapping) else {}
    wanted = ("$schema", "$defs", "definitions") if _refers(own) else ("$schema",)
    document = {**{key: root[key] for key in wanted if key in root}, **own}
    where = place(tool, *path)
    own = _without_foreign_references(document, tool, where)
    return held_json(own, where, strict=tool.strict, check=tool.check)


def _refers(schema: Any) -> bool:
    inner = (
        schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ()
    )
    return (isinstance(schema, Mapping) and "$ref" in schema) or any(map(_refers, inner))


def _is_defined(reference: Any) -> bool:
    return str(reference).startswith(("#/$defs/", "#/definitions/"))


def _without_foreign_references(part: Any, tool: Tool, where: str) -> Any:
    """A reference to anywhere but the definitions would lead elsewhere in a document of its own."""
    if isinstance(part, list):
        return [_without_foreign_references(each, tool, where) for each in part]
    if not isinstance(part, Mapping):
        return part
    if isinstance(part.get("$ref"), str) and not _is_defined(part["$ref"]):
        if tool.strict:
            raise unsupported(where, "$ref")
        return {}
    return {key: _without_foreign_references(value, tool, where) for key, value in part.items()}


def unsupported(where: str, keyword: str) -> ToolsInvalid:
    return ToolsInvalid(
        f"{where}: this model's form of calls cannot be held to '{keyword}'; leave it out, or strict"
    )


def place(tool: Tool, *path: str) -> str:
    """For a message: the innermost names of a long path."""
    return f"tool '{tool.name}'" + "".join(f", parameter '{each[:80]}'" for each in path[-4:])
