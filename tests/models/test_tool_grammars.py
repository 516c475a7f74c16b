"""The grammars of tool calls, compiled by llguidance and tried byte by byte: what they let through is
what the family's parser reads, and its arguments fit the tool's schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from edgeinfer.constraint.json_schema import COMPACT
from edgeinfer.errors import ToolsInvalid
from edgeinfer_models.tool_formats import Tool, ToolChoice, parse_tools
from tests.models.grammar_acceptance import Grammar
from tests.models.tool_answers import FILE, FORMATS, TOOLS, openai_tool, parse

AUTO, REQUIRED, NAMED = ToolChoice("auto"), ToolChoice("required"), ToolChoice("named", "get")
_AUTO_OPENING = {
    "hermes": "<tool_call>",
    "generic": "<tool_call>",
    "qwen_coder": "<tool_call>",
    "llama": '{"name": "',
    "mistral_list": "[TOOL_CALLS]",
    "mistral_id": "[TOOL_CALLS]",
    "mistral_name": "[TOOL_CALLS]",
    "functiongemma": "<start_function_call>",
    "gemma4": "<|tool_call>",
}

# Calls as the family's templates write them: get with city and days, then get_all.
GET = {
    "hermes": '<tool_call>\n{"name": "get", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
    "generic": '<tool_call>\n{"name": "get", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
    "qwen_coder": "<tool_call>\n<function=get>\n<parameter=city>\nParis\n</parameter>\n<parameter=d"
    "ays>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "llama": '{"name": "get", "parameters": {"city": "Paris", "days": 3}}',
    "mistral_list": '[TOOL_CALLS][{"name": "get", "arguments": {"city": "Paris", "days": 3}}]',
    "mistral_id": '[TOOL_CALLS]get[CALL_ID]9Ae3bDc2F[ARGS]{"city": "Paris", "days": 3}',
    "mistral_name": '[TOOL_CALLS]get[ARGS]{"city": "Paris", "days": 3}',
    "functiongemma": "<start_function_call>call:get{city:<escape>Paris<escape>,days:3}<end_function"
    "_call>",
    "gemma4": '<|tool_call>call:get{city:<|"|>Paris<|"|>,days:3}<tool_call|>',
}
GET_ALL = {
    "hermes": '\n<tool_call>\n{"name": "get_all", "arguments": {}}\n</tool_call>',
    "generic": '\n<tool_call>\n{"name": "get_all", "arguments": {}}\n</tool_call>',
    "qwen_coder": "\n<tool_call>\n<function=get_all>\n</function>\n</tool_call>",
    "llama": '; {"name": "get_all", "parameters": {}}',
    "mistral_id": "[TOOL_CALLS]get_all[CALL_ID]9Ae3bDc2F[ARGS]{}",
    "mistral_name": "[TOOL_CALLS]get_all[ARGS]{}",
    "functiongemma": "<start_function_call>call:get_all{}<end_function_call>",
    "gemma4": "<|tool_call>call:get_all{}<tool_call|>",
}


def grammar(
    family: str,
    choice: ToolChoice,
    tools: tuple[Tool, ...] = TOOLS,
    *,
    control: bool = False,
    parallel: bool = True,
) -> Grammar:
    """control: the family's marks are control tokens of the vocabulary, otherwise plain text."""
    form = FORMATS[family]
    marks = form.visible_tokens if control else ()
    tokens = {text: 257 + number for number, text in enumerate(marks)}
    lark = form.grammar(tools, choice, parallel=parallel, tokens=tokens)
    assert lark is not None
    return Grammar(lark, marks)


def several(family: str) -> str:
    if family == "mistral_list":
        return GET[family][:-1] + ', {"name": "get_all", "arguments": {}}]'
    return GET[family] + GET_ALL[family]


@pytest.mark.parametrize("control", [False, True], ids=["as text", "as control tokens"])
@pytest.mark.parametrize("family", FORMATS)
def test_a_required_answer_is_a_call_and_nothing_else(family: str, control: bool) -> None:
    held = grammar(family, REQUIRED, control=control, parallel=False)
    assert held.takes(GET[family])
    assert not held.takes("")
    assert not held.begins("Hello")
    assert not held.begins(GET[family] + "more")
    assert not held.begins(several(family))
    if family not in ("functiongemma", "gemma4"):  # they may go on to the response's opening token
        assert held.must_end_after(GET[family])
    if control:
        assert held.takes(GET[family], plainly=True)


@pytest.mark.parametrize("control", [False, True], ids=["as text", "as control tokens"])
@pytest.mark.parametrize("family", FORMATS)
def test_a_required_answer_may_be_several_calls(family: str, control: bool) -> None:
    held = grammar(family, REQUIRED, control=control)
    assert held.takes(GET[family])
    assert held.takes(several(family))
    assert not held.begins(several(family) + " done")
    found = parse(FORMATS[family].parser(TOOLS), [several(family)])
    assert found.read == [("get", {"city": "Paris", "days": 3}), ("get_all", {})]


