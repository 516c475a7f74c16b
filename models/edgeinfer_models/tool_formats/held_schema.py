"""A tool's schema as a grammar's `%json` takes it: held to the letter, or as far as it can be."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from edgeinfer.errors import ConstraintInvalid

# schema, what messages begin with -> the schema anew, nothing in it that is not enforced, and how JSON
# is written (`x-guidance`). Raises ConstraintInvalid. Handed in: `edgeinfer.constraint.checked_schema`.
SchemaCheck = Callable[[object, str], dict[str, Any]]

# As models write JSON in calls. Without a bound on blanks a small model writes pages of them.
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_MAX_CHECKS = 8  # of one schema
_CHECKS_BY_PLACE = 4  # then what cannot be held is left out wherever it stands
_PLACE = re.compile(r"the schema keyword '.*?' at (#\S*) (?:is not supported|must be)")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "default", "examples", "example")
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def held_json(schema: Mapping[str, Any], where: str, *, strict: bool, check: SchemaCheck | None) -> str:
    """strict: as `check` has it. Otherwise keywords it refuses are left out, the fewest it can tell; at
    last nothing but the type is held.

    check: None leaves all to llguidance, which overlooks more. Raises ConstraintInvalid if strict.
    """
    plain = {
        key: value for key, value in schema.items() if key != "x-guidance"
    }  # ours, not the client's
    if check is None:
        return json.dumps({**plain, "x-guidance": {**_WRITTEN, "lenient": not strict}})
    if not strict:
        return json.dumps({**_loosened(plain, where, check), "x-guidance": _WRITTEN})
    held = check(plain, where)
    # Without \uXXXX: spelt with it, a key would pass for another one.
    escapes = {"json_allowed_escapes": held["x-guidance"]["json_allowed_escapes"]}
    return json.dumps({**held, "x-guidance": {**_WRITTEN, **escapes}})


def _loosened(schema: dict[str, Any], where: str, check: SchemaCheck) -> dict[str, Any]:
    tried = copy.deepcopy(schema)
    for number in range(_MAX_CHECKS):
        try:
            return check(tried, where)
        except ConstraintInvalid as error:
            place = _PLACE.search(str(error)) if number < _CHECKS_BY_PLACE else None
            if error.keyword is None or not _leave_out(tried, error.keyword, place and place[1]):
                break
    kind = schema.get("type")
    return {"type": kind} if kind in _TYPES else {}


def _leave_out(root: dict[str, Any], keyword: str, place: str | None) -> bool:
    """There, or everywhere. False: there is no such keyword."""
    there = _found(root, place) if place else None
    subschemas = [there] if there is not None and keyword in there else list(_subschemas(root))
    having = [each for each in subschemas if keyword in each]
    for each in having:
        value = each.pop(keyword)
        if keyword == "oneOf":  # what fits exactly one fits any
            each.setdefault("anyOf", value)
    return bool(having)


def _found(root: Any, place: str) -> dict[str, Any] | None:
    found = root
    for part in place.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(key)
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found if isinstance(found, dict) else None


def _subschemas(root: Any) -> Iterator[dict[str, Any]]:
    """Not what `properties` lists: a property may be called `pattern`."""
    pending = [root]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            yield part
            for key, value in part.items():
                if key in _BY_NAME and isinstance(value, dict):
                    pending += value.values()
                elif key not in _VALUES:
                    pending.append(value)
