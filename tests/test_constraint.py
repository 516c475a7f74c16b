"""What a schema may say: enforced, an annotation, or refused by its name; and never a crash."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import jsonschema_specifications
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.constraint import Constraint, check_constraint, checked_schema
from edgeinfer.constraint.bounds import is_read_exactly, next_to, within
from edgeinfer.constraint.conjunctions import MAX_MULTIPLE, MAX_PROPERTIES
from edgeinfer.constraint.disjoint import Disjointness
from edgeinfer.constraint.json_schema import MAX_REFERENCES
from edgeinfer.constraint.keywords import ANNOTATIONS, ENFORCED, REFUSED
from edgeinfer.constraint.patterns import PatternRefused, portable_pattern
from edgeinfer.constraint.schema_text import MAX_BYTES, MAX_CHOICES, MAX_DEPTH, MAX_VALUES
from edgeinfer.errors import ConstraintInvalid, error_from_wire
from tests.grammar_walk import matcher_of, takes, takes_text, walk


def check(schema: object) -> None:
    check_constraint(Constraint("json_schema", json.dumps(schema)))


def refusal(schema: object) -> ConstraintInvalid:
    with pytest.raises(ConstraintInvalid) as caught:
        check(schema)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("response_format: ")
    return caught.value


def test_every_keyword_of_the_standard_has_its_place() -> None:
    known = ENFORCED | ANNOTATIONS | REFUSED.keys()
    for resource in jsonschema_specifications.REGISTRY.values():
        found = set(resource.contents.get("properties", {}))
        assert found <= known | {"$recursiveAnchor"}, resource.id()
    assert not ENFORCED & ANNOTATIONS and not known & {"maxlength", "x-foo"}


TREE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "n": {"$ref": "#"}},
    "required": ["v"],
}
FIRST_RESTS = {"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}
OLD_TUPLE = {"type": "array", "items": [{"type": "integer"}], "additionalItems": {"type": "string"}}
DICT = {"type": "object", "additionalProperties": {"type": "integer"}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [0, -7, 123], ["1", True, None, 1.5, []]),
        ({"type": ["string", "null"]}, ["a", None], [1, {}]),
        ({"enum": [1, "a", None, True, {"a": [1]}]}, [1, "a", None, True, {"a": [1]}], [2, False, "b"]),
        ({"const": {"a": [1, "x"]}}, [{"a": [1, "x"]}], [{"a": [1]}, {}]),
        ({"enum": ["a", "b", 1], "type": "string"}, ["a", "b"], [1]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "é😀x"], ["a", "abcd"]),
        ({"minLength": 2.0}, ["ab"], ["a"]),
        ({"type": "string", "pattern": "^a+$"}, ["aa"], ["b", "ab"]),
        ({"type": "string", "pattern": "b"}, ["abc"], ["ac"]),
        ({"minimum": 3, "maximum": 11}, [3, 11, 4.5], [2, 12, "x"]),
        ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5}, [4], [3, 5]),
        ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, [4], [3]),
        ({"type": "integer", "multipleOf": 5}, [0, -15, 20], [3]),
        ({"type": "number", "multipleOf": 0.5}, [1.5, 2], [1.25]),
        ({"type": "integer", "format": "uint8"}, [0, 255], [-1, 256]),
        ({"type": "integer", "format": "int32", "minimum": 5}, [5, 2**31 - 1], [4, 2**31]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1], [1, 2]],
         [[], [1, 2, 3], ["a"]]),
        (FIRST_RESTS, [[], [1], [1, "a"]], [["a"], [1, 1]]),
        (OLD_TUPLE, [[], [1], [1, "a"]], [["a"], [1, 1]]),
        ({"prefixItems": [{"type": "integer"}], "additionalItems": False}, [[1, "x"]], [["x"]]),
        ({"type": "array", "uniqueItems": False}, [[1, 1]], [1]),
        (DICT, [{}, {"a": 1, "b": 2}], [{"a": "x"}]),
        ({**DICT, "properties": {"a": {"type": "string"}}},
         [{"a": "x", "b": 1}], [{"a": 1}, {"b": "x"}]),
        ({**DICT, "required": ["a"]}, [{"a": 1}], [{}, {"a": "x"}]),
        ({**DICT, "minProperties": 1}, [{"a": 1}], [{}]),
        ({**DICT, "maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 2}]),
        ({"properties": {"a": {}, "b": {}}, "minProperties": 1}, [{"a": 1}, {"b": 1}], [{}]),
        ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, [{}, {"b": 1}], [{"a": 1, "b": 2}]),
        ({"properties": {"a": {}, "b": {}}, "maxProperties": 2}, [{"a": 1, "b": 1}], [{"c": 1}]),
        ({"type": "object", "patternProperties": {"^a": {"type": "integer"}},
          "additionalProperties": False},
         [{"ab": 1}], [{"ab": "x"}, {"b": 1}]),
        ({**DICT, "propertyNames": {"enum": ["x", "y"]}}, [{"x": 1}, {"x": 1, "y": 2}], [{"z": 1}]),
        ({**DICT, "propertyNames": {"pattern": "^[a-c]$"}}, [{"a": 1}], [{"d": 1}, {"a": "x"}]),
        ({**DICT, "propertyNames": {"type": "string"}}, [{"z": 1}], [{"z": "x"}]),
        ({**DICT, "propertyNames": {"minLength": 1, "maxLength": 2}}, [{"a": 1, "éb": 2}],
         [{"": 1}, {"abc": 1}]),
        ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False,
          "required": ["a"]}, [{"a": 1}], [{"b": 1}]),
        ({**DICT, "unevaluatedProperties": False}, [{"a": 1}], [{"a": "x"}]),
        ({"properties": {"a": {"$ref": "#/properties/a"}, "b": {}}}, [{"b": 1}, {}], [{"a": 1}]),
        ({"properties": {"a": {"$ref": "#/$defs/i"}, "b": {"items": {"$ref": "#/$defs/i"}},
                         "c": {"anyOf": [{"$ref": "#/$defs/i"}, {"type": "null"}]}},
          "$defs": {"i": {"type": "object", "properties": {"n": {"$ref": "#/$defs/i"}},
                          "required": ["n"]}}},
         [{}, {"b": []}, {"b": [], "c": None}], [{"a": 1}, {"b": [1]}, {"c": {"n": 1}}]),
        ({"allOf": [{"minimum": 3}, {"maximum": 4}], "type": "integer"}, [3], [2, 5]),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
        ({"oneOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}]},
         ["2024-01-01", "2024-01-01T10:00:00Z"], ["x"]),
        ({"oneOf": [{"const": 1}, {"const": True}, {"enum": ["a"]}]}, [1, True, "a"], ["b"]),
        (TREE, [{"v": 1}, {"v": 1, "n": {"v": 2}}], [{}, {"v": 1, "n": {}}]),
        ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "integer"}}}, [1], ["x"]),
        ({"$ref": "#/items/0", "items": [{"type": "array"}]}, [[]], [1]),
        (True, [1, "a", None, [], {"a": 1}], []),
        ({}, [1, {"a": {}}], []),
    ],
)  # fmt: skip
def test_what_is_taken_is_enforced(schema: object, good: list[Any], bad: list[Any]) -> None:
    check(schema)
    assert [value for value in good if not takes(schema, value)] == []
    assert [value for value in bad if takes(schema, value)] == []


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"exclusiveMaximum": 0.3, "minimum": 0}, ["0.25", "0"], ["0.29999999999999999999", "0.3"]),
        ({"exclusiveMaximum": 1000.3}, ["1000.25", "-1"], ["1000.299999999999999", "1000.3"]),
        ({"exclusiveMinimum": 123456.7}, ["123456.75"], ["123456.700000000001", "123456.7"]),
        ({"exclusiveMinimum": 0.1 + 0.2, "maximum": 1}, ["0.31", "1"], ["0.300000000000000041", "0.3"]),
        ({"exclusiveMinimum": 3, "maximum": 3.5}, ["3.1"], ["3", "3.0", "3.00000000000000000001"]),
        ({"type": "integer", "exclusiveMinimum": 2**53 - 1}, [str(2**53)], [str(2**53 - 1)]),
        ({"type": "integer", "exclusiveMaximum": 5.5, "exclusiveMinimum": 2.5}, ["3", "5"], ["2", "6"]),
        ({"type": ["integer", "null"], "exclusiveMinimum": 3, "maximum": 5.5}, ["4", "5"], ["3", "6"]),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, ["-5", str(2**53)],
         [str(2**63), str(-(2**63) - 1)]),
        ({"type": "integer", "minimum": -(2**53) - 1, "maximum": 2**53 + 1}, [str(2**53)],
         [str(2**53 + 2)]),
        # read by llguidance as the double above it
        ({"minimum": 0, "maximum": 0.9544681292911887}, ["0.91"], ["0.9544681292911888"]),
        ({"const": 0.1}, ["0.1"], ["0.10000000000000001"]),
    ],
)  # fmt: skip
def test_bounds_hold_for_who_reads_doubles(schema: object, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not takes_text(schema, text)] == []
    assert [text for text in bad if takes_text(schema, text)] == []


@given(st.floats(-1e15, 1e15), st.booleans(), st.booleans())
def test_the_number_next_to_a_bound_is_beyond_it(bound: float, above: bool, whole: bool) -> None:
    found = next_to(bound, above=above, whole=whole)
    assert found is not None and is_read_exactly(found)
    assert found > bound if above else found < bound
    assert abs(found - bound) <= max(1e-13, abs(bound) * 1e-13) or whole or abs(found - bound) <= 1
    kept = within(bound, above=above)
    assert is_read_exactly(kept) and (kept >= bound if above else kept <= bound)


FORMATS = {
    "date": (["2024-02-29", "2000-02-29", "0001-12-31"],
             ["2023-02-29", "1900-02-29", "0000-01-01", "2024-13-01"]),
    "time": (["23:59:59Z", "00:00:00.25+05:30"], ["24:00:00Z", "23:59:60Z", "12:00:00", "12:00"]),
    "date-time": (["2024-02-29T10:00:00Z"], ["2023-02-29T10:00:00Z", "2024-02-28 10:00:00Z"]),
    "email": (["a.b@example.org"], ["a", "a@", "a b@c.d"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
    "uuid4": (["123e4567-e89b-42d3-a456-426614174000"], ["123e4567-e89b-12d3-a456-426614174000"]),
    "base64": (["", "YWI=", "YWJj"], ["YWI", "a b="]),
    "base64url": (["_-A="], ["+/A="]),
    "ipv4": (["127.0.0.1"], ["256.0.0.1", "1.2.3"]),
    "ipv6": (["::1", "fe80::1:2"], ["::1::", "12345::"]),
    "hostname": (["example.org"], ["-a.b", "a..b"]),
    "uri": (["https://example.org/a?b=c#d"], ["example", "http://a b"]),
    "uri-reference": (["https://example.org/a"], ["a b"]),
    "duration": (["P1DT2H", "PT5M"], ["1h", "P"]),
    "json-pointer": (["", "/a/0"], ["a"]),
    "password": (["x"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_enforced(name: str) -> None:
    good, bad = FORMATS[name]
    schema = {"type": "string", "format": name}
    assert [text for text in good if not takes(schema, text)] == []
    assert [text for text in bad if takes(schema, text)] == []
    assert takes({**schema, "pattern": ".*"}, good[0])


@pytest.mark.parametrize(
    ("schema", "keyword", "where"),
    [
        *(({"properties": {"a": {keyword: {}}}}, keyword, "#/properties/a") for keyword in REFUSED),
        ({"type": "array", "uniqueItems": True}, "uniqueItems", "#"),
        ({"type": "object", "requried": ["a"]}, "requried", "did you mean 'required'?"),
        ({"items": {"$id": "http://x"}}, "$id", "#/items"),
        ({"$schema": "https://example.org/mine"}, "$schema", "#"),
        ({"$ref": "https://example.org/x"}, "$ref", "nothing is fetched"),
        ({"$ref": "other.json#/a"}, "$ref", "nothing is fetched"),
        ({"$ref": "#name"}, "$ref", "#"),
        ({"$ref": "#/$defs/none"}, "$ref", "there is none at '#/$defs/none'"),
        ({"$ref": 1}, "$ref", "must be a string"),
        ({"type": "strng"}, "type", "one of object"),
        ({"type": []}, "type", "one of object"),
        ({"type": None}, "type", "one of object"),
        ({"type": "string", "format": "regex", "pattern": "a"}, "format", "'regex' is none of"),
        ({"type": "string", "format": "colour"}, "format", "use pattern"),
        ({"type": "integer", "format": "colour"}, "format", "remove it"),
        ({"type": "string", "pattern": "a(?=b)"}, "pattern", "look-around"),
        ({"type": "string", "pattern": 3}, "pattern", "in a string"),
        ({"type": "string", "minLength": -1}, "minLength", "at least 0"),
        ({"type": "string", "maxLength": True}, "maxLength", "at least 0"),
        ({"type": "string", "maxLength": 10**9}, "maxLength", "at most"),
        ({"minimum": "3"}, "minimum", "a number"),
        ({"minimum": 2**53 + 1}, "minimum", "more digits"),
        ({"maximum": 1e300}, "maximum", "more digits"),
        ({"const": 2**64}, "const", "more digits"),
        ({"const": 0.9120685437784987}, "const", "more digits"),
        ({"type": "integer", "exclusiveMinimum": 2**53}, "exclusiveMinimum", "use minimum"),
        ({"exclusiveMaximum": 2**60}, "exclusiveMaximum", "use maximum"),
        ({"enum": [[2**53 + 1]]}, "enum", "more digits"),
        ({"enum": ["a\x01"]}, "enum", "control character"),
        ({"enum": []}, "enum", "one value or more"),
        ({"multipleOf": 0.01}, "multipleOf", "whole numbers"),
        ({"multipleOf": 0}, "multipleOf", "above 0"),
        ({"multipleOf": MAX_MULTIPLE + 1}, "multipleOf", "at most"),
        ({"items": 1}, None, "the schema at #/items must be"),
        ({"prefixItems": []}, "prefixItems", "a list"),
        ({"items": [{}], "prefixItems": [{}]}, "items", "beside prefixItems"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]},
         "prefixItems", "draft"),
        ({"properties": []}, "properties", "an object of schemas"),
        ({"required": [1]}, "required", "a list of strings"),
        ({**DICT, "minProperties": 2}, "minProperties", "by name"),
        ({"properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2}, "maxProperties", "by name"),
        ({"patternProperties": {"a": {}, "b": {}}}, "patternProperties", "not disjoint"),
        ({**DICT, "propertyNames": {"format": "date"}}, "propertyNames", "a list of names"),
        ({"properties": {"a": {}}, "propertyNames": {"minLength": 1}}, "propertyNames", "lengths alone"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {}}, "unevaluatedProperties": False},
         "unevaluatedProperties", "additionalProperties"),
        ({"type": "object", "min_properties": 1}, "min_properties", "did you mean 'minProperties'?"),
        ({"type": "array", "items": {"type": "string", "pattern": "^a\\x00$"}}, "pattern",
         "control character"),
        ({"anyOf": [{"type": "string", "pattern": "^[\\x00-\\x07]*$"}]}, "pattern", "control character"),
        ({"patternProperties": {"\\v": {}}}, "patternProperties", "control character"),
        ({"properties": {"a": {}, "b": {}, "c": {}, "d": {}}, "required": ["a"],
          "allOf": [{"maxProperties": 2}]}, "maxProperties", ""),
        ({**DICT, "propertyNames": {"type": "integer"}}, "propertyNames", "names are strings"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf", "use anyOf"),
        ({"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, "oneOf", "use anyOf"),
        ({"anyOf": []}, "anyOf", "one schema or more"),
        ({"allOf": {}}, "allOf", "one schema or more"),
        ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, None,
         "no finite JSON"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, None,
         "no finite JSON"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, None, "no finite JSON"),
        (False, None, "no finite JSON"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, None, "no JSON fits"),
        ({"type": "string", "const": 5}, None, "no JSON fits"),
        ("text", None, "must be an object or a boolean"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_by_name(
    schema: object, keyword: str | None, where: str
) -> None:
    error = refusal(schema)
    assert error.keyword == keyword
    assert where in str(error)
    assert keyword is None or f"'{keyword}'" in str(error)


def test_an_error_keeps_its_class_over_the_wire() -> None:
    error = error_from_wire("ConstraintInvalid", "response_format: no")
    assert isinstance(error, ConstraintInvalid)
    assert (error.keyword, error.type) == (None, "constraint_invalid")


def test_annotations_say_nothing_and_reach_nobody() -> None:
    noted = dict.fromkeys(ANNOTATIONS - {"$schema", "$id", "id", "$defs"}, "x")
    schema = checked_schema({"type": "string", **noted, "x-order": 1}, "a")
    assert schema.keys() == {"type", "x-guidance"}
    check({"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.org/x"})


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    schema = {
        "properties": {"not": {"type": "integer"}, "x-guidance": {}, "$ref": {}},
        "required": ["not"],
    }
    assert takes(schema, {"not": 1, "x-guidance": 2})
    assert not takes(schema, {"not": "x"})


@pytest.mark.parametrize(
    "text", ['{"a": 1}', '{"a":1 }', '{ "a":1}', '{"a":\n1}', ' {"a":1}', '{"a":1}\n']
)
def test_json_has_no_blanks(text: str) -> None:
    for schema in (DICT, True):
        assert not takes_text(schema, text)


def test_a_key_cannot_be_written_another_way() -> None:
    schema = {**DICT, "properties": {"a": {"type": "string"}}}
    assert takes_text(schema, '{"a":"x"}')
    assert not takes_text(schema, '{"\\u0061":1}')
    assert not takes_text(schema, '{"a":"x","a":1}')


def test_objects_get_no_properties_that_nobody_mentioned() -> None:
    listed = {"type": "object", "properties": {"a": {}}}
    assert not takes(listed, {"a": 1, "b": 1})
    assert takes({**listed, "additionalProperties": True}, {"a": 1, "b": 1})
    assert takes({**listed, "required": ["b"]}, {"a": 1, "b": 1})
    assert takes({"allOf": [listed, {"properties": {"b": {}}}]}, {"a": 1, "b": 1})


def test_properties_come_in_the_order_of_the_schema() -> None:
    base = {"type": "object", "properties": {"z": {}}, "required": ["z"]}
    derived = {"properties": {"a": {}}, "required": ["a"]}
    assert takes_text({"allOf": [base], **derived}, '{"z":1,"a":1}')
    assert not takes_text({"allOf": [base], **derived}, '{"a":1,"z":1}')
    assert takes_text({**derived, "allOf": [base]}, '{"a":1,"z":1}')


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    good: bool


class Owner(pydantic.BaseModel):
    name: str = pydantic.Field(description="who", max_length=20, pattern="^[A-Z]")
    pets: list[Cat | Dog] = []
    favourite: Cat | Dog = pydantic.Field(discriminator="kind")
    ages: dict[Literal["cat", "dog"], int] = {}
    place: tuple[float, float] | None = None
    friends: list[Owner] = []


@pytest.mark.parametrize("kind", ["cat", "dog"])
def test_what_pydantic_writes_is_taken_and_read_back(kind: str) -> None:
    schema = Owner.model_json_schema()
    check(schema)
    for seed in range(20):
        text = walk(matcher_of(schema), seed)
        assert text is not None
        Owner.model_validate_json(text)
    pet = {"kind": "cat", "lives": 1} if kind == "cat" else {"kind": "dog", "good": True}
    owner = {"name": "A", "pets": [pet], "favourite": pet, "ages": {kind: 1}, "place": [1.5, 2]}
    assert takes(schema, owner)


def test_what_zod_writes_is_taken() -> None:
    email = (
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]"
        r"@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    )
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "mail": {"type": "string", "format": "email", "pattern": email},
            "id": {"type": "string", "format": "cuid2", "pattern": "^[0-9a-z]+$"},
            "age": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
            "scores": {
                "type": "object",
                "propertyNames": {"type": "string"},
                "additionalProperties": {"type": "number"},
            },
        },
        "required": ["mail", "id", "age", "scores"],
        "additionalProperties": False,
    }
    value = {"mail": "a.b'c@x.org", "id": "ab1", "age": 3, "scores": {"a": 0.5}}
    assert takes(schema, value)
    for mail in (".a@x.org", "a..b@x.org", "a.@x.org", "a@x"):
        assert not takes(schema, {**value, "mail": mail})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nonsense",
        "NaN",
        '{"minimum": Infinity}',
        '{"a": ' + "1" * 5000 + "}",
        "[" * 63,
        '"\\ud800"',
    ],
)
def test_text_that_is_no_schema_is_one_line(text: str) -> None:
    with pytest.raises(ConstraintInvalid) as caught:
        check_constraint(Constraint("json_schema", text), "--schema a.json")
    assert str(caught.value).startswith("--schema a.json: ")
    assert "\n" not in str(caught.value)


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (nested(MAX_DEPTH), "nested more than"),
        ("[" * 100_000, "nested more than"),
        ('{"a":' * 30_000, "nested more than"),
        ('"' + "x" * MAX_BYTES + '"', "bytes; at most"),
        ('{"enum":[' + ",".join(map(str, range(MAX_CHOICES + 1))) + "]}", "lists 5001 values"),
        (
            '{"default":[' + ",".join("1" for _ in range(MAX_VALUES)) + "]}",
            f"more than {MAX_VALUES} values",
        ),
    ],
)
def test_bombs_are_refused_before_anybody_reads_them(text: str, said: str) -> None:
    with pytest.raises(ConstraintInvalid, match=said):
        check_constraint(Constraint("json_schema", text))


def test_schemas_at_the_limits_are_taken() -> None:
    check_constraint(Constraint("json_schema", nested(MAX_DEPTH - 1)))
    check({"enum": list(range(MAX_CHOICES))})
    check({"type": "array", "minItems": 1, "maxItems": 2**20, "items": {"maxLength": 2**20}})


def chain(length: int) -> dict[str, Any]:
    """Definitions that refer to one another in a row, each with some levels of its own."""
    links = {
        f"a{i}": {
            "anyOf": [{"properties": {"x": {"items": {"$ref": f"#/$defs/a{i + 1}"}}}}, {"type": "null"}]
        }
        for i in range(length)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "integer"}}}


def test_a_long_row_of_references_does_not_overflow_the_stack() -> None:
    before = threading.stack_size()
    check(chain(MAX_REFERENCES - 1))
    assert "at most 500 different ones" in str(refusal(chain(MAX_REFERENCES + 1)))
    assert threading.stack_size() == before


@pytest.mark.parametrize(
    "text", ["(a{1000}){1000}", "a{100000}", "(" * 300 + "a" + ")" * 300, "a" * 3000]
)
def test_patterns_that_cost_too_much_are_refused(text: str) -> None:
    assert refusal({"type": "string", "pattern": text}).keyword == "pattern"


def branches(count: int) -> dict[str, Any]:
    keys = {f"p{i}": {"type": "string"} for i in range(20)}
    return {
        f"b{i}": {"type": "object", "properties": {**keys, "z": {"const": i}}, "required": [*keys, "z"]}
        for i in range(count)
    }


def test_branches_that_exclude_each_other_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = Disjointness._compare

    def counted(self: Disjointness, *arguments: Any) -> bool:
        compared.append(arguments)
        return compare(self, *arguments)

    monkeypatch.setattr(Disjointness, "_compare", counted)
    some = {"oneOf": [{"$ref": f"#/$defs/b{i}"} for i in range(30)]}
    checked_schema({"$defs": branches(30), "properties": {f"a{i}": some for i in range(20)}}, "a")
    assert len(compared) == 30 * 29 // 2


def test_too_many_comparisons_are_not_made() -> None:
    far = {
        key: {**each, "properties": {**each["properties"], "z": {"items": {}}}}
        for key, each in branches(150).items()
    }
    assert (
        refusal({"$defs": far, "oneOf": [{"$ref": f"#/$defs/{key}"} for key in far]}).keyword == "oneOf"
    )


def bombs() -> dict[str, Any]:
    """26 patterns that meet for one string, in every way that makes them meet."""
    each = [{"type": "string", "pattern": f"[a-z]{{{i}}}x"} for i in range(1, 27)]
    nested: dict[str, Any] = each[0]
    beside: dict[str, Any] = each[0]
    for one in each[1:]:
        nested = {"allOf": [nested, one]}
    for one in each[1:20]:
        beside = {**one, "type": ["string", "null"], "anyOf": [beside, {"type": "null"}]}
    row = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", **one} for i, one in enumerate(each)}
    return {
        "allOf": {"allOf": each},
        "nested allOf": nested,
        "anyOf": beside,
        "$ref": {"$ref": "#/$defs/d0", "$defs": {**row, "d26": {"type": "string"}}},
        "properties": {"allOf": [{"properties": {"a": one}} for one in each]},
        "additionalProperties": {
            "allOf": [{"type": "object", "additionalProperties": one} for one in each]
        },
        "patternProperties": {"allOf": [{"patternProperties": {"^a": one}} for one in each]},
        "items": {"allOf": [{"items": one} for one in each]},
        "prefixItems": {"allOf": [{"prefixItems": [one]} for one in each]},
        "alternatives": {
            "allOf": [
                {"anyOf": [{"type": "string", "pattern": f"a{i}{{{j}}}"} for i in range(18)]}
                for j in (1, 2)
            ]
        },
    }


@pytest.mark.parametrize("way", bombs())
def test_patterns_that_meet_in_one_place_are_counted(way: str) -> None:
    assert refusal(bombs()[way]).keyword == "pattern"


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"patternProperties": {f"^a{i}_": {} for i in range(51)}}, "patternProperties"),
        ({"items": {"anyOf": [{"patternProperties": {f"^{i}_{j}": {} for i in range(9)}}
                              for j in range(9)]}}, "patternProperties"),
        ({"anyOf": [{"type": "string", "pattern": f"a{i}"} for i in range(501)]}, "pattern"),
        ({"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": 99 - i}]} for i in range(20)]}, "allOf"),
        ({"allOf": [{"type": "integer", "multipleOf": each} for each in (3989, 3967)]}, "multipleOf"),
        ({"multipleOf": 3989, "type": "integer", "$ref": "#/$defs/a",
          "$defs": {"a": {"multipleOf": 1.5, "type": "number"}}}, "multipleOf"),
        ({"multipleOf": 3.4619140625}, "multipleOf"),
        ({"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}}, "properties"),
        ({"required": [f"p{i}" for i in range(MAX_PROPERTIES + 1)]}, "properties"),
        ({"const": [{f"p{i}": i for i in range(MAX_PROPERTIES + 1)}]}, "properties"),
        ({"allOf": [{"properties": {f"{name}{i}": {} for i in range(1000)}} for name in "ab"]},
         "properties"),
        ({"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", "minLength": i} for i in range(450)}
          | {"d450": {}}, "$ref": "#/$defs/d0"}, "$ref"),
    ],
)  # fmt: skip
def test_what_would_multiply_is_refused_by_name(schema: object, keyword: str) -> None:
    assert refusal(schema).keyword == keyword


def test_patterns_apart_from_one_another_are_no_bomb() -> None:
    word = {"type": "string", "pattern": "^[a-z]+$"}
    mixins = [
        {"properties": {f"{name}{i}": {**word, "maxLength": 9 + i} for i in range(9)}} for name in "abcd"
    ]
    check({"allOf": mixins})
    check({"anyOf": [{**word, "maxLength": i + 1} for i in range(40)]})
    check({"allOf": [word, {"pattern": "a"}, {"pattern": "z$"}]})
    check({"allOf": [{"type": "integer", "multipleOf": each} for each in (4, 6)]})
    check({"type": "integer", "multipleOf": MAX_MULTIPLE, "minimum": 10_001})


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            r"a(?=b)",
            r"(?<!a)b",
            r"(?i)a",
            r"(?P=a)",
            r"(a)\1",
            r"\bfoo",
            r"a\z",
            r"\Aa",
            r"\Z",
            r"\k<a>",
        ),
        *("\x00", r"\x07", r"\u007f", r"a|\v", r"[\x00]", r"[\x00-\x07\x0e]"),
        *("a{", "a{,3}", "a{x}", "[]", "[^]", "[a", "(a", "a)", "a**", "a{2}{3}", "a++", "[a--b]", "\\"),
    ],
)
def test_what_dialects_disagree_about_is_refused(pattern: str) -> None:
    with pytest.raises(PatternRefused):
        portable_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^[^a&&b]$", ["c"], ["a", "&", "b"]),
        (r"^[[a]$", ["[", "a"], ["b"]),
        (r"^\s$", [" ", "\t"], ["\u0085", "\ufeff", "x"]),
        (r"^[^\s]$", ["x"], [" ", "\ufeff"]),
        (r"^\S$", ["x"], [" ", "\ufeff"]),
        (r"^[\S]$", ["x", "]"], [" ", "\ufeff"]),
        (r"^[\s\S]$", ["x", " ", "é"], ["", "xx"]),
        (r"^\W$", ["-", " ", "€"], ["a", "_", "é", "٣"]),
        (r"^\D$", ["a", "é"], ["1", "٣"]),
        (r"^[^\w]$", ["-", "€"], ["a", "é"]),
        (r"^[^\d-]$", ["a", "é"], ["1", "-", "٣"]),
        (r"^[\Wa]$", ["a", "-"], ["b", "é"]),
        (r"^[^\W\D]$", ["1"], ["a", "٣", "-"]),
        (r"^[^\S]$", [" "], ["\u0085", "x"]),
        (r"^[\x00-\x1f-]$", ["\t", "-"], ["a"]),
        (r"^.$", ["x", "é"], ["\n", "\r", "\u2028"]),
        (r"^\w\d$", ["a1"], ["é1", "a٣"]),
        (r"^a|b$", ["ac", "cb"], ["cac"]),
        (r"^(?<year>\d{4})-(?P<m>\d\d)$", ["2024-01"], ["2024"]),
        (r"^\x41\u0042[\/\-\_]$", ["AB/", "AB-", "AB_"], ["AB\\"]),
        (r"^[$^.]\$\.\^$", ["$$.^"], ["a$.^"]),
        (r"^a*?b{2,}?$", ["bb", "aabbb"], ["b"]),
        (r"^}]$", ["}]"], ["]"]),
        (r"", ["", "x"], []),
    ],
)
def test_patterns_mean_what_they_mean_elsewhere(pattern: str, good: list[str], bad: list[str]) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert [text for text in good if not takes(schema, text)] == []
    assert [text for text in bad if takes(schema, text)] == []


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        "é",
        " ",
        ".",
        "-",
        r"\d",
        r"\w",
        r"\s",
        r"\W",
        r"\D",
        r"\S",
        r"[^\w]",
        r"[^\d\s]",
        r"\.",
        r"\-",
        "[ab]",
        "[^ab]",
        "[a-c0]",
        r"[\w-]",
        "[&&a]",
    ]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        inner.map(lambda p: f"({p})"),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "*?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@given(PATTERNS, st.sampled_from(["{}", "^{}$", "^{}", "{}$"]), st.integers(0, 2**32))
def test_texts_of_a_pattern_match_it_in_python(pattern: str, frame: str, seed: int) -> None:
    written = frame.replace("{}", pattern)
    try:
        matcher = matcher_of({"type": "string", "pattern": written})
    except ConstraintInvalid:
        return
    text = walk(matcher, seed, 60)
    if text is None:
        return
    with suppress(TimeoutError), interrupted_after(2.0):
        # as ECMAScript: \w and \d are ASCII
        assert re.search(written, json.loads(text), re.ASCII), (written, text)
        assert re.search(written, json.loads(text)), (written, text)


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Python's search may try more ways than there is time for, where repetitions lie in repetitions."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(sorted(ENFORCED | REFUSED.keys() | {"$defs", "a"})) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_any_json_is_taken_or_refused_in_one_line(schema: object) -> None:
    try:
        check(schema)
    except ConstraintInvalid as error:
        assert "\n" not in str(error)


def test_half_a_character_in_a_schema_is_said() -> None:
    for schema in ({"const": "\ud800"}, {"properties": {"\udfff": {}}}):
        assert "half a character" in str(refusal(schema))


def test_keys_that_are_marked_as_foreign_say_nothing() -> None:
    schema = checked_schema({"type": "string", "ui:widget": 1, "_note": 2, "units": "cm"}, "a")
    assert schema.keys() == {"type", "x-guidance"}


def test_the_check_refuses_what_the_matcher_would() -> None:
    for schema, keyword in (
        ({"patternProperties": {"a": {}, "b": {}}}, "patternProperties"),
        ({"anyOf": [{"type": "number", "multipleOf": each, "minimum": 12345}
                    for each in range(3900, 4000)]}, None),
        ({"type": "string", "pattern": "^a$", "allOf": [{"pattern": "^b$"}]}, None),
    ):  # fmt: skip
        error = refusal(schema)
        assert error.keyword == keyword
        with pytest.raises(ConstraintInvalid) as caught:
            matcher_of(schema)
        assert (str(caught.value), caught.value.keyword) == (str(error), keyword)


def test_other_kinds() -> None:
    check_constraint(Constraint("json_object"))
    check_constraint(Constraint("regex", r"[a-z]{2,3}\d"))
    check_constraint(Constraint("lark", 'start: "a" <[5]> | %json {"type":"integer"}\n'))
    for kind, text in (
        ("regex", "a(?=b)"),
        ("lark", "start: b\n"),
        ("regex", "x" * 300_000),
        ("gbnf", ""),
    ):
        with pytest.raises(ConstraintInvalid, match="response_format: "):
            check_constraint(Constraint(kind, text))  # type: ignore[arg-type]