@pytest.mark.parametrize("family", FORMATS)
def test_a_named_tool_is_the_only_one(family: str) -> None:
    held = grammar(family, NAMED)
    assert held.takes(GET[family])
    assert not held.begins(several(family))
    assert not held.begins(GET[family].replace("get", "get_all", 1))


@pytest.mark.parametrize("control", [False, True], ids=["as text", "as control tokens"])
@pytest.mark.parametrize("family", FORMATS)
def test_a_free_answer_is_any_text_until_a_call_begins(family: str, control: bool) -> None:
    held = grammar(family, AUTO, control=control)
    for text in (
        "",
        "Hello.\n",
        'a < b, {"x": [1]} </tool_call> <tool_calls> [TOOL] 😀',
        '{"city": "Paris"}',
    ):
        assert held.takes(text, plainly=True)
    lead = "" if family == "llama" else "I look.\n"
    assert held.takes(lead + GET[family])
    assert held.takes(lead + several(family))
    opening = lead + _AUTO_OPENING[family]
    assert held.begins(opening)
    assert not held.takes(opening)
    assert not held.begins(opening + "Hello")
    assert not held.begins(lead + GET[family].replace("get", "nobody", 1))
    assert not held.begins(lead + GET[family].replace("days", "nights", 1))
    assert not held.takes(lead + GET[family].replace("3", "30", 1))
    assert not held.begins(lead + GET[family] + " So much for that.")


def test_llama_calls_behind_its_tag_are_held_too() -> None:
    for control in (False, True):
        held = grammar("llama", AUTO, control=control)
        assert held.takes("I look. <|python_tag|>" + GET["llama"])
        assert not held.begins("<|python_tag|>print")
        assert held.takes('{"type": "function", "name": "get", "parameters": {"city": "Paris"}}')
        assert not held.begins('{"name": "nobody"')


def test_function_tags_without_the_outer_ones_are_held_too() -> None:
    held = grammar("qwen_coder", AUTO)
    assert held.takes("Now:\n<function=get>\n<parameter=city>\nParis\n</parameter>\n</function>")
    assert not held.begins("Now:\n<function=nobody>")


def test_without_parallel_calls_the_first_ends_a_free_answer() -> None:
    for family in FORMATS:
        held = grammar(family, AUTO, parallel=False)
        assert held.takes(GET[family])
        assert not held.begins(several(family))


def test_there_is_no_grammar_where_nothing_is_held() -> None:
    for form in FORMATS.values():
        assert form.grammar(TOOLS, ToolChoice("none")) is None
        assert form.grammar((), AUTO) is None


# -- arguments ---------------------------------------------------------------------------------------

RICH = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "kind": {"enum": ["a", "b c", 7, None]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 2},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "On": {"type": "boolean"},
        "tree": {"$ref": "#/$defs/tree"},
    },
    "required": ["id", "list"],
    "additionalProperties": False,
    "$defs": {
        "point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        "tree": {
            "type": "object",
            "properties": {"left": {"$ref": "#/$defs/tree"}, "value": {"type": "string"}},
            "required": ["value"],
        },
    },
}
FITS: list[dict[str, Any]] = [
    {"id": 1, "list": [{"x": 1.5}]},
    {"id": 20, "kind": "b c", "list": [{"x": 0}, {"x": -1e3}], "maybe": "yes\nno", "On": True},
    {
        "id": 3,
        "kind": None,
        "list": [{"x": 0}],
        "maybe": None,
        "tree": {"left": {"value": "é"}, "value": ""},
    },
    {"id": 3, "kind": 7, "list": [{"x": 0}]},
]
DOES_NOT: list[dict[str, Any]] = [
    {},
    {"id": 0, "list": [{"x": 1}]},
    {"id": 1, "list": []},
    {"id": 1, "list": [{"x": 1}, {"x": 1}, {"x": 1}]},
    {"id": 1, "list": [{"y": 1}]},
    {"id": 1, "kind": "c", "list": [{"x": 1}]},
    {"id": 1, "list": [{"x": 1}], "more": 1},
    {"id": 1, "list": [{"x": 1}], "On": "yes"},
    {"id": 1, "list": [{"x": 1}], "tree": {"left": {}}},
    {"id": "one", "list": [{"x": 1}]},
]


