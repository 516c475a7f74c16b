"""Mistral: three forms after one control token, by the age of the tokenizer.

[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "9Ae3bDc2F"}]
[TOOL_CALLS]get_weather[CALL_ID]9Ae3bDc2F[ARGS]{"city": "Paris"}
[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}

Ids are nine letters and digits, and templates refuse others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from edgeinfer_models.lark_text import LarkText, literal
from edgeinfer_models.tool_formats.call_text import CallText, Reading
from edgeinfer_models.tool_formats.conversation import Message, with_ids
from edgeinfer_models.tool_formats.format import MORE_CALLS, CallRules, ToolFormat, json_call
from edgeinfer_models.tool_formats.json_calls import read_json_calls
from edgeinfer_models.tool_formats.parsing import Reader, random_id
from edgeinfer_models.tool_formats.tools import Tool, ToolChoice

OPEN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ID = re.compile(r"[a-zA-Z0-9]{9}")


class Mistral(ToolFormat):
    """form: "list" is the first of the three above, "id" the second, "name" the third."""

    name = "mistral"
    visible_tokens = (OPEN, ARGUMENTS, CALL_ID)

    def __init__(self, form: Literal["list", "id", "name"]) -> None:
        self.form = form

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], choice: ToolChoice
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Ids of other makes become nine letters and digits, the same ones every time."""
        prepared, shown = super().prepare(messages, tools, choice)
        return with_ids(prepared, _nine), shown

    def _calls(self, rules: LarkText, tools: Sequence[Tool], several: bool) -> CallRules:
        led = rules.up_to("led", "LEAD", OPEN)
        if self.form == "list":
            # A call's id, which older ones write at its end, is not needed: we give it one.
            call = json_call(rules, tools, key="arguments")
            opening = literal('{"name": "')
            more = f' ("," WS {opening} {call}){{0,{MORE_CALLS}}}' if several else ""
            rules.add("list", f'WS "[" {opening} {call}{more} "]"')
            return CallRules(f"{rules.mark(OPEN)} list", (f"{led} list",))
        rules.add("ID", "/[a-zA-Z0-9]{9}/")
        middle = f"{rules.mark(CALL_ID)} ID " if self.form == "id" else ""
        calls = []
        for number, tool in enumerate(tools):
            arguments = rules.add(f"arguments_{number}", f"%json {tool.arguments_json()}")
            body = f"{literal(tool.name)} {middle}{rules.mark(ARGUMENTS)} {arguments}"
            calls.append(rules.add(f"call_{number}", body))
        call = rules.add("call", " | ".join(calls))
        return CallRules(
            f"{rules.mark(OPEN)} {call}", (f"{led} {call}",), f"WS {rules.mark(OPEN)} {call}"
        )

    def _reader(self, tools: Sequence[Tool]) -> Reader:
        return Reader(_read, (OPEN,), new_id=lambda: random_id(9))


def _read(source: CallText) -> Reading:
    yield from source.blanks()
    if (yield from source.peek()) in ("[", "{"):
        # In this place a bracket is a list of calls, or the name of one that is missing.
        yield from read_json_calls(source)
        return
    name = yield from source.span("[{ \n", 64)
    yield from source.blanks()
    id = ""
    if (yield from source.optional(CALL_ID)):
        id = yield from source.span("[{", 64)
    yield from source.optional(ARGUMENTS)
    yield from source.blanks()
    if (yield from source.peek()) != "{":
        yield from source.literal("{")
    source.start(name, id if _ID.fullmatch(id) else "")
    yield from source.json(source.arguments)
    source.end_call()


def _nine(id: str) -> str:
    if _ID.fullmatch(id):
        return id
    digest = hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()
    return digest[:9]


def match(template: str) -> ToolFormat | None:
    if OPEN not in template:
        return None
    return Mistral("id" if CALL_ID in template else "name" if ARGUMENTS in template else "list")
