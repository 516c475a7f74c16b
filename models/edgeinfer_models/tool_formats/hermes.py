"""Hermes, Qwen 2.5 and 3 and others: JSON in tags, one call to a pair of tags.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>

The tags are control tokens in few vocabularies, added tokens with a text in most (Qwen), plain text in
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeinfer_models.lark_text import LarkText, literal
from edgeinfer_models.tool_formats.call_text import CallText, Reading
from edgeinfer_models.tool_formats.format import CallRules, ToolFormat, json_call
from edgeinfer_models.tool_formats.json_calls import read_json_calls
from edgeinfer_models.tool_formats.parsing import Reader
from edgeinfer_models.tool_formats.tools import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    name = "hermes"
    visible_tokens = (OPEN, CLOSE)

    def _calls(self, rules: LarkText, tools: Sequence[Tool], several: bool) -> CallRules:
        call = json_call(rules, tools, key="arguments")
        opening = literal('{"name": "')
        rules.add("tagged", f"WS {opening} {call} WS {rules.mark(CLOSE)}")
        led = rules.up_to("led", "LEAD", OPEN)
        forced = f"{rules.mark(OPEN)} tagged"
        return CallRules(forced, (f"{led} tagged",), following=f"WS {forced}")

    def _reader(self, tools: Sequence[Tool]) -> Reader:
        return Reader(read_tagged, (OPEN,))


def read_tagged(source: CallText) -> Reading:
    yield from read_json_calls(source)
    yield from source.blanks()
    yield from source.literal(CLOSE)


def match(template: str) -> ToolFormat | None:
    return Hermes() if OPEN in template else None
