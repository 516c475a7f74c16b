"""For models whose template knows no tools: our own words tell of them, in the form that Hermes began.

Tools and the form of a call stand in the system message; earlier calls and their results are written as
text in that form, so any template can render them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from edgeinfer_models.lark_text import LarkText
from edgeinfer_models.tool_formats.conversation import Message, normalised
from edgeinfer_models.tool_formats.format import CallRules
from edgeinfer_models.tool_formats.hermes import CLOSE, OPEN, Hermes, read_tagged
from edgeinfer_models.tool_formats.json_calls import bare_call, read_bare_calls
from edgeinfer_models.tool_formats.parsing import Reader
from edgeinfer_models.tool_formats.tools import Tool, ToolChoice

RESULT, RESULT_END = "<tool_response>", "</tool_response>"
_REFUSES_SYSTEM = re.compile(r"raise_exception\([^)]*[Ss]ystem")


class Generic(Hermes):
    """takes_system: whether the template has a place for a system message."""

    name = "generic"

    def __init__(self, *, takes_system: bool = True) -> None:
        self._takes_system = takes_system

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], choice: ToolChoice
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """As text; nothing is left for the template's own `tools`."""
        prepared: list[Message] = []
        for message in normalised(messages):
            plain = _as_text(message)
            # Results follow one another, and then a question: many templates want turns to alternate.
            if prepared and plain["role"] == prepared[-1]["role"] == "user":
                prepared[-1] = {
                    **prepared[-1],
                    "content": _joined(prepared[-1]["content"], plain["content"]),
                }
            else:
                prepared.append(plain)
        if tools and choice.kind != "none":
            self._tell(prepared, _about(tools))
        return prepared, None

    def _tell(self, prepared: list[Message], text: str) -> None:
        first = prepared[0] if prepared else None
        roles = ("system", "developer") if self._takes_system else ("system", "developer", "user")
        if first is not None and first["role"] in roles:
            parts = (text, first["content"]) if first["role"] == "user" else (first["content"], text)
            prepared[0] = {**first, "content": _joined(*parts)}
        else:
            prepared.insert(0, {"role": "system" if self._takes_system else "user", "content": text})

    def _calls(self, rules: LarkText, tools: Sequence[Tool], several: bool) -> CallRules:
        # Untrained in any form, these models often leave the tags out.
        rule = super()._calls(rules, tools, several)
        return replace(rule, led=(*rule.led, f"{bare_call(rules)} call"))

    def _reader(self, tools: Sequence[Tool]) -> Reader:
        bare = partial(read_bare_calls, "arguments")
        return Reader(read_tagged, (OPEN,), starts=("{",), read_start=bare)


def _about(tools: Sequence[Tool]) -> str:
    described = "\n".join(
        json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools
    )
    return (
        "These tools are at your disposal, one a line, each with a JSON schema of its parameters:\n"
        f"{described}\n\n"
        "When a tool is needed, answer with nothing but its call, in exactly this form:\n"
        f'{OPEN}\n{{"name": "the tool\'s name", "arguments": {{"parameter": "value"}}}}\n{CLOSE}\n'
        f"Its result will be given to you between {RESULT} and {RESULT_END}."
        " When no tool is needed, answer as usual."
    )


def _as_text(message: Message) -> Message:
    role, content = str(message.get("role", "")), message["content"]
    if role == "tool":
        return {"role": "user", "content": f"{RESULT}\n{content}\n{RESULT_END}"}
    calls = [
        f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}"
        for call in message.get("tool_calls", ())
    ]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": _joined(content, *calls) if calls else content}


def _joined(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def match(template: str) -> Generic:
    wants_turns = "raise_exception" in template and "alternate" in template and "system" not in template
    return Generic(takes_system=not (wants_turns or _REFUSES_SYSTEM.search(template)))
