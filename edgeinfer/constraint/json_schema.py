"""A JSON schema as llguidance may see it: all of it enforced, or refused by the name of a keyword.

`checked_schema` writes the schema anew out of what it understood, so that nothing else gets through.
Beside what `keywords.py` refuses, this is what llguidance 1.9.1 takes and does not hold, and what is
done:

- a key may be written twice, which `minProperties` counts as two: more than one free key is refused;
- a bound or constant beyond what a double holds is rounded: refused;
- a bound that is excluded passes as a number with more digits than doubles tell apart, or as a whole
  one: the number next to it, which is included, stands in its place;
- `prefixItems` is dropped beside `additionalItems`: the older form of both is translated;
- `oneOf` of references is refused though nothing fits two of them: proven here, then `anyOf`;
- a schema that no finite answer fits is taken, which ends in "too many items": `false` in its place.

Where a schema leaves something open, the answer is held to less, which is valid: an object that lists
its properties and does not mention `additionalProperties` gets no others (a small model would not stop
adding some), and a schema without `type` whose keywords are all about one type gets that type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NoReturn
from urllib.parse import unquote

from edgeinfer.constraint import formats
from edgeinfer.constraint.bounds import MAX_BOUND, MAX_EXACT, is_exact, is_read_exactly, next_to, within
from edgeinfer.constraint.conjunctions import (
    MAX_MULTIPLE,
    TooMuch,
    check_conjunctions,
    decimal_coefficient,
)
from edgeinfer.constraint.disjoint import Disjointness
from edgeinfer.constraint.finite import without_endless
from edgeinfer.constraint.keywords import (
    ANNOTATIONS,
    APPLICATORS,
    ARRAY,
    ENFORCED,
    NUMBER,
    OBJECT,
    REFUSED,
    STRING,
    TYPES,
    is_foreign,
)
from edgeinfer.constraint.patterns import PatternRefused, portable_pattern
from edgeinfer.constraint.schema_text import check_size, combines, draft_of, refers_to
from edgeinfer.errors import ConstraintInvalid

MAX_REFERENCES = 500  # different ones
MAX_LENGTH = 2**20  # of strings, arrays and objects

# How JSON is written. Without blanks, of which a small model writes pages. Without \uXXXX: spelt with it
# a key would pass for another one, and every character that JSON needs escaped but DEL has a short form
# or is no text.
COMPACT: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    "json_allowed_escapes": 'nrbtf\\"',
}

APPLIED = frozenset({"allOf", "anyOf", "oneOf", "$ref"})

Schema = bool | dict[str, Any]


def checked_schema(schema: object, name: str) -> dict[str, Any]:
    """The schema for llguidance, how JSON is to be written (`x-guidance`) included.

    schema: of `json.loads`. name: what messages begin with. Raises ConstraintInvalid.
    """
    check_size(schema, name)
    return _Reader(schema, name).document()


class _Reader:
    def __init__(self, root: object, name: str) -> None:
        self._root = root
        self._name = name
        self._draft = draft_of(root)
        self._closes_objects = not combines(root)
        self._definitions: dict[str, str] = {}  # pointer into the user's schema -> name in ours
        self._unread: list[str] = []  # of those pointers
        self._meant: dict[str, Mapping[str, Any] | None] = {}  # reference -> what it says in the end
        self._disjointness = Disjointness(self._dereferenced_or_none)

    def document(self) -> dict[str, Any]:
        root: Schema = self._schema(self._root, "#")
        definitions: dict[str, Schema] = {}
        while self._unread:
            pointer = self._unread.pop()
            definitions[self._definitions[pointer]] = self._schema(self._resolve(pointer, "#"), pointer)
        root, definitions = without_endless(root, definitions)
        if root is False:
            raise ConstraintInvalid(
                f"{self._name}: no finite JSON fits the schema: it is false, or requires a property that"
                " refers back to its own object"
            )
        try:
            check_conjunctions(root, definitions)
        except TooMuch as error:
            self._unsupported(error.keyword, "#", f"{error}")
        document: dict[str, Any] = dict(root) if isinstance(root, dict) else {}
        if definitions:
            document["$defs"] = definitions
        return {**document, "x-guidance": dict(COMPACT)}

    # -- complaints ------------------------------------------------------------------------------

    def _unsupported(self, keyword: str, at: str, advice: str) -> NoReturn:
        raise ConstraintInvalid(
            f"{self._name}: the schema keyword '{keyword}' at {at} is not supported; {advice}", keyword
        )

    def _wrong(self, keyword: str, at: str, expected: str) -> NoReturn:
        raise ConstraintInvalid(
            f"{self._name}: the schema keyword '{keyword}' at {at} must be {expected}", keyword
        )

    # -- one schema ------------------------------------------------------------------------------

    def _schema(self, schema: object, at: str) -> Schema:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise ConstraintInvalid(f"{self._name}: the schema at {at} must be an object or a boolean")
        schema = _without_unevaluated(schema)
        self._check_keywords(schema, at)
        types = self._types(schema, at)
        described: dict[str, Any] = {}
        applied: dict[str, Any] = {}
        if types is not None:
            described["type"] = types[0] if len(types) == 1 else types
        if STRING & schema.keys():
            self._string(schema, at, types, described, applied)
        if NUMBER & schema.keys() or ("format" in schema and not _may_be(types, "string")):
            self._number(schema, at, types, described)
        if ARRAY & schema.keys():
            self._array(schema, at, described)
        if OBJECT & schema.keys():
            self._object(schema, at, described)
        self._apply(schema, at, applied)
        first = next((key for key in schema if key in ENFORCED), "type")
        # Properties come in the order of the schema: those of allOf first, if that is written first.
        return {**applied, **described} if first in APPLICATORS else {**described, **applied}

    def _check_keywords(self, schema: Mapping[str, Any], at: str) -> None:
        for keyword, value in schema.items():
            if keyword in ENFORCED:
                continue
            if keyword in REFUSED:
                self._unsupported(keyword, at, REFUSED[keyword])
            if keyword in ("$id", "id") and at != "#":
                self._unsupported(keyword, at, "only the whole schema may have a name of its own")
            if keyword == "$schema" and (not isinstance(value, str) or self._draft is None):
                self._unsupported(keyword, at, "known are the drafts 4, 6, 7, 2019-09 and 2020-12")
            if keyword not in ANNOTATIONS and not is_foreign(keyword):
                near = get_close_matches(keyword, sorted(ENFORCED), n=1)
                hint = (
                    f"did you mean '{near[0]}'?"
                    if near
                    else "it is no keyword of JSON Schema; remove it"
                )
                self._unsupported(keyword[:80], at, hint)

    def _types(self, schema: Mapping[str, Any], at: str) -> list[str] | None:
        found = schema.get("type")
        if found is None:
            return _meant_type(schema) if "type" not in schema else self._wrong_type(at)
        types = found if isinstance(found, list) else [found]
        if not types or any(not isinstance(each, str) or each not in TYPES for each in types):
            self._wrong_type(at)
        return list(dict.fromkeys(types))

    def _wrong_type(self, at: str) -> NoReturn:
        self._wrong("type", at, f"one of {', '.join(TYPES)}, or a list of them")

    # -- strings and numbers ---------------------------------------------------------------------

    def _string(
        self,
        schema: Mapping[str, Any],
        at: str,
        types: list[str] | None,
        described: dict[str, Any],
        applied: dict[str, Any],
    ) -> None:
        self._counts(schema, at, ("minLength", "maxLength"), described)
        if "pattern" in schema:
            described["pattern"] = self._pattern("pattern", schema["pattern"], at)
        if "format" not in schema or not _may_be(types, "string"):
            return
        wanted = schema["format"]
        if not isinstance(wanted, str):
            self._wrong("format", at, "a string")
        if wanted in formats.NATIVE:
            described["format"] = formats.NATIVE[wanted]
        elif wanted in formats.PATTERNS:
            if "pattern" not in described:
                described["pattern"] = formats.PATTERNS[wanted]
            else:
                applied.setdefault("allOf", []).append({"pattern": formats.PATTERNS[wanted]})
        elif wanted not in formats.FREE and ("pattern" not in schema or wanted in formats.STANDARD):
            known = ", ".join(sorted((*formats.NATIVE, *formats.PATTERNS)))
            self._unsupported("format", at, f"{wanted[:40]!r} is none of {known}; use pattern")

    def _pattern(self, keyword: str, pattern: object, at: str) -> str:
        if not isinstance(pattern, str):
            self._wrong(keyword, at, "a regular expression in a string")
        try:
            return portable_pattern(pattern)
        except PatternRefused as error:
            self._unsupported(keyword, at, f"in {pattern[:80]!r}: {error}")

    def _number(
        self,
        schema: Mapping[str, Any],
        at: str,
        types: list[str] | None,
        described: dict[str, Any],
    ) -> None:
        whole = types is not None and "integer" in types and "number" not in types
        for keyword in ("minimum", "maximum"):
            if keyword in schema:
                described[keyword] = self._bound(keyword, schema[keyword], at)
        for keyword, beside in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            value = schema.get(keyword)
            if value is True and beside in described:  # draft 4
                value = described.pop(beside)
            elif keyword in schema and value is not False:
                value = self._exact(keyword, value, at)
            if value is None or isinstance(value, bool):
                continue
            inner = next_to(value, above=beside == "minimum", whole=whole)
            if inner is None:
                self._unsupported(keyword, at, f"numbers next to it are not told apart; use {beside}")
            narrower = max if beside == "minimum" else min
            described[beside] = narrower(described.get(beside, inner), inner)
        if "multipleOf" in schema:
            described["multipleOf"] = self._multiple(schema["multipleOf"], at)
        wanted = schema.get("format")
        if isinstance(wanted, str) and wanted in formats.NUMBERS:
            bounds = formats.NUMBERS[wanted]
            if bounds is not None and types is not None and not _may_be(types, "string"):
                described["minimum"] = max(bounds[0], described.get("minimum", bounds[0]))
                described["maximum"] = min(bounds[1], described.get("maximum", bounds[1]))
        elif wanted is not None and not _may_be(types, "string"):
            self._unsupported("format", at, f"{str(wanted)[:40]!r} is no format of numbers; remove it")

    def _bound(self, keyword: str, value: object, at: str) -> int | float:
        """One that is out of reach is brought as near as is exact: that of 64-bit integers is common."""
        if isinstance(value, int) and not isinstance(value, bool) and not is_exact(value):
            if keyword == "minimum" and value < 0:
                return -MAX_BOUND if value < -MAX_BOUND else -MAX_EXACT
            if keyword == "maximum" and value > 0:
                return MAX_BOUND if value > MAX_BOUND else MAX_EXACT
        return within(self._exact(keyword, value, at), above=keyword == "minimum")

    def _exact(self, keyword: str, value: object, at: str) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._wrong(keyword, at, "a number")
        if not is_exact(value):
            self._unsupported(keyword, at, "the number has more digits than are told apart")
        return value

    def _multiple(self, value: object, at: str) -> int | float:
        """A whole number, or one of halves, quarters, …: whether 0.07 is a multiple of 0.01 is a matter
        of rounding to those who validate with doubles, and they say no."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self._wrong("multipleOf", at, "a number above 0")
        numerator, denominator = value.as_integer_ratio()
        if denominator > 1024:
            self._unsupported(
                "multipleOf", at, "only whole numbers, halves, quarters, … down to 1/1024 are"
            )
        if decimal_coefficient(value) > MAX_MULTIPLE:
            self._unsupported("multipleOf", at, f"at most {MAX_MULTIPLE}, its point left out")
        return numerator if denominator == 1 else value

    def _counts(
        self,
        schema: Mapping[str, Any],
        at: str,
        keywords: tuple[str, ...],
        described: dict[str, Any],
    ) -> None:
        for keyword in keywords:
            if keyword in schema:
                described[keyword] = self._count(keyword, schema[keyword], at)

    def _count(self, keyword: str, value: object, at: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self._wrong(keyword, at, "a whole number of at least 0")
        if value > MAX_LENGTH:
            self._unsupported(keyword, at, f"at most {MAX_LENGTH}")
        return value

    # -- arrays ----------------------------------------------------------------------------------

    def _array(self, schema: Mapping[str, Any], at: str, described: dict[str, Any]) -> None:
        self._counts(schema, at, ("minItems", "maxItems"), described)
        unique = schema.get("uniqueItems", False)
        if not isinstance(unique, bool):
            self._wrong("uniqueItems", at, "true or false")
        if unique and described.get("maxItems", 2) > 1:
            self._unsupported("uniqueItems", at, "leave it out and look at the answer's items")
        first, rest = schema.get("prefixItems"), schema.get("items")
        first_at, rest_at = f"{at}/prefixItems", f"{at}/items"
        if isinstance(rest, list):  # until 2019-09
            if first is not None:
                self._wrong("items", at, "a schema, beside prefixItems")
            first, first_at = rest, f"{at}/items"
            rest, rest_at = schema.get("additionalItems"), f"{at}/additionalItems"
        elif first is not None and self._draft is not None and self._draft < 2020:
            self._unsupported("prefixItems", at, "its $schema is a draft that does not have it")
        if first is not None:
            if not isinstance(first, list) or not first:
                self._wrong("prefixItems", at, "a list of schemas")
            described["prefixItems"] = [
                self._schema(each, f"{first_at}/{index}") for index, each in enumerate(first)
            ]
        if rest is not None:
            described["items"] = self._schema(rest, rest_at)

    # -- objects ---------------------------------------------------------------------------------

    def _object(self, schema: Mapping[str, Any], at: str, described: dict[str, Any]) -> None:
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            self._wrong("required", at, "a list of strings")
        properties = self._schemas("properties", schema, at)
        patterns = self._schemas("patternProperties", schema, at)
        others = schema.get("additionalProperties")
        if others is not None:
            others = self._schema(others, f"{at}/additionalProperties")
        elif (
            self._closes_objects
            and properties
            and not patterns
            and properties.keys() >= set(required)
            and "propertyNames" not in schema
        ):
            others = False
        if "propertyNames" in schema:
            others = self._names(schema["propertyNames"], at, properties, patterns, others)
        if properties:
            described["properties"] = properties
        if patterns:
            described["patternProperties"] = {
                self._pattern("patternProperties", pattern, at): each
                for pattern, each in patterns.items()
            }
        if others is not None:
            described["additionalProperties"] = others
        if required:
            described["required"] = list(dict.fromkeys(required))
        self._property_counts(schema, at, described)

    def _schemas(self, keyword: str, schema: Mapping[str, Any], at: str) -> dict[str, Schema]:
        found = schema.get(keyword, {})
        if not isinstance(found, dict):
            self._wrong(keyword, at, "an object of schemas")
        return {
            key: self._schema(each, f"{at}/{keyword}/{_escaped(key)}") for key, each in found.items()
        }

    def _names(
        self,
        names: object,
        at: str,
        properties: dict[str, Schema],
        patterns: dict[str, Schema],
        others: Schema | None,
    ) -> Schema | None:
        """`propertyNames` as what it means for the other three, of which two are changed in place."""
        schema = self._dereferenced(names, f"{at}/propertyNames")
        said = {key: value for key, value in schema.items() if key in ENFORCED or key in REFUSED}
        if said.pop("type", "string") != "string":
            self._unsupported("propertyNames", at, "names are strings")
        if not said:
            return others
        listed = said.get("enum", [said["const"]] if "const" in said else None)
        if len(said) == 1 and isinstance(listed, list) and not patterns:
            allowed = [key for key in listed if isinstance(key, str)]
            for key in properties.keys() - set(allowed):
                properties[key] = False
            for key in allowed:
                properties.setdefault(key, True if others is None else others)
            return False
        is_length = said.keys() <= {"minLength", "maxLength"}
        if not (is_length or said.keys() == {"pattern"}) or properties or patterns:
            self._unsupported(
                "propertyNames", at, "only as a list of names (enum), or as a pattern or lengths alone"
            )
        if is_length:
            counts: dict[str, Any] = {}
            self._counts(said, f"{at}/propertyNames", ("minLength", "maxLength"), counts)
            pattern = rf"^[\s\S]{{{counts.get('minLength', 0)},{counts.get('maxLength', '')}}}$"
        else:
            pattern = said["pattern"]
        self._pattern("pattern", pattern, f"{at}/propertyNames")
        patterns[pattern] = True if others is None else others
        return False

    def _property_counts(self, schema: Mapping[str, Any], at: str, described: dict[str, Any]) -> None:
        """`minProperties` and `maxProperties`, where they say something that can be held."""
        required = len(described.get("required", ()))
        listed = len(described.get("properties", {}))
        optional = listed - sum(
            key in described.get("properties", {}) for key in described.get("required", ())
        )
        closed = described.get("additionalProperties") is False and "patternProperties" not in described
        advice = "list the alternatives with anyOf, or require the properties by name"
        if "minProperties" in schema:
            least = self._count("minProperties", schema["minProperties"], at) - required
            if least > 0:
                # A free key may be written twice, which counts as two here and as one to a reader.
                if least > 1 or (optional and not closed):
                    self._unsupported("minProperties", at, advice)
                described["minProperties"] = least + required
        if "maxProperties" in schema:
            most = self._count("maxProperties", schema["maxProperties"], at)
            if not closed or listed > most:
                if optional and not (closed and most - required == 1):
                    self._unsupported("maxProperties", at, advice)
                described["maxProperties"] = most

    # -- applicators -----------------------------------------------------------------------------

    def _apply(self, schema: Mapping[str, Any], at: str, applied: dict[str, Any]) -> None:
        if "enum" in schema:
            if not isinstance(schema["enum"], list) or not schema["enum"]:
                self._wrong("enum", at, "a list of one value or more")
            applied["enum"] = [self._constant("enum", value, at) for value in schema["enum"]]
        if "const" in schema:
            applied["const"] = self._constant("const", schema["const"], at)
        if "allOf" in schema:
            applied["allOf"] = self._branches("allOf", schema, at) + applied.get("allOf", [])
        if "anyOf" in schema:
            applied["anyOf"] = self._branches("anyOf", schema, at)
        if "oneOf" in schema:
            branches = self._branches("oneOf", schema, at)
            if not self._disjointness.holds(schema["oneOf"]):
                self._unsupported(
                    "oneOf",
                    at,
                    "what fits one branch must not fit another, which is not certain; use anyOf",
                )
            if "anyOf" in applied:
                applied.setdefault("allOf", []).append({"anyOf": branches})
            else:
                applied["anyOf"] = branches
        if "$ref" in schema:
            applied["$ref"] = self._reference(schema["$ref"], at)

    def _branches(self, keyword: str, schema: Mapping[str, Any], at: str) -> list[Schema]:
        found = schema[keyword]
        if not isinstance(found, list) or not found:
            self._wrong(keyword, at, "a list of one schema or more")
        return [self._schema(each, f"{at}/{keyword}/{index}") for index, each in enumerate(found)]

    def _constant(self, keyword: str, value: Any, at: str) -> Any:
        pending = [value]
        while pending:
            each = pending.pop()
            if isinstance(each, dict):
                pending += each.values()
            elif isinstance(each, list):
                pending += each
            elif isinstance(each, str):
                if any(c == "\x7f" or (c < " " and c not in "\b\f\n\r\t") for c in each):
                    self._unsupported(keyword, at, "a control character in a value cannot be written")
            elif each is None or isinstance(each, bool):
                continue
            elif not is_read_exactly(self._exact(keyword, each, at)):
                self._unsupported(keyword, at, "the number has more digits than are told apart")
        return value

    # -- references ------------------------------------------------------------------------------

    def _reference(self, reference: object, at: str) -> str:
        pointer = self._pointer(reference, at)
        self._resolve(pointer, at)
        if pointer not in self._definitions:
            if len(self._definitions) >= MAX_REFERENCES:
                self._unsupported("$ref", at, f"at most {MAX_REFERENCES} different ones")
            self._definitions[pointer] = f"d{len(self._definitions)}"
            self._unread.append(pointer)
        return f"#/$defs/{self._definitions[pointer]}"

    def _pointer(self, reference: object, at: str) -> str:
        if not isinstance(reference, str):
            self._wrong("$ref", at, "a string")
        if reference != "#" and not reference.startswith("#/"):
            self._unsupported(
                "$ref", at, f"{reference[:80]!r} is not in the schema itself (#/…); nothing is fetched"
            )
        return "#" if reference in ("#", "#/") else unquote(reference)

    def _resolve(self, pointer: str, at: str) -> object:
        found = refers_to(self._root, pointer)
        if not isinstance(found, dict | bool):
            self._wrong("$ref", at, f"the place of a schema; there is none at {pointer[:80]!r}")
        return found

    def _dereferenced(self, schema: object, at: str) -> Mapping[str, Any]:
        """What a schema that may be nothing but a reference says."""
        passed: list[str] = []
        found: Mapping[str, Any] | None = None
        for _ in range(MAX_REFERENCES):
            if not isinstance(schema, dict):
                found = {} if schema is True else {"not": {}}
                break
            if "$ref" not in schema or any(key in ENFORCED for key in schema if key != "$ref"):
                found = schema
                break
            reference = schema["$ref"]
            if isinstance(reference, str) and reference in self._meant:
                found = self._meant[reference]
                break
            schema = self._resolve(self._pointer(reference, at), at)
            passed.append(reference)
        for reference in passed:
            self._meant[reference] = found
        if found is None:
            self._wrong("$ref", at, "the place of a schema, not a circle of references")
        return found

    def _dereferenced_or_none(self, schema: object) -> Mapping[str, Any] | None:
        try:
            return self._dereferenced(schema, "#")
        except ConstraintInvalid:
            return None


def _without_unevaluated(schema: dict[str, Any]) -> dict[str, Any]:
    """Where nothing but the schema's own keywords looks at properties, what those leave is what
    `additionalProperties` is about; and true says nothing."""
    rest = schema.get("unevaluatedProperties")
    if rest is True or (rest is False and not (APPLIED & schema.keys())):
        schema = {key: value for key, value in schema.items() if key != "unevaluatedProperties"}
        if rest is False:
            schema.setdefault("additionalProperties", False)
    return schema


def _meant_type(schema: Mapping[str, Any]) -> list[str] | None:
    """The type whose keywords these are, if the schema says nothing else."""
    said = schema.keys() & ENFORCED
    families = ((STRING, "string"), (NUMBER, "number"), (ARRAY, "array"), (OBJECT, "object"))
    for family, type_ in families:
        if said and said <= family:
            return [type_]
    return None


def _may_be(types: list[str] | None, wanted: str) -> bool:
    return types is None or wanted in types


def _escaped(key: str) -> str:
    return key[:80].replace("~", "~0").replace("/", "~1")