def written(family: str, arguments: dict[str, Any]) -> str:
    """A call to `rich`, as the family's template would render it."""
    if family == "qwen_coder":
        parts = "".join(
            f"<parameter={key}>\n{_raw(value)}\n</parameter>\n" for key, value in arguments.items()
        )
        return f"<tool_call>\n<function=rich>\n{parts}</function>\n</tool_call>"
    if family in ("functiongemma", "gemma4"):
        quote = "<escape>" if family == "functiongemma" else '<|"|>'
        return GET_ALL[family].replace("get_all{}", "rich" + _gemma(arguments, quote))
    text = json.dumps(arguments, ensure_ascii=False)
    call = GET[family].replace('"get"', '"rich"').replace("get[", "rich[")
    return call.replace('{"city": "Paris", "days": 3}', text)


def _raw(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _gemma(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return quote + value + quote
    if isinstance(value, list):
        return "[" + ",".join(_gemma(each, quote) for each in value) + "]"
    if isinstance(value, dict):
        ordered = sorted(value, key=str.lower)
        return "{" + ",".join(f"{key}:{_gemma(value[key], quote)}" for key in ordered) + "}"
    return json.dumps(value)


@pytest.mark.parametrize("choice", [AUTO, REQUIRED], ids=["auto", "required"])
@pytest.mark.parametrize("control", [False, True], ids=["as text", "as control tokens"])
@pytest.mark.parametrize("family", FORMATS)
def test_arguments_are_held_to_the_schema(family: str, control: bool, choice: ToolChoice) -> None:
    tools = (Tool("rich", "", RICH),)
    held = grammar(family, choice, tools, control=control)
    for arguments in FITS:
        jsonschema.validate(arguments, RICH)
        call = written(family, arguments)
        assert held.takes(call), (call, call[: held.accepted(call)])
        assert parse(FORMATS[family].parser(tools), [call]).read == [("rich", arguments)]
    for arguments in DOES_NOT:
        assert not held.takes(written(family, arguments)), arguments


@pytest.mark.parametrize("family", FORMATS)
def test_a_tool_that_names_no_parameters_gets_none(family: str) -> None:
    for parameters in (None, {}, {"type": "object"}, {"type": "object", "properties": {}}):
        held = grammar(family, REQUIRED, parse_tools([openai_tool("get_all", parameters)]))
        call = (
            GET_ALL[family].lstrip("\n; ")
            if family in GET_ALL
            else '[TOOL_CALLS][{"name": "get_all", "arguments": {}}]'
        )
        assert held.takes(call)
        if family == "qwen_coder":
            assert not held.begins("<tool_call>\n<function=get_all>\n<parameter=")
        else:
            assert not held.begins(call[: call.rindex("{}") + 1] + '"')


@pytest.mark.parametrize("family", FORMATS)
def test_a_tool_that_takes_anything_gets_it(family: str) -> None:
    tools = parse_tools([openai_tool("rich", {"type": "object", "additionalProperties": True})])
    held = grammar(family, REQUIRED, tools)
    for arguments in ({}, {"a": 1, "b": "x"}, {"a": {"b": [1, "c", None, {"d": True}]}}):
        assert held.takes(written(family, arguments)), written(family, arguments)


@pytest.mark.parametrize("family", ["qwen_coder", "gemma4", "functiongemma"])
def test_a_strict_tool_that_a_form_cannot_hold_is_refused_by_name(family: str) -> None:
    parameters = {"type": "object", "properties": {"zip": {"type": "string", "pattern": "[0-9]{5}"}}}
    (strict,) = parse_tools([openai_tool("post", parameters, strict=True)])
    with pytest.raises(ToolsInvalid, match=r"tool 'post', parameter 'zip': .*'pattern'"):
        FORMATS[family].grammar((strict,), REQUIRED)
    (loose,) = parse_tools([openai_tool("post", parameters)])
    assert FORMATS[family].grammar((loose,), REQUIRED) is not None


def test_a_strict_tool_is_held_to_all_of_its_json_schema() -> None:
    parameters = {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}}
    held = grammar("hermes", REQUIRED, parse_tools([openai_tool("post", parameters, strict=True)]))
    call = '<tool_call>\n{"name": "post", "arguments": {"zip": "12345"}}\n</tool_call>'
    assert held.takes(call)
    assert not held.takes(call.replace("12345", "1234"))


def test_a_client_cannot_loosen_how_its_schema_is_read() -> None:
    parameters = {**FILE, "x-guidance": {"lenient": True, "whitespace_flexible": True}}
    (tool,) = parse_tools([openai_tool("write", parameters, strict=True)])
    assert json.loads(tool.arguments_json())["x-guidance"]["lenient"] is False


@pytest.mark.parametrize("family", ["hermes", "llama", "mistral_list", "mistral_id", "mistral_name"])
def test_white_space_outside_strings_has_an_end(family: str) -> None:
    held = grammar(family, REQUIRED)
    call = GET[family]
    outside = [at for at in range(1, len(call) + 1) if call[:at].count('"') % 2 == 0]
    assert len(outside) > 10
    for at in outside:
        assert not held.begins(call[:at] + " " * 100)


@pytest.mark.parametrize("family", FORMATS)
def test_names_are_text_in_a_grammar_and_nothing_else(family: str) -> None:
    name = 'a"b\\c/%{' if "gemma" not in family else 'a"b\\c/%'  # which has no quotes around it there
    odd = {"type": "object", "properties": {name: {"type": "string"}, "é 😀": {"type": "integer"}}}
    tools = parse_tools([openai_tool("a.b-c_D", odd), openai_tool("a", odd), openai_tool("a.b", odd)])
    for choice in (AUTO, REQUIRED):
        assert grammar(family, choice, tools).begins("")


# -- what is read as a call was held as one ------------------------------------------------------------

_OTHER_SPELLINGS = [
    '{"ARGS": {"city": "x"}, "name": "get"}',
    '{"function": {"name": "get", "ARGS": {"city": "x"}}}',
    '{"id": 1, "name": "get", "ARGS": {"city": "x"}}',
    '{"function": "get", "ARGS": {"city": "x"}}',
    '{"ARGS": {}, "name": "get_all"}; {"ARGS": {}, "name": "get_all"}',
    '[{"name": "get_all", "ARGS": {}}]',
    '{"type": "tool", "name": "get_all", "ARGS": {}}',
]


@pytest.mark.parametrize(("family", "key"), [("llama", "parameters"), ("generic", "arguments")])
def test_untagged_json_is_a_call_only_as_the_grammar_holds_it(family: str, key: str) -> None:
    held, form = grammar(family, AUTO), FORMATS[family]
    for spelling in _OTHER_SPELLINGS:
        answer = spelling.replace("ARGS", key)
        assert held.takes(answer), answer
        found = parse(form.parser(TOOLS), [answer])
        assert (found.text, found.calls) == (answer, [])
    for blank in ("", " ", "\n" * 20):
        opening = f'{blank}{{{blank}"type"{blank}:{blank}"function"{blank},{blank}"name"{blank}:{blank}"'
        answer = opening + f'get", "{key}": {{"city": "x"}}}}'
        assert held.takes(answer), answer
        assert parse(form.parser(TOOLS), [answer]).read == [("get", {"city": "x"})]
        assert not held.begins(answer.replace('"x"', "5"))
        assert not held.begins(opening + "nobody")


def test_one_call_is_one_call() -> None:
    for family in FORMATS:
        found = parse(FORMATS[family].parser(TOOLS, parallel=False), [several(family)])
        assert found.read == [("get", {"city": "Paris", "days": 3})]
        assert found.complete == [True]


_REPLY = f"%json {json.dumps({'type': 'object', 'x-guidance': COMPACT})}"


@pytest.mark.parametrize("family", FORMATS)
def test_beside_a_reply_only_a_forced_call_is_read_as_one(family: str) -> None:
    form = FORMATS[family]
    lark = form.grammar(TOOLS, AUTO, reply=_REPLY)
    assert lark is not None
    held = Grammar(lark)
    marks = [
        *(json.dumps(f"use {call} here") for call in (GET[family], several(family))),
        '"<function=get> <|python_tag|>{}"',
    ]
    replies = [f'{{"text":{mark}}}' for mark in marks]
    for key in ("arguments", "parameters"):
        replies.append(f'{{"name":"get","{key}":{{"city":"Paris"}}}}')
        replies.append(f'{{"type":"function","name":"get","{key}":{{"city":"Paris"}}}}')
    for reply in replies:
        assert held.takes(reply), reply
        for pieces in ([reply], list(reply)):
            found = parse(form.parser(TOOLS, beside_reply=True), pieces)
            assert (found.text, found.calls) == (reply, [])
    for call in (GET[family], several(family)):
        assert held.takes(call)
        found = parse(form.parser(TOOLS, beside_reply=True), list(call))
        assert found.read[0] == ("get", {"city": "Paris", "days": 3})
        assert found.text == ""


@pytest.mark.parametrize("family", FORMATS)
def test_a_reply_may_be_about_names_too(family: str) -> None:
    person = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name"],
        "x-guidance": COMPACT,
    }
    lark = FORMATS[family].grammar(TOOLS, AUTO, reply=f"%json {json.dumps(person)}")
    assert lark is not None
    held = Grammar(lark)
    for reply in ('{"name":"Ada","age":36}', '{"name":"get"}'):
        assert held.takes(reply)
        found = parse(FORMATS[family].parser(TOOLS, beside_reply=True), [reply])
        assert (found.text, found.calls) == (reply, [])
    assert held.takes(GET[family])
    assert not held.begins('{"nam":')
    assert not held.begins("Hello")
