"""Calls in answers as models write them: found, streamed, and never lost or invented."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer_models.tool_formats import ArgumentsDelta, CallEnded, CallStarted, TextDelta
from edgeinfer_models.tool_formats.call_text import MAX_CALLS
from tests.models.tool_answers import FORMATS, TOOLS, parse

PARIS = {"city": "Paris"}
CODE = {"path": "a.py", "content": 'if x < 1:\n    print("é\\n", {1: [2]})\n'}

# family, answer, text, calls
ANSWERS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    (
        "hermes",
        '<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [("get", PARIS)],
    ),
    (
        "hermes",
        'I look.\n<tool_call>{"name":"get","arguments":{"city":"Paris"}}</tool_call>\n\n<tool_call>\n'
        '{"arguments": {"city": "Paris"}, "name": "get"}\n</tool_call>\n',
        "I look.\n",
        [("get", PARIS), ("get", PARIS)],
    ),
    ("hermes", '\n\n<tool_call>\n{"name": "get_all"}\n</tool_call>', "", [("get_all", {})]),
    (
        "hermes",
        '<tool_call>\n{"name": "get_all", "arguments": null}\n</tool_call>ok',
        "ok",
        [("get_all", {})],
    ),
    (
        "hermes",
        '<tool_call>\n{"name": "get", "arguments": "{\\"city\\": \\"Paris\\"}"}\n</tool_call>',
        "",
        [("get", PARIS)],
    ),
    (
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "get", "arguments": {"city": '
        '"Paris"}}}</tool_call>',
        "",
        [("get", PARIS)],
    ),
    (
        "hermes",
        '<tool_call>[{"name": "get", "arguments": {"city": "Paris"}}, {"name": "get_all"}]</tool_call>',
        "",
        [("get", PARIS), ("get_all", {})],
    ),
    (
        "hermes",
        '<tool_call>{"name": "get", "arguments": {"city": "a\nb\tc"}}',
        "",
        [("get", {"city": "a\nb\tc"})],
    ),
    ("hermes", 'a <tool_call> b <tool_call>{"name": "nobody", "arguments": {}}</tool_call>', None, []),
    ("hermes", '{"name": "get", "arguments": {"city": "Paris"}}', None, []),
    ("generic", '{"name": "get", "arguments": {"city": "Paris"}}', "", [("get", PARIS)]),
    ("generic", '{"name": "Ada", "arguments": {"for": 1}}', None, []),
    ("generic", '  {"city": "Paris"}', None, []),
    (
        "generic",
        '<tool_call>\n{"name": "get_all", "arguments": {}}\n</tool_call>',
        "",
        [("get_all", {})],
    ),
    ("llama", '{"name": "get", "parameters": {"city": "Paris"}}', "", [("get", PARIS)]),
    ("llama", '<|python_tag|>{"name": "get", "parameters": {"city": "Paris"}}', "", [("get", PARIS)]),
    (
        "llama",
        '{"type": "function", "name": "get", "parameters": {"city": "Paris"}}; {"name": "get_all", '
        '"parameters": {}}',
        "",
        [("get", PARIS), ("get_all", {})],
    ),
    (
        "llama",
        '\n{"name": "get_all", "parameters": {}}\n{"name": "get_all", "parameters": {}}\n\nDone.',
        "\n\nDone.",
        [("get_all", {}), ("get_all", {})],
    ),
    ("llama", '<|python_tag|>brave_search.call(query="x")', None, []),
    ("llama", 'An object: {"name": "get", "parameters": {}}', None, []),
    (
        "mistral_list",
        '[TOOL_CALLS][{"name": "get", "arguments": {"city": "Paris"}, "id": "9Ae3bDc2F"}, '
        '{"name": "get_all", "arguments": {}}]',
        "",
        [("get", PARIS), ("get_all", {})],
    ),
    ("mistral_list", '[TOOL_CALLS] [{"name": "get_all", "arguments": {}}] ', "", [("get_all", {})]),
    ("mistral_name", 'Yes.[TOOL_CALLS]get[ARGS]{"city": "Paris"}', "Yes.", [("get", PARIS)]),
    (
        "mistral_name",
        '[TOOL_CALLS]get{"city": "Paris"}[TOOL_CALLS]get_all{}',
        "",
        [("get", PARIS), ("get_all", {})],
    ),
    ("mistral_id", '[TOOL_CALLS]get[CALL_ID]9Ae3bDc2F[ARGS]{"city": "Paris"}', "", [("get", PARIS)]),
    ("mistral_name", "[TOOL_CALLS]nobody[ARGS]{}", None, []),
    (
        "qwen_coder",
        "<tool_call>\n<function=get>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n<"
        "/parameter>\n"
        "</function>\n</tool_call>",
        "",
        [("get", {"city": "Paris", "days": 3})],
    ),
    (
        "qwen_coder",
        "Now:\n<function=write_file>\n<parameter=path>\na.py\n</parameter>\n<parameter=content>\n"
        + CODE["content"]
        + '\n</parameter>\n<parameter=tags>\n["x", "</y>"]\n</parameter>\n<parameter=options>{"forc'
        'e": true}'
        "</parameter></function></tool_call>",
        "Now:\n",
        [("write_file", {**CODE, "tags": ["x", "</y>"], "options": {"force": True}})],
    ),
    (
        "qwen_coder",
        "<tool_call>\n<function=get_all>\n</function>\n</tool_call>\n",
        "",
        [("get_all", {})],
    ),
    (
        "qwen_coder",
        "<tool_call><function=get_all><parameter=a>12</parameter><parameter=b>12a</parameter><param"
        "eter=c>None"
        "</parameter></function></tool_call>",
        "",
        [("get_all", {"a": 12, "b": "12a", "c": None})],
    ),
    (
        "qwen_coder",
        "<function=write_file><parameter=path>123</parameter><parameter=content>\n\n  "
        "true\n\n</parameter></function>",
        "",
        [("write_file", {"path": "123", "content": "\n  true\n"})],
    ),
    ("qwen_coder", "<tool_call>\n<function=nobody>\n</function>\n</tool_call>", None, []),
    ("qwen_coder", "a <function= b", None, []),
    (
        "functiongemma",
        "<start_function_call>call:get{city:<escape>Paris<escape>,days:3}<end_function_call>"
        "<start_function_call>call:get_all{}<end_function_call><start_function_response>",
        "",
        [("get", {"city": "Paris", "days": 3}), ("get_all", {})],
    ),
    (
        "gemma4",
        'So.<|tool_call>call:write_file{content:<|"|>{a:"b"},\n<|"|>,options:{force:true},path:<|"|'
        '>x<|"|>,'
        'tags:[<|"|>one<|"|>, <|"|><|"|>]}<tool_call|>',
        "So.",
        [
            (
                "write_file",
                {"content": '{a:"b"},\n', "options": {"force": True}, "path": "x", "tags": ["one", ""]},
            )
        ],
    ),
    ("gemma4", "<|tool_call>call:get{city:Paris}<tool_call|>", "", [("get", PARIS)]),
    (
        "gemma4",
        '<|tool_call>call:get{"city": "Paris", days: 3}',
        "",
        [("get", {"city": "Paris", "days": 3})],
    ),
    ("gemma4", "<|tool_call>call:nobody{}<tool_call|>", None, []),
]


@pytest.mark.parametrize(("family", "answer", "text", "calls"), ANSWERS)
def test_an_answer_is_read_the_same_wherever_it_is_cut(
    family: str, answer: str, text: str | None, calls: list[tuple[str, Any]]
) -> None:
    form = FORMATS[family]
    whole = parse(form.parser(TOOLS), [answer])
    assert (whole.text, whole.read) == (answer if text is None else text, calls)
    assert whole.complete == [True] * len(calls)
    cuts = [[answer[:at], answer[at:]] for at in range(len(answer) + 1)]
    for pieces in [list(answer), *cuts]:
        found = parse(form.parser(TOOLS), pieces)
        assert (found.text, found.calls, found.complete) == (whole.text, whole.calls, whole.complete), (
            pieces
        )


def test_text_flows_at_once_and_only_a_possible_trigger_waits() -> None:
    parser = FORMATS["hermes"].parser(TOOLS)
    assert parser.feed("Look: a < b") == [TextDelta("Look: a < b")]
    assert parser.feed(" <tool") == [TextDelta(" ")]
    assert parser.feed("box>") == [TextDelta("<toolbox>")]
    assert parser.finish() == []


def test_arguments_flow_as_they_come() -> None:
    parser = FORMATS["hermes"].parser(TOOLS)
    assert parser.feed('<tool_call>\n{"name": "get", "argum') == []
    started, first = parser.feed('ents": {"city": "Par')
    assert isinstance(started, CallStarted)
    assert (started.index, started.name) == (0, "get")
    assert first == ArgumentsDelta(0, '{"city": "Par')
    assert parser.feed("i") == [ArgumentsDelta(0, "i")]
    assert parser.feed('s"}') == [ArgumentsDelta(0, 's"}'), CallEnded(0, True)]
    assert parser.feed("}\n</tool_call>") == parser.finish() == []


def test_a_string_parameter_between_tags_flows_as_it_comes() -> None:
    parser = FORMATS["qwen_coder"].parser(TOOLS)
    parser.feed("<tool_call>\n<function=write_file>\n<parameter=content>\n")
    assert parser.feed('say "hi"\n</') == [ArgumentsDelta(0, 'say \\"hi\\"')]
    assert parser.feed("p>") == [ArgumentsDelta(0, "\\n</p>")]
    assert parser.feed("\n</parameter>\n</function>") == [ArgumentsDelta(0, '"}'), CallEnded(0, True)]


@pytest.mark.parametrize("family", FORMATS)
def test_an_answer_that_stops_inside_a_call_says_so(family: str) -> None:
    answer = next(a for f, a, _, calls in ANSWERS if f == family and calls and calls[0][1])
    for at in range(len(answer)):
        found = parse(FORMATS[family].parser(TOOLS), [answer[:at]])
        assert len(found.complete) == len(found.calls)
        for is_complete, (_, arguments) in zip(found.complete, found.calls, strict=True):
            if is_complete:
                assert isinstance(json.loads(arguments), dict)
        if not found.calls:
            assert found.text == answer[:at]


def test_what_breaks_a_call_is_text() -> None:
    found = parse(
        FORMATS["hermes"].parser(TOOLS),
        ['<tool_call>{"name": "get", "arguments": {"city": oops} </tool_call>'],
    )
    assert found.calls == [("get", '{"city": ')]
    assert found.complete == [False]
    assert found.text == "oops} </tool_call>"


def test_ids_are_of_the_make_the_family_wants() -> None:
    (call,) = parse(FORMATS["hermes"].parser(TOOLS), ['<tool_call>{"name": "get_all"}']).ids
    assert re.fullmatch("call_[a-zA-Z0-9]{24}", call)
    (call,) = parse(FORMATS["mistral_name"].parser(TOOLS), ["[TOOL_CALLS]get_all[ARGS]{}"]).ids
    assert re.fullmatch("[a-zA-Z0-9]{9}", call)
    (call,) = parse(
        FORMATS["mistral_id"].parser(TOOLS), ["[TOOL_CALLS]get_all[CALL_ID]9Ae3bDc2F[ARGS]{}"]
    ).ids
    assert call == "9Ae3bDc2F"


_MARKS = [
    "<tool_call>", "</tool_call>", "<function=", "get", ">", "<parameter=", "city", "</parameter>",
    "</function>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<start_function_call>",
    "<end_function_call>", "<escape>", "call:", '<|"|>', "<|tool_call>", "<tool_call|>", "{", "}",
    "[", "]", '"', ":", ",", ";", "\\", "\n", " ", '"name": "get"', '"arguments": ',
    "<start_function_response>",
    '{"name": "get", "arguments": ', '"city": "Paris"', "1", "-", "true", "null", "é", "\x00", "\ud800",
    "😀", "function", "<", "\\u12", '"type"',
]  # fmt: skip


@pytest.mark.parametrize("family", FORMATS)
@given(pieces=st.lists(st.sampled_from(_MARKS) | st.text(max_size=3), max_size=40), seed=st.randoms())
def test_whatever_comes_nothing_is_lost_and_cuts_change_nothing(
    family: str, pieces: list[str], seed: Any
) -> None:
    answer = "".join(pieces)
    form = FORMATS[family]
    whole = parse(form.parser(TOOLS), [answer])
    at = sorted(seed.sample(range(len(answer) + 1), min(5, len(answer))))
    cut = parse(
        form.parser(TOOLS), [answer[a:b] for a, b in zip([0, *at], [*at, len(answer)], strict=True)]
    )
    single = parse(form.parser(TOOLS), list(answer))
    for other in (cut, single):
        assert (other.text, other.calls, other.complete) == (whole.text, whole.calls, whole.complete)
    assert len(whole.complete) == len(whole.calls)
    for is_complete, (name, arguments) in zip(whole.complete, whole.calls, strict=True):
        assert name in {"get", "get_all", "write_file"}
        if is_complete:
            assert isinstance(json.loads(arguments), dict)
    if not whole.calls:
        assert whole.text == answer


@pytest.mark.parametrize(
    ("family", "begin", "unit", "end"),
    [
        ("hermes", '<tool_call>{"name": "get", "arguments": {"city": "', "x\\n", '"}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"city": "', "x", '"}, "name": "get"}</tool_call>'),
        ("hermes", "", "<tool_call>", ""),
        ("hermes", '<tool_call>{"name', " ", ""),
        ("hermes", '<tool_call>{"arguments": [', '"<tool_call>{", ', ""),
        ("llama", '{"name": "get", "parameters": {"city": ', "[", ""),
        (
            "qwen_coder",
            "<function=write_file><parameter=content>",
            "\n</parameter",
            "</parameter></function>",
        ),
        ("qwen_coder", "<function=write_file><parameter=tags>", "[", "</parameter></function>"),
        ("gemma4", "<|tool_call>call:get{city:", "{a:", ""),
        ("gemma4", '<|tool_call>call:get{city:<|"|>', "<|", '<|"|>}'),
        ("mistral_name", "[TOOL_CALLS]", "get[ARGS]", "{}"),
    ],
)
def test_huge_and_deep_answers_are_read_through(family: str, begin: str, unit: str, end: str) -> None:
    answer = begin + unit * (200_000 // len(unit)) + end
    pieces = [answer[at : at + 7] for at in range(0, len(answer), 7)]
    found = parse(FORMATS[family].parser(TOOLS), pieces)
    size = len(found.text) + sum(len(text) for _, text in found.calls)
    assert size >= len(answer) / 2
    for is_complete, (_, arguments) in zip(found.complete, found.calls, strict=True):
        if is_complete:
            json.loads(arguments)


def test_more_calls_than_anybody_wants_are_text() -> None:
    found = parse(
        FORMATS["hermes"].parser(TOOLS), ['<tool_call>{"name": "get_all"}</tool_call>'] * (MAX_CALLS + 1)
    )
    assert len(found.calls) == MAX_CALLS
    assert found.text == '<tool_call>{"name": "get_all"}</tool_call>'
