"""FunctionGemma and Gemma 4: a notation of their own, with a token of its own for quotes.

<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>
<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>

Keys are bare and come in alphabetical order (templates sort them). Gemma 1 to 3 have no form: their
templates know no tools, and the generic one is used.
Sources: ai.google.dev, "FunctionGemma formatting and best practices", "Function calling with Gemma 4".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from edgeinfer_models.json_text import is_json
from edgeinfer_models.lark_text import LarkText, literal
from edgeinfer_models.tool_formats.call_text import CallText, NotACall, Reading
from edgeinfer_models.tool_formats.format import CallRules, ToolFormat
from edgeinfer_models.tool_formats.gemma_schema import GemmaSchema
from edgeinfer_models.tool_formats.parsing import Reader
from edgeinfer_models.tool_formats.tools import Tool

_MAX_DEPTH = 64
_MAX_KEY = 256
_MAX_BARE = 4096
_WORDS = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True)
class Marks:
    """The control tokens: around a call, around a string, and where a call's result would begin."""

    open: str
    close: str
    quote: str
    response: str


FUNCTION_GEMMA = Marks(
    "<start_function_call>", "<end_function_call>", "<escape>", "<start_function_response>"
)
GEMMA_4 = Marks("<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>")


class Gemma(ToolFormat):
    name = "gemma"

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.visible_tokens = (marks.open, marks.close, marks.quote, marks.response)
        # These models go on to the result's opening token, which is where it is our turn.
        self.stop = (marks.response,)

    def _calls(self, rules: LarkText, tools: Sequence[Tool], several: bool) -> CallRules:
        calls = []
        for number, tool in enumerate(tools):
            arguments = GemmaSchema(rules, tool, self.marks.quote, f"tool_{number}").arguments()
            calls.append(rules.add(f"call_{number}", f"{literal(tool.name)} {arguments}"))
        call = rules.add("call", " | ".join(calls))
        rules.add("marked", f"{literal('call:')} {call} {rules.mark(self.marks.close)}")
        led = rules.up_to("led", "LEAD", self.marks.open)
        forced = f"{rules.mark(self.marks.open)} marked"
        return CallRules(forced, (f"{led} marked",), forced, end=f" {rules.mark(self.marks.response)}?")

    def _reader(self, tools: Sequence[Tool]) -> Reader:
        read = partial(_read, self.marks)
        return Reader(read, (self.marks.open,), dropped=(self.marks.response,))


def _read(marks: Marks, source: CallText) -> Reading:
    yield from source.blanks()
    yield from source.literal("call:")
    name = yield from source.span("{ ", 64)
    yield from source.blanks()
    yield from source.literal("{")
    source.start(name)
    yield from _pairs(source, marks.quote, depth=1)
    source.end_call()
    yield from source.blanks()
    yield from source.literal(marks.close)


def _pairs(source: CallText, quote: str, depth: int) -> Reading:
    """An object after its `{`, as JSON."""
    source.arguments("{")
    yield from source.blanks()
    if not (yield from source.optional("}")):
        separator = ""
        while True:
            yield from source.blanks()
            key = yield from source.span(":{}\n", _MAX_KEY)
            key = key.removeprefix(quote).removesuffix(quote).strip('" ')
            yield from source.literal(":")
            source.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            yield from _value(source, quote, "}", depth)
            yield from source.blanks()
            if (yield from source.one_of((",", "}"))) == "}":
                break
            separator = ", "
    source.arguments("}")


def _items(source: CallText, quote: str, depth: int) -> Reading:
    source.arguments("[")
    yield from source.blanks()
    if not (yield from source.optional("]")):
        while True:
            yield from _value(source, quote, "]", depth)
            yield from source.blanks()
            if (yield from source.one_of((",", "]"))) == "]":
                break
            source.arguments(", ")
    source.arguments("]")


def _value(source: CallText, quote: str, closing: str, depth: int) -> Reading:
    if depth > _MAX_DEPTH:
        raise NotACall
    yield from source.blanks()
    if (yield from source.optional(quote)):
        source.arguments('"')
        yield from source.until((quote,), lambda text: source.arguments(_escaped(text)))
        source.arguments('"')
        return
    first = yield from source.peek()
    if first == "{":
        source.skip(1)
        yield from _pairs(source, quote, depth + 1)
    elif first == "[":
        source.skip(1)
        yield from _items(source, quote, depth + 1)
    elif first == '"':
        yield from source.json(source.arguments)
    else:
        text = (yield from source.span(f",{closing}", _MAX_BARE)).strip()
        text = _WORDS.get(text, text)
        # A string whose quotes were forgotten.
        source.arguments(text if is_json(text) else f'"{_escaped(text)}"')


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def match(template: str) -> ToolFormat | None:
    for marks in (FUNCTION_GEMMA, GEMMA_4):
        if marks.open in template and "call:" in template:
            return Gemma(marks)
    return None
