"""Whether a schema can be answered before the context is full: `{"next": …}` without end cannot."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from edgeinfer.constraint.keywords import TYPES

Schema = bool | dict[str, Any]


def has_finite_answer(root: Schema, definitions: Mapping[str, Schema]) -> bool:
    """Of a checked schema (`json_schema.py`). False is certain; contradictions it does not look for."""
    finite: set[str] = set()
    while True:
        more = {name for name in definitions.keys() - finite if _is_finite(definitions[name], finite)}
        if not more:
            return _is_finite(root, finite)
        finite |= more


def _is_finite(schema: Schema, finite: Set[str]) -> bool:
    """If the definitions in `finite` are."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in finite:
        return False
    if not all(_is_finite(each, finite) for each in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(_is_finite(each, finite) for each in schema["anyOf"]):
        return False
    types = schema.get("type", list(TYPES))
    for kind in types if isinstance(types, list) else [types]:
        if kind == "object":
            if all(_is_finite(_property(schema, key), finite) for key in schema.get("required", ())):
                return True
        elif kind == "array":
            if all(_is_finite(each, finite) for each in _needed_items(schema)):
                return True
        else:
            return True
    return False


def _property(schema: Mapping[str, Any], key: str) -> Schema:
    if key in schema.get("properties", {}):
        found: Schema = schema["properties"][key]
        return found
    others: Schema = schema.get("additionalProperties", True)
    return True if "patternProperties" in schema else others


def _needed_items(schema: Mapping[str, Any]) -> list[Schema]:
    least = schema.get("minItems", 0)
    needed: list[Schema] = list(schema.get("prefixItems", ()))[:least]
    return needed + [schema.get("items", True)] * (least > len(needed))
