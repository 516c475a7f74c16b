"""Schemas of tools: a strict one is held to the letter or refused by name, a loose one as far as it
can be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgeinfer.constraint import checked_schema
from edgeinfer.errors import ConstraintInvalid, EdgeInferError, ToolsInvalid
from edgeinfer_models.tool_formats import Tool, ToolChoice, parse_tools
from edgeinfer_models.tool_formats.held_schema import held_json
from tests.models.grammar_acceptance import Grammar
from tests.models.test_tool_grammars import written
from tests.models.tool_answers import FORMATS, openai_tool, parse

REQUIRED = ToolChoice("required")
TEXT = {"type": "string"}


def rich(parameters: dict[str, Any], *, strict: bool) -> tuple[Tool, ...]:
    return parse_tools([openai_tool("rich", parameters, strict=strict)], checked_schema)


def grammar(family: str, parameters: dict[str, Any], *, strict: bool = True) -> Grammar:
    lark = FORMATS[family].grammar(rich(parameters, strict=strict), REQUIRED)
    assert lark is not None
    return Grammar(lark)


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


CANNOT_BE_HELD: list[tuple[dict[str, Any], str]] = [
    ({"type": "object", "properties": {"a": TEXT}, "requried": ["a"]}, "requried"),
    ({"type": "object", "additionalProperties": True, "minProperties": 2}, "minProperties"),
    (of(a={"type": "string", "pattern": "^(?!a)b$"}), "pattern"),
    (of(a={"type": "string", "pattern": "^((a{99}){99}){99}$"}), "pattern"),
    (
        of(a={"type": "array", "items": {"type": "array", "items": TEXT, "uniqueItems": True}}),
        "uniqueItems",
    ),
    (of(a={"$ref": "#name"}), r"\$ref"),
    (of(a={"type": "integer", "not": {"const": 3}}), "not"),
    (of(a={"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
    (of(a={"type": "any"}), "type"),
    (of(pattern={"type": "string", "format": "zip"}), "format"),
]


@pytest.mark.parametrize(("parameters", "keyword"), CANNOT_BE_HELD)
@pytest.mark.parametrize("family", FORMATS)
def test_what_cannot_be_held_is_refused_by_name_or_left_out(
    family: str, parameters: dict[str, Any], keyword: str
) -> None:
    with pytest.raises(EdgeInferError, match=f"tool 'rich'.*'{keyword}'"):
        grammar(family, parameters)
    grammar(family, parameters, strict=False)  # compiles


def test_only_what_cannot_be_held_is_left_out() -> None:
    parameters = of(
        pattern={"type": "string", "pattern": "^(?!a)b$"},
        zip={"type": "string", "pattern": "^[0-9]{2}$"},
        n={"type": "integer", "maximum": 9, "not": {"const": 3}},
    )
    held = grammar("hermes", parameters, strict=False)
    assert held.takes(written("hermes", {"pattern": "!", "zip": "12", "n": 3}))
    assert not held.takes(written("hermes", {"pattern": "!", "zip": "123", "n": 3}))
    assert not held.takes(written("hermes", {"pattern": "!", "zip": "12", "n": 30}))
    assert not held.takes(written("hermes", {"pattern": "!", "zip": "12"}))


def test_a_schema_that_nothing_can_be_made_of_leaves_its_type() -> None:
    endless = {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}
    with pytest.raises(ConstraintInvalid, match="tool 'rich': no finite JSON"):
        grammar("hermes", endless)
    held = grammar("hermes", endless, strict=False)
    assert held.takes(written("hermes", {"n": 1}))
    assert not held.begins(written("hermes", {}).replace("{}", "["))


def test_leaving_out_has_an_end() -> None:
    checks = 0

    def refuse(schema: object, name: str) -> dict[str, Any]:
        nonlocal checks
        checks += 1
        assert isinstance(schema, dict)
        keyword = next(iter(schema))
        raise ConstraintInvalid(f"{name}: the schema keyword '{keyword}' at # is not supported", keyword)

    many = {f"k{n}": 1 for n in range(1000)} | {"type": "object"}
    assert json.loads(held_json(many, "a", strict=False, check=refuse))["type"] == "object"
    assert checks <= 10


@pytest.mark.parametrize("family", ["hermes", "llama", "mistral_name", "generic"])
def test_a_strict_tool_takes_no_other_spelling_of_its_rules(family: str) -> None:
    held = grammar(family, of(a={"type": "string", "format": "date"}))
    assert held.takes(written(family, {"a": "2024-02-29"}))
    assert not held.takes(written(family, {"a": "2023-02-29"}))
    keyed = {"type": "object", "properties": {"k": TEXT}, "additionalProperties": {"type": "integer"}}
    held = grammar(family, keyed)
    assert held.takes(written(family, {"k": "1", "l": 1}))
    assert not held.takes(written(family, {"k": 1}))
    assert not held.takes(written(family, {"k": 1}).replace('"k"', '"\\u006b"'))


PETS = {
    "type": "object",
    "properties": {
        "pet": {
            "discriminator": {
                "propertyName": "kind",
                "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"},
            },
            "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
            "title": "Pet",
        }
    },
    "required": ["pet"],
    "$defs": {
        "Cat": of(kind={"const": "cat", "type": "string"}, lives={"type": "integer"}),
        "Dog": of(kind={"const": "dog", "type": "string"}, bark={"type": "boolean"}),
    },
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("family", FORMATS)
def test_a_union_told_apart_by_a_constant_is_held(family: str, strict: bool) -> None:
    held = grammar(family, PETS, strict=strict)
    assert held.takes(written(family, {"pet": {"kind": "cat", "lives": 9}})), family
    assert held.takes(written(family, {"pet": {"kind": "dog", "bark": True}}))
    assert not held.takes(written(family, {"pet": {"kind": "dog", "lives": 9}}))


@pytest.mark.parametrize("family", FORMATS)
def test_listed_values_are_of_the_declared_type(family: str) -> None:
    held = grammar(family, of(a={"type": "string", "enum": ["x", 7]}, b={"type": "integer", "const": 3}))
    assert held.takes(written(family, {"a": "x", "b": 3}))
    assert not held.takes(written(family, {"a": 7, "b": 3}))


@pytest.mark.parametrize("family", ["qwen_coder", "functiongemma", "gemma4"])
def test_what_stands_beside_a_reference_or_a_list_of_values_is_not_lost(family: str) -> None:
    short = {"$ref": "#/$defs/text", "maxLength": 3}
    noted = {"$ref": "#/$defs/text", "description": "a text", "default": ""}
    definitions = {"$defs": {"text": TEXT}}
    with pytest.raises(ToolsInvalid, match="'maxLength'"):
        grammar(family, {**of(a=short), **definitions})
    with pytest.raises(ToolsInvalid, match="'maxLength'"):
        grammar(family, of(a={"enum": ["x", "long"], "maxLength": 3}))
    for parameters, strict in (
        ({**of(a=noted), **definitions}, True),
        ({**of(a=short), **definitions}, False),
    ):
        assert grammar(family, parameters, strict=strict).takes(written(family, {"a": "x"}))


@pytest.mark.parametrize("family", ["functiongemma", "gemma4"])
def test_counts_of_items_may_be_written_with_a_point(family: str) -> None:
    held = grammar(family, of(a={"type": "array", "items": TEXT, "minItems": 2.0, "maxItems": 3.0}))
    for count, fits in ((1, False), (2, True), (3, True), (4, False)):
        assert held.takes(written(family, {"a": ["x"] * count})) == fits


@pytest.mark.parametrize("family", ["functiongemma", "gemma4"])
@pytest.mark.parametrize("name", ["a:b", "a{", "a}", "a\nb", '"a"', " a", "", "a" * 200])
def test_gemma_refuses_names_that_its_notation_cannot_tell(family: str, name: str) -> None:
    for strict in (True, False):
        with pytest.raises(ToolsInvalid, match=r"tool 'rich', parameter .*'properties'"):
            FORMATS[family].grammar(rich(of(**{name: TEXT}), strict=strict), REQUIRED)


@pytest.mark.parametrize("constant", [{"k:1": 1}, 'a<|"|>b', [{"a": 'x<|"|>'}]])
def test_gemma_refuses_constants_that_its_notation_cannot_tell(constant: Any) -> None:
    for keyword, value in (("const", constant), ("enum", [constant, 1])):
        with pytest.raises(ToolsInvalid, match=f"tool 'rich', parameter 'a': .*'{keyword}'"):
            grammar("gemma4", of(a={keyword: value}))
        grammar("gemma4", of(a={keyword: value}), strict=False)


def test_a_value_that_would_end_its_parameter_is_refused() -> None:
    with pytest.raises(ToolsInvalid, match=r"tool 'rich', parameter 'a': .*'enum'"):
        grammar("qwen_coder", of(a={"enum": ["x", "y</parameter>"]}))


@pytest.mark.parametrize("family", ["qwen_coder", "functiongemma", "gemma4"])
def test_a_reference_to_another_parameter_is_not_read_as_one_of_its_own(family: str) -> None:
    point = {"type": "object", "properties": {"x": {"$ref": "#/properties/x"}}, "required": ["x"]}
    loose = {"type": "object", "properties": {"x": TEXT, "list": {"type": "array", "items": point}}}
    call = written(family, {"list": [{"x": "a"}]})
    held = grammar(family, loose, strict=False)
    assert held.takes(call)
    found = parse(FORMATS[family].parser(rich(loose, strict=False)), [call])
    assert found.read == [("rich", {"list": [{"x": "a"}]})]


def test_null_for_what_is_left_out_is_nothing() -> None:
    (tool,) = rich({"type": "object", "properties": None, "required": None}, strict=True)
    assert tool.parameters == {"type": "object"}
    assert grammar("hermes", tool.parameters).takes(written("hermes", {}))


def test_definitions_that_nothing_refers_to_are_not_repeated() -> None:
    definitions = {f"d{number}": TEXT for number in range(200)}
    numbers = {f"n{number}": {"type": "integer", "minimum": number} for number in range(500)}
    for family in FORMATS:
        lark = FORMATS[family].grammar(
            rich({**of(**numbers), "$defs": definitions}, strict=True), REQUIRED
        )
        assert lark is not None
        assert lark.count("d199") <= 1


def test_a_grammar_has_a_limit_while_it_is_made() -> None:
    definitions = {f"d{n}": {"properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(300)}
    lists = {f"n{n}": {"type": "array", "items": {"$ref": "#/$defs/d0"}} for n in range(300)}
    parameters = {**of(**lists), "$defs": {**definitions, "d300": TEXT}}
    with pytest.raises(ToolsInvalid, match=r"tools: .* bytes"):
        FORMATS["qwen_coder"].grammar(rich(parameters, strict=False), REQUIRED)


@pytest.mark.parametrize("family", ["functiongemma", "gemma4"])
def test_a_long_chain_of_references_ends(family: str) -> None:
    chain = {f"d{n}": of(a={"$ref": f"#/$defs/d{n + 1}"}) for n in range(400)}
    parameters = {**of(a={"$ref": "#/$defs/d0"}), "$defs": {**chain, "d400": TEXT}}
    grammar(family, parameters, strict=False)
    with pytest.raises(ToolsInvalid, match=r"'\$ref'"):
        grammar(family, parameters)


def test_all_schemas_together_have_a_limit() -> None:
    half = {"type": "object", "enum": [0] * 20_000}
    with pytest.raises(ToolsInvalid, match="more than 30,000 parts in all"):
        parse_tools([openai_tool("a", half), openai_tool("b", half)])
