"""What a client may send as tools and tool_choice."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.errors import EdgeInferError, ToolsInvalid
from edgeinfer_models.tool_formats import ToolChoice, parse_tool_choice, parse_tools
from tests.models.tool_answers import TOOLS, WEATHER, openai_tool


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_tools_are_read_from_openais_form() -> None:
    (tool,) = parse_tools([openai_tool("get", WEATHER, strict=True)])
    assert (tool.name, tool.description, tool.parameters, tool.strict) == (
        "get",
        "does get",
        WEATHER,
        True,
    )
    assert parse_tools(None) == parse_tools([]) == ()
    assert tool.for_template()["function"] == {
        "name": "get",
        "description": "does get",
        "parameters": WEATHER,
    }


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "must be a list"),
        ([None], r"tools\[0\]: must be"),
        ([{"type": "retrieval"}], "must be"),
        ([openai_tool("a b")], "1 to 64 letters"),
        ([openai_tool("")], "1 to 64 letters"),
        ([openai_tool("x" * 65)], "1 to 64 letters"),
        ([openai_tool("get\n")], "1 to 64 letters"),
        ([openai_tool("a"), openai_tool("a")], r"tools\[1\]: the name 'a' is taken"),
        ([openai_tool(f"t{n}") for n in range(129)], "129 tools where at most 128"),
        ([openai_tool("a", [])], "must be a JSON schema object"),
        ([openai_tool("a", {"type": "string"})], "must have the type 'object'"),
        ([openai_tool("a", {"properties": []})], "'properties' must be an object"),
        ([openai_tool("a", {"required": "x"})], "'required' must be a list"),
        ([openai_tool("a", deep(40))], "nested deeper than 64"),
        ([openai_tool("a", {"enum": [0] * 60_000})], "more than 30,000 parts"),
        ([openai_tool("a", strict="yes")], "strict of 'a' must be"),
        ([{"type": "function", "function": {"name": "a", "description": 1}}], "must be text"),
    ],
)
def test_tools_that_cannot_be_right_are_refused_in_one_line(tools: Any, message: str) -> None:
    with pytest.raises(ToolsInvalid, match=message) as caught:
        parse_tools(tools)
    assert isinstance(caught.value, EdgeInferError)
    assert "\n" not in str(caught.value)


def test_a_choice_is_read_from_openais_form() -> None:
    named = {"type": "function", "function": {"name": "get"}}
    assert parse_tool_choice(None, TOOLS) == parse_tool_choice("auto", TOOLS) == ToolChoice("auto")
    assert parse_tool_choice(None, ()) == parse_tool_choice("auto", ()) == ToolChoice("none")
    assert parse_tool_choice("required", TOOLS) == ToolChoice("required")
    assert parse_tool_choice(named, TOOLS) == ToolChoice("named", "get")
    assert [tool.name for tool in ToolChoice("named", "get").select(TOOLS)] == ["get"]
    assert ToolChoice("none").select(TOOLS) == ()
    for wrong, tools in [
        ("required", ()),
        ("any", TOOLS),
        ({"type": "function"}, TOOLS),
        ({"type": "function", "function": {"name": "nobody"}}, TOOLS),
        ({"type": "custom", "function": {"name": "get"}}, TOOLS),
        (7, TOOLS),
    ]:
        with pytest.raises(ToolsInvalid, match="tool_choice"):
            parse_tool_choice(wrong, tools)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "parameters", "properties", "x"]), inner
        )
    ),
    max_leaves=20,
)


@given(value=_JSON)
def test_anything_is_either_tools_or_refused(value: Any) -> None:
    for one in (value, [value], [{"type": "function", "function": value}]):
        try:
            tools = parse_tools(one)
        except ToolsInvalid:
            continue
        for tool in tools:
            json.loads(tool.arguments_json())
