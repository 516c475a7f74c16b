"""Reading a schema's text, and what is looked at before it is understood: size, draft, references."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from edgeinfer.constraint.keywords import APPLICATORS, OBJECT
from edgeinfer.errors import ConstraintInvalid

MAX_BYTES = 256 * 1024
MAX_DEPTH = 64
MAX_VALUES = 20_000  # of JSON, constants and annotations included
MAX_CHOICES = 5_000  # values in all enums together

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: no UTF-8 has it
_DRAFT = re.compile(r"https?://json-schema\.org/(?:draft-0?(\d)|draft/(20\d\d)-\d\d)/schema#?")
_NEWEST = 2020


def read_schema(text: str, name: str) -> object:
    """The JSON of a schema. Raises ConstraintInvalid."""
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        raise ConstraintInvalid(f"{name}: the schema has {size} bytes; at most {MAX_BYTES} are taken")
    # Before the JSON reader, which recurses. Text that is no JSON may fool it; then the reader stops
    # early.
    depth = deepest = 0
    for bracket in re.findall(r"[][{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        _too_deep(name)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        _too_deep(name)
    except ValueError as error:
        raise ConstraintInvalid(f"{name}: the schema is not JSON: {error}") from None


def check_size(schema: object, name: str) -> None:
    """Raises ConstraintInvalid."""
    count = choices = 0
    pending: list[tuple[object, int]] = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        count += 1
        if count > MAX_VALUES:
            raise ConstraintInvalid(f"{name}: the schema has more than {MAX_VALUES} values")
        texts = (value,) if isinstance(value, str) else value if isinstance(value, dict) else ()
        if any(isinstance(each, str) and _HALF.search(each) for each in texts):
            raise ConstraintInvalid(f"{name}: the schema has half a character, \\ud800 to \\udfff")
        if isinstance(value, dict | list) and depth > MAX_DEPTH:
            _too_deep(name)
        if isinstance(value, dict):
            listed = value.get("enum")
            choices += len(listed) if isinstance(listed, list) else 0
            pending += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            pending += [(each, depth + 1) for each in value]
    if choices > MAX_CHOICES:
        raise ConstraintInvalid(
            f"{name}: the schema keyword 'enum' lists {choices} values in all; at most {MAX_CHOICES}",
            "enum",
        )


def draft_of(schema: object) -> int | None:
    """The `$schema`'s draft: 4, 6, 7, 2019 or 2020, which it is if there is none. None: another one."""
    said = schema.get("$schema") if isinstance(schema, dict) else None
    if not isinstance(said, str):
        return _NEWEST
    found = _DRAFT.fullmatch(said)
    return int(found[1] or found[2]) if found else None


def combines(schema: object) -> bool:
    """Whether anywhere an object is described by several schemas at once (allOf, or keywords beside
    anyOf or $ref), of which none knows all properties."""
    for each in objects_in(schema):
        applied = [key for key in APPLICATORS if key in each and key not in ("enum", "const")]
        if len(applied) > 1 or (applied and OBJECT & each.keys()):
            return True
        if isinstance(each.get("allOf"), list) and len(each["allOf"]) > 1:
            return True
    return False


def objects_in(schema: object) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value, itself included."""
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield value
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def refers_to(root: object, pointer: str) -> object:
    """What stands at a JSON pointer ("#/…", not percent-encoded); None if there is nothing."""
    found = root
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and len(key) < 6 and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def _too_deep(name: str) -> NoReturn:
    raise ConstraintInvalid(f"{name}: the schema is nested more than {MAX_DEPTH} levels deep")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
