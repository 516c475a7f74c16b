"""Reasoning told apart from the answer, and grammars that wait for its end."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer_models.chat_template import TemplateSource
from edgeinfer_models.reasoning import (
    ContentDelta,
    ReasoningDelta,
    ReasoningParser,
    ReasoningTags,
    constrained_after_reasoning,
    reasoning_tags,
)
from edgeinfer_models.tool_formats import ToolChoice
from tests.models.grammar_acceptance import Grammar
from tests.models.tool_answers import FORMATS, TOOLS

THINK = ReasoningTags("<think>", "</think>")
CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>'


def source(text: str) -> TemplateSource:
    return TemplateSource(text, "model", "", "")


def split(pieces: list[str], *, opened: bool, tags: ReasoningTags = THINK) -> tuple[str, str]:
    parser = ReasoningParser(tags, opened=opened)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    assert all(delta.text for delta in deltas)
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    return reasoning, "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))


def test_tags_are_known_by_the_template() -> None:
    assert reasoning_tags(source("{{ content.split('</think>')[-1] }}")) == THINK
    assert reasoning_tags(source("[THINK]")) == ReasoningTags("[THINK]", "[/THINK]")
    assert reasoning_tags(source("{{ messages }}")) is None
    gemma = reasoning_tags(source("<|channel>thought\n"))
    assert gemma is not None
    assert split(list("<|channel>thought\nhm\n<channel|>Hi"), opened=False, tags=gemma) == ("hm", "Hi")


def test_a_prompt_may_have_opened_the_reasoning() -> None:
    assert THINK.opened_by("<|im_start|>assistant\n<think>\n")
    assert not THINK.opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not THINK.opened_by("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("answer", "opened", "reasoning", "content"),
    [
        ("<think>\nSo.\n\nYes.\n</think>\n\nHi <b>", False, "So.\n\nYes.", "Hi <b>"),
        ("So.</think>Hi", True, "So.", "Hi"),
        ("\n\n</think>\n\nHi", True, "", "Hi"),
        ("Hi", False, "", "Hi"),
        ("  Hi <think>no</think>", False, "", "  Hi <think>no</think>"),
        ("<thinking>", False, "", "<thinking>"),
        ("<thin", False, "", "<thin"),
        ("<think>a < b </thin", False, "a < b </thin", ""),
        ("never closed ", True, "never closed ", ""),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("", True, "", ""),
        (" \n", False, "", " \n"),
        ("<think></think>", False, "", ""),
    ],
)
def test_reasoning_is_split_off_wherever_the_answer_is_cut(
    answer: str, opened: bool, reasoning: str, content: str
) -> None:
    for pieces in ([answer], list(answer), *([answer[:at], answer[at:]] for at in range(len(answer)))):
        assert split(pieces, opened=opened) == (reasoning, content)


def test_only_a_possible_tag_and_white_space_before_it_wait() -> None:
    parser = ReasoningParser(THINK, opened=True)
    assert parser.feed("I think\n") == [ReasoningDelta("I think")]
    assert parser.feed("so </") == [ReasoningDelta("\nso")]
    assert parser.is_reasoning
    assert parser.feed("b>") == [ReasoningDelta(" </b>")]
    assert parser.feed("</think>") == []
    assert parser.feed("Hi ") == [ContentDelta("Hi ")]
    assert not parser.is_reasoning


@given(
    pieces=st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "ink>", " ", "\n", "a"])),
    opened=st.booleans(),
)
def test_cuts_change_nothing_and_no_word_is_lost(pieces: list[str], opened: bool) -> None:
    answer = "".join(pieces)
    whole = split([answer], opened=opened)
    assert split(pieces, opened=opened) == split(list(answer), opened=opened) == whole
    assert "".join(whole).count("a") == answer.count("a")


# -- grammars ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", [(), ("<think>", "</think>")], ids=["as text", "as control tokens"])
def test_json_is_held_after_the_reasoning_only(control: tuple[str, ...]) -> None:
    tokens = {text: 257 + number for number, text in enumerate(control)}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    plain = f"start: %json {json.dumps(schema)}\n"
    opened = Grammar(constrained_after_reasoning(plain, THINK, opened=True, tokens=tokens), control)
    assert opened.takes('I say {"b": 1} or\n</think>\n\n{"a": 1}')
    assert not opened.takes('{"a": 1}')
    assert not opened.begins("So.</think>\n\nHello")
    closed = Grammar(constrained_after_reasoning(plain, THINK, opened=False, tokens=tokens), control)
    assert closed.takes('{"a": 1}')
    assert closed.takes('<think>\nSo.</think>\n{"a": 1}')
    assert not closed.begins("So.")
    assert not closed.takes("<think>So.")


@pytest.mark.parametrize("control", [(), ("<think>", "</think>")], ids=["as text", "as control tokens"])
def test_calls_are_held_after_the_reasoning_only(control: tuple[str, ...]) -> None:
    tokens = {text: 257 + number for number, text in enumerate(control)}
    lark = FORMATS["hermes"].grammar(TOOLS, ToolChoice("auto"), tokens=tokens)
    assert lark is not None
    for is_opened in (True, False):
        held = Grammar(
            constrained_after_reasoning(lark, THINK, opened=is_opened, tokens=tokens), control
        )
        begin = "" if is_opened else "<think>"
        assert held.takes(f"{begin}A <tool_call> would do.</think>\n\nI look. {CALL}")
        assert held.takes(f"{begin}So.</think>Hello.")
        assert not held.begins(f"{begin}So.</think>Hello. <tool_call>no")
        if not is_opened:
            assert held.takes(f"Hello. {CALL}")
            assert held.takes("Hello, I <b>think</b>.")
            assert not held.begins("Hello. <tool_call>no")


def test_a_required_call_may_be_thought_about() -> None:
    lark = FORMATS["hermes"].grammar(TOOLS, ToolChoice("required"), parallel=False)
    assert lark is not None
    held = Grammar(constrained_after_reasoning(lark, THINK, opened=False, tokens={}))
    assert held.takes(CALL)
    assert held.takes(f"<think>\nHm.\n</think>\n\n{CALL}")
    assert not held.begins("<think>Hm.</think>Hello")
    gemma = ReasoningTags("<|channel>", "<channel|>", "thought")
    held = Grammar(constrained_after_reasoning(lark, gemma, opened=False, tokens={}))
    assert held.takes(f"<|channel>thought\nHm.<channel|>{CALL}")
