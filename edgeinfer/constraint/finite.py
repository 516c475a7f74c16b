"""Whether a schema can be answered before the context is full: `{"next": …}` without end cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from edgeinfer.constraint.keywords import TYPES

Schema = bool | dict[str, Any]

_MAX_ROUNDS = 12  # what is not found to be finite by then counts as endless


def without_endless(root: Schema, definitions: Mapping[str, Schema]) -> tuple[Schema, dict[str, Schema]]:
    """A checked schema (`json_schema.py`) with `false` in place of what no finite JSON fits: an answer
    that went there would not come back. Contradictions are not looked for."""
    finite = _finite_of(definitions)
    pruned = {name: _pruned(definitions[name], finite) for name in definitions if name in finite}
    return _pruned(root, finite), pruned


def _finite_of(definitions: Mapping[str, Schema]) -> set[str]:
    finite: set[str] = set()
    for _ in range(_MAX_ROUNDS):
        before = len(finite)
        # what is referred to comes after what refers to it
        for name in reversed(list(definitions)):
            if name not in finite and _is_finite(definitions[name], finite):
                finite.add(name)
        if len(finite) == before:
            break
    return finite


def _pruned(schema: Schema, finite: Set[str]) -> Schema:
    if isinstance(schema, bool):
        return schema
    pruned = dict(schema)
    for keyword in ("allOf", "anyOf", "prefixItems"):
        if keyword in schema:
            pruned[keyword] = [_pruned(each, finite) for each in schema[keyword]]
    for keyword in ("properties", "patternProperties"):
        if keyword in schema:
            pruned[keyword] = {key: _pruned(each, finite) for key, each in schema[keyword].items()}
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            pruned[keyword] = _pruned(schema[keyword], finite)
    # Its parts are judged by now: those that are not are false.
    return pruned if _is_finite_if(pruned, finite, lambda part: part is not False) else False


def _is_finite(schema: Schema, finite: Set[str]) -> bool:
    if isinstance(schema, bool):
        return schema
    return _is_finite_if(schema, finite, lambda part: _is_finite(part, finite))


def _is_finite_if(schema: dict[str, Any], finite: Set[str], judge: Callable[[Schema], bool]) -> bool:
    """finite: definitions that are. judge: which of its parts are."""
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in finite:
        return False
    if not all(judge(each) for each in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(judge(each) for each in schema["anyOf"]):
        return False
    types = schema.get("type", list(TYPES))
    for kind in types if isinstance(types, list) else [types]:
        if kind == "object":
            if all(judge(_property(schema, key)) for key in schema.get("required", ())):
                return True
        elif kind == "array":
            if all(judge(each) for each in _needed_items(schema)):
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
