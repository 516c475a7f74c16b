"""Whether no value fits two of several schemas: then "exactly one" (oneOf) is "any".

Proven or not; "not" says nothing. What proves it: types that exclude each other, or listed values, or
formats, or a property (a discriminator) that either object needs and for which that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

MAX_BRANCHES = 200  # each is compared with each
MAX_COMPARISONS = 50_000  # for all oneOfs of a schema; more than that is not proven
_MAX_DEPTH = 6

# No text has two of these. (Who does not look at formats finds that every text fits both branches, and
# that no answer is valid.)
_FORMATS = frozenset({"date", "time", "date-time", "duration", "email", "ipv4", "ipv6", "uuid"})

Dereference = Callable[[object], Mapping[str, Any] | None]


@dataclass(frozen=True)
class _Facts:
    """types: a value that fits may be; integers are numbers. values: listed, if all are scalars.
    discriminators: properties with listed values."""

    schema: Mapping[str, Any]
    types: frozenset[str]
    values: frozenset[tuple[str, Any]] | None
    required: frozenset[str]
    properties: Mapping[str, Any]
    discriminators: Mapping[str, frozenset[tuple[str, Any]]]


class Disjointness:
    """Of the branches of one document, which must not change meanwhile."""

    def __init__(self, dereference: Dereference) -> None:
        """dereference: what a schema says that may be nothing but a reference; None if that is
        unclear."""
        self._dereference = dereference
        self._num_comparisons = 0
        self._known: dict[tuple[int, int], bool] = {}
        self._facts: dict[int, _Facts] = {}  # by id of a schema, which it keeps alive

    def holds(self, branches: list[Any]) -> bool:
        if len(branches) > MAX_BRANCHES:
            return False
        read = [self._read(branch) for branch in branches]
        return all(self._exclude(a, b, _MAX_DEPTH) for a, b in combinations(read, 2))

    def _read(self, schema: object) -> _Facts | None:
        found = self._dereference(schema)
        if found is None:
            return None
        facts = self._facts.get(id(found))
        if facts is None:
            facts = self._facts[id(found)] = self._facts_of(found)
        return facts

    def _facts_of(self, schema: Mapping[str, Any]) -> _Facts:
        properties, required = schema.get("properties"), schema.get("required")
        properties = properties if isinstance(properties, dict) else {}
        required = required if isinstance(required, list) else []
        discriminators = {}
        for key, each in properties.items():
            found = self._dereference(each)
            values = None if found is None else _values(found)
            if values is not None:
                discriminators[key] = values
        return _Facts(
            schema,
            _types(schema),
            _values(schema),
            frozenset(key for key in required if isinstance(key, str)),
            properties,
            discriminators,
        )

    def _exclude(self, a: _Facts | None, b: _Facts | None, depth: int) -> bool:
        if a is None or b is None or depth == 0:
            return False
        pair = (id(a), id(b)) if id(a) < id(b) else (id(b), id(a))
        if pair not in self._known:
            if self._num_comparisons >= MAX_COMPARISONS:
                return False
            self._num_comparisons += 1
            self._known[pair] = False  # for those that contain themselves
            self._known[pair] = self._compare(a, b, depth)
        return self._known[pair]

    def _compare(self, a: _Facts, b: _Facts, depth: int) -> bool:
        both = a.types & b.types
        if not both:
            return True
        if a.values is not None and b.values is not None:
            return not (a.values & b.values)
        if both == {"string"}:
            formats = [each.schema.get("format") for each in (a, b)]
            return formats[0] != formats[1] and all(
                isinstance(each, str) and each in _FORMATS for each in formats
            )
        if both != {"object"}:
            return False
        needed = a.required | b.required
        for key in a.discriminators.keys() & b.discriminators.keys() & needed:
            if not (a.discriminators[key] & b.discriminators[key]):
                return True
        shared = needed & a.properties.keys() & b.properties.keys()
        self._num_comparisons += len(shared)
        return any(
            self._exclude(self._read(a.properties[key]), self._read(b.properties[key]), depth - 1)
            for key in sorted(shared)
        )


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    values = _values(schema)
    if values is not None:
        return frozenset(kind for kind, _ in values)
    found = schema.get("type")
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list):
        return frozenset({"object", "array", "string", "number", "boolean", "null"})
    return frozenset("number" if kind == "integer" else kind for kind in found if isinstance(kind, str))


def _values(schema: Mapping[str, Any]) -> frozenset[tuple[str, Any]] | None:
    """With their type, as 1 is not true, and 1.0 is 1."""
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
    return frozenset(found)
