"""Whether no value fits two of several schemas: then "exactly one" (oneOf) is "any".

Proven or not; "not" says nothing. What proves it: types that exclude each other, or listed values, or a
property (a discriminator) that either object needs and for which that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

MAX_BRANCHES = 200  # each is compared with each
_MAX_DEPTH = 6

Dereference = Callable[[object], Mapping[str, Any] | None]


def are_disjoint(branches: list[Any], dereference: Dereference) -> bool:
    """dereference: what a schema says that may be nothing but a reference; None if that is unclear."""
    if len(branches) > MAX_BRANCHES:
        return False
    read = [dereference(branch) for branch in branches]
    return all(_exclude(a, b, dereference, _MAX_DEPTH) for a, b in combinations(read, 2))


def _exclude(
    a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, dereference: Dereference, depth: int
) -> bool:
    if a is None or b is None or depth == 0:
        return False
    if not (_types(a) & _types(b)):
        return True
    values = _values(a), _values(b)
    if values[0] is not None and values[1] is not None:
        return not (values[0] & values[1])
    if _types(a) & _types(b) != {"object"}:
        return False
    first, second = _object(a, "properties"), _object(b, "properties")
    needed = _required(a) | _required(b)
    return any(
        _exclude(dereference(first[key]), dereference(second[key]), dereference, depth - 1)
        for key in needed & first.keys() & second.keys()
    )


def _types(schema: Mapping[str, Any]) -> set[str]:
    """What a value that fits may be; integers are numbers."""
    values = _values(schema)
    if values is not None:
        return {kind for kind, _ in values}
    found = schema.get("type")
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list):
        return {"object", "array", "string", "number", "boolean", "null"}
    return {"number" if kind == "integer" else kind for kind in found if isinstance(kind, str)}


def _values(schema: Mapping[str, Any]) -> set[tuple[str, Any]] | None:
    """The values it lists, if all are scalars: with their type, as 1 is not true, and 1.0 is 1."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list):
        return None
    found: set[tuple[str, Any]] = set()
    for value in listed:
        if value is None:
            found.add(("null", None))
        elif isinstance(value, bool):
            found.add(("boolean", value))
        elif isinstance(value, int | float):
            found.add(("number", value))
        elif isinstance(value, str):
            found.add(("string", value))
        else:
            return None
    return found


def _object(schema: Mapping[str, Any], keyword: str) -> Mapping[str, Any]:
    found = schema.get(keyword)
    return found if isinstance(found, dict) else {}


def _required(schema: Mapping[str, Any]) -> set[str]:
    found = schema.get("required")
    return {key for key in found if isinstance(key, str)} if isinstance(found, list) else set()
