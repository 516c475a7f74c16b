"""Twenty JSON schemas as applications have them, each with something to ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    name: str
    question: str
    schema: dict[str, Any]


def _object(
    required: str, optional: dict[str, Any] | None = None, /, **properties: Any
) -> dict[str, Any]:
    """required: names, separated by blanks; "*": all."""
    names = list(properties) if required == "*" else required.split()
    return {"type": "object", "properties": {**properties, **(optional or {})}, "required": names}


def _strings(**options: Any) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "string"}, **options}


STRING, INTEGER, NUMBER, BOOLEAN = (
    {"type": name} for name in ("string", "integer", "number", "boolean")
)
NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}

_CAT = _object(
    "kind lives", kind={"const": "cat"}, lives={"type": "integer", "minimum": 1, "maximum": 9}
)
_DOG = _object("kind tricks", kind={"const": "dog"}, tricks=_strings(maxItems=3))
_BIRD = _object(
    "kind wingspan_cm", kind={"const": "bird"}, wingspan_cm={"type": "number", "exclusiveMinimum": 0}
)

CASES = (
    Case("person", "Describe a person.", _object("*", name=STRING, age={"type": "integer", "minimum": 0,
         "maximum": 120}, email={"type": "string", "format": "email"})),
    Case("sentiment", "Is 'I love this film' positive?", _object("*", label={"enum": ["positive",
         "negative", "neutral"]}, confidence={"type": "number", "minimum": 0, "maximum": 1})),
    Case("recipe", "Give me a recipe for pancakes.", _object("title ingredients steps", title=STRING,
         ingredients={"type": "array", "minItems": 1, "maxItems": 8, "items": _object("*", name=STRING,
         grams={"type": "number", "minimum": 0})}, steps=_strings(minItems=1, maxItems=6))),
    Case("address", "Where is the Eiffel Tower?", _object("street city country",
         {"postcode": {"type": "string", "pattern": "^[0-9]{5}$"}}, street=STRING, city=STRING,
         country={"type": "string", "minLength": 2, "maxLength": 2, "pattern": "^[A-Z]+$"})),
    Case("event", "When is the next full moon party?", _object("*", title={"type": "string",
         "maxLength": 80}, starts={"type": "string", "format": "date-time"},
         ends={"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]}, public=BOOLEAN)),
    Case("pets", "Which pets do you have?", {"type": "array", "minItems": 1, "maxItems": 4, "items":
         {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}, {"$ref": "#/$defs/bird"}]},
         "$defs": {"cat": _CAT, "dog": _DOG, "bird": _BIRD}}),
    Case("tree", "Draw the family tree of a queen.", {"$ref": "#/$defs/node", "$defs": {"node": _object(
         "name children", name={"type": "string", "maxLength": 40}, children={"type": "array",
         "maxItems": 3, "items": {"$ref": "#/$defs/node"}})}}),
    Case("linked list", "Count from one to five.", {"$ref": "#/$defs/link",
         "$defs": {"link": _object("*", value=INTEGER, next={"anyOf": [{"$ref": "#/$defs/link"},
         {"type": "null"}]})}}),
    Case("expression", "Write 2 * (3 + 4) as a tree.", {"$ref": "#/$defs/e",
         "$defs": {"e": {"anyOf": [NUMBER, _object("*", op={"enum": ["+", "-", "*", "/"]},
         left={"$ref": "#/$defs/e"}, right={"$ref": "#/$defs/e"})]}}}),
    Case("invoice", "Make an invoice for two chairs.", _object("*", number={"type": "string",
         "pattern": "^INV-[0-9]{4,6}$"}, issued={"type": "string", "format": "date"},
         lines={"type": "array", "minItems": 1, "maxItems": 5, "items": _object("*", text=STRING,
         count={"type": "integer", "minimum": 1, "maximum": 999}, price={"type": "number", "minimum": 0,
         "multipleOf": 0.25})}, paid=BOOLEAN)),
    Case("settings", "Suggest settings for a text editor.", _object("theme", {"font": _object("family",
         {"size": {"type": "integer", "minimum": 6, "maximum": 72}}, family=STRING),
         "rulers": {"type": "array", "items": INTEGER, "maxItems": 4}, "wrap": {"type": ["boolean",
         "integer"]}}, theme={"enum": ["dark", "light"]})),
    Case("dictionary", "Count the animals on a farm.", {"type": "object",
         "additionalProperties": {"type": "integer", "minimum": 0}, "minProperties": 1}),
    Case("table", "Make a table of three cities.", _object("*", columns=_strings(minItems=2, maxItems=4),
         rows={"type": "array", "maxItems": 6, "items": {"type": "array", "items": {"anyOf": [STRING,
         NUMBER, {"type": "null"}]}, "maxItems": 4}})),
    Case("point", "Where is Berlin?", {"type": "array", "prefixItems": [{"type": "number",
         "minimum": -180, "maximum": 180}, {"type": "number", "minimum": -90, "maximum": 90}],
         "items": False, "minItems": 2}),
    Case("ticket", "My printer does not print. File a ticket.", _object("*", summary={"type": "string",
         "minLength": 10, "maxLength": 120}, severity={"type": "integer", "enum": [1, 2, 3, 4]},
         labels={"type": "array", "items": {"enum": ["bug", "hardware", "network", "question"]},
         "maxItems": 4}, owner=NULLABLE)),
    Case("device", "Describe a router.", _object("*", id={"type": "string", "format": "uuid"},
         address={"type": "string", "format": "ipv4"}, home={"type": "string", "format": "uri",
         "maxLength": 60}, mac={"type": "string", "pattern": "^([0-9a-f]{2}:){5}[0-9a-f]{2}$"})),
    Case("quiz", "Write a quiz question about space.", _object("*", question=STRING,
         choices=_strings(minItems=4, maxItems=4), answer={"type": "integer", "minimum": 0,
         "maximum": 3})),
    Case("employee", "Describe an employee.", {"allOf": [_object("name", name=STRING), _object("salary",
         {"boss": NULLABLE}, salary={"type": "number", "exclusiveMinimum": 0, "maximum": 1000000})]}),
    Case("version", "Which version of Python is this?", {"type": "string", "pattern":
         r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z-]+)?$"}),
    Case("review", "Review the last book you have read.", _object("title stars",
         {"quotes": {"type": "array", "items": _object("*", text=STRING, page={"type": "integer",
         "minimum": 1})}, "tags": _strings()}, title=STRING, stars={"type": "number", "minimum": 0,
         "maximum": 5, "multipleOf": 0.5})),
)  # fmt: skip
