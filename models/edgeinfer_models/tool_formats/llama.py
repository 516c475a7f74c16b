"""Llama 3.1 to 3.3: a bare JSON object as the whole answer, sometimes after a control token.

<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeinfer_models.lark_text import LarkText, literal
from edgeinfer_models.tool_formats.conversation import Message, one_call_each
from edgeinfer_models.tool_formats.format import CallRules, ToolFormat, json_call
from edgeinfer_models.tool_formats.json_calls import read_json_calls
from edgeinfer_models.tool_formats.parsing import Reader
from edgeinfer_models.tool_formats.tools import Tool, ToolChoice

TAG = "<|python_tag|>"


class Llama(ToolFormat):
    name = "llama"
    visible_tokens = (TAG,)

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], choice: ToolChoice
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Its templates refuse a message with more than one call."""
        prepared, shown = super().prepare(messages, tools, choice)
        return one_call_each(prepared), shown

    def _calls(self, rules: LarkText, tools: Sequence[Tool], several: bool) -> CallRules:
        call = json_call(rules, tools, key="parameters")
        opening = literal('{"name": "')
        # An answer may be other JSON: only what begins like this is held to be a call.
        blank = r"[ \t\r\n]{0,8}"
        kind = rf'("type"{blank}:{blank}"function"{blank},{blank})?'
        rules.add("BARE", rf'/{blank}\{{{blank}{kind}"name"{blank}:{blank}"/')
        bare = rules.add("bare[lazy]", "BARE")
        tagged = rules.up_to("tagged", "LEAD", TAG)
        return CallRules(
            forced=f"{opening} {call}",
            led=(f"{bare} {call}", f"{tagged} {opening} {call}"),
            following=f'WS (";" WS)? {opening} {call}',
        )

    def _reader(self, tools: Sequence[Tool]) -> Reader:
        return Reader(read_json_calls, (TAG,), starts=("{",))


def match(template: str) -> ToolFormat | None:
    is_llama = "<|start_header_id|>" in template and '"parameters"' in template.replace('\\"', '"')
    return Llama() if TAG in template or is_llama else None
