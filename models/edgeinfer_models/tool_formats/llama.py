"""Llama 3.1 to 3.3: a bare JSON object as the whole answer, sometimes after a control token.

<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from edgeinfer_models.lark_text import LarkText, literal
from edgeinfer_models.tool_formats.conversation import Message, one_call_each
from edgeinfer_models.tool_formats.format import CallRules, ToolFormat, json_call
from edgeinfer_models.tool_formats.json_calls import OPENING, bare_call, read_bare_calls
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
        opening = literal(OPENING)
        bare = bare_call(rules)
        tagged = rules.up_to("tagged", "LEAD", TAG)
        return CallRules(
            # In pieces as JSON has them: beside a reply, a longer one would lead past what JSON may be.
            forced=" ".join(map(literal, ("{", '"name"', ":", " ", '"'))) + f" {call}",
            led=(f"{bare} {call}", f"{tagged} {opening} {call}"),
            following=f'WS (";" WS)? {opening} {call}',
        )

    def _reader(self, tools: Sequence[Tool]) -> Reader:
        return Reader(partial(read_bare_calls, "parameters"), (TAG,), starts=("{",))

    def _reader_beside_reply(self, tools: Sequence[Tool]) -> Reader:
        # A reply has no blanks outside its strings, and a call must have this one.
        return replace(self._reader(tools), starts=(OPENING,), is_edge_only=True)


def match(template: str) -> ToolFormat | None:
    is_llama = "<|start_header_id|>" in template and '"parameters"' in template.replace('\\"', '"')
    return Llama() if TAG in template or is_llama else None
