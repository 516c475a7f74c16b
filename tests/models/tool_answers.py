"""Tools, and answers that call them as models of each family write them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeinfer_models.chat_template import TemplateSource
from edgeinfer_models.tool_formats import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    Delta,
    TextDelta,
    ToolFormat,
    ToolParser,
    choose_tool_format,
    parse_tools,
)

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city"],
}
FILE = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "content": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "options": {"type": "object", "properties": {"force": {"type": "boolean"}}},
    },
    "required": ["path", "content"],
}


def openai_tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, "description": f"does {name}", "parameters": parameters, **more}
    return {"type": "function", "function": function}


TOOLS = parse_tools(
    [openai_tool("get", WEATHER), openai_tool("get_all"), openai_tool("write_file", FILE)]
)

# What is left of each family's template that says which family it is. Ours, not theirs.
TEMPLATES = {
    "hermes": "{{ tools }}<|im_start|>{{ messages }}<tool_call></tool_call>",
    "qwen_coder": "{{ tools }}<tool_call><function=name><parameter=p></parameter></function></tool_"
    "call>",
    "llama": '{{ tools }}<|start_header_id|>{"name": "…", "parameters": {}}<|python_tag|>',
    "mistral_list": "{{ tools }}[TOOL_CALLS]",
    "mistral_id": "{{ tools }}[TOOL_CALLS]name[CALL_ID]id[ARGS]{}",
    "mistral_name": "{{ tools }}[TOOL_CALLS]name[ARGS]{}",
    "functiongemma": "{{ tools }}<start_function_call>call:name{<escape><escape>}",
    "gemma4": '{{ tools }}<|tool_call>call:name{<|"|><|"|>}<tool_call|>',
    "generic": "{{ messages }}",
}


def format_of(template: str) -> ToolFormat:
    return choose_tool_format(TemplateSource(template, "model", "", ""))


FORMATS = {name: format_of(template) for name, template in TEMPLATES.items()}


@dataclass
class Found:
    """Deltas put together, as a client does it."""

    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name, arguments as text
    ids: list[str] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> Found:
        for delta in deltas:
            if isinstance(delta, TextDelta):
                self.text += delta.text
            elif isinstance(delta, CallStarted):
                assert delta.index == len(self.calls) == len(self.complete)
                self.calls.append((delta.name, ""))
                self.ids.append(delta.id)
            elif isinstance(delta, ArgumentsDelta):
                assert delta.index == len(self.calls) - 1 == len(self.complete)
                name, text = self.calls[-1]
                self.calls[-1] = (name, text + delta.text)
            elif isinstance(delta, CallEnded):
                assert delta.index == len(self.complete)
                self.complete.append(delta.complete)
        return self

    @property
    def read(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(text)) for name, text in self.calls]


def parse(parser: ToolParser, pieces: Sequence[str]) -> Found:
    found = Found()
    for piece in pieces:
        found.add(parser.feed(piece))
    return found.add(parser.finish())
