"""/v1/chat/completions: from OpenAI's request to the engine's, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeinfer.client import NO_STOP_STRINGS, Ended, Event, Message, Queued, Request, RunStats, Text
from edgeinfer.constraint import Constraint, as_lark, check_constraint, checked_schema
from edgeinfer.server.choice import Choice
from edgeinfer.server.dialect import Dialect
from edgeinfer.server.errors import ApiError, invalid
from edgeinfer.server.openai_replies import Chat
from edgeinfer.server.openai_requests import ChatRequest, NamedTool, ResponseFormat, message_of
from edgeinfer.server.service import Service
from edgeinfer.server.warnings import ignored_fields
from edgeinfer_models.tool_formats import Tool, ToolChoice, parse_tool_choice, parse_tools

# A template's own variables, which a request may not replace.
_RESERVED = {"messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt"}
_MOST_VARIABLE_CHARACTERS = 16_384


class ChatJob:
    """What one HTTP request asks for: the engine's requests, one a choice, and how to read them."""

    def __init__(self, service: Service, body: ChatRequest, asked_by: str) -> None:
        """Raises ApiError, EdgeInferError."""
        self.shapes = Chat(service.name)
        self._wants_logprobs = bool(body.logprobs)
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._warnings = ignored_fields(body)
        dialect = service.dialect
        tools, choice = _tools_of(body)
        callable_tools = tools if choice.kind != "none" else []
        messages, shown = dialect.tools.prepare(_messages_of(body), tools, choice)
        parallel = body.parallel_tool_calls is not False
        wanted = format_of(body.response_format)
        constraint = _constraint_of(wanted, dialect, callable_tools, choice, parallel)
        is_free = bool(callable_tools) and choice.kind == "auto" and wanted is None
        request = Request(
            messages=tuple(_message(each) for each in messages),
            sampling=body.sampling(service.sampling),
            max_tokens=body.most_tokens(service.max_tokens),
            stop=body.stop_strings,
            stop_before=dialect.tools.begins_call(callable_tools) if is_free else (),
            ignore_eos=body.ignore_eos,
            overflow=service.overflow,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            tools=tuple(shown or ()),
            template_options=_template_options(body),
            constraint=constraint,
            may_think=True,
            visible_tokens=dialect.visible_tokens(bool(callable_tools)),
            asked_by=asked_by,
        )
        if request.stop and not request.takes_stops:
            request = replace(request, stop=())
            self._warnings.append(NO_STOP_STRINGS)
        count = body.n or 1
        self.requests = [
            replace(request, sampling=request.sampling.for_choice(index)) for index in range(count)
        ]
        self._choices = [
            Choice(
                index,
                dialect.reasoning,
                dialect.parser(callable_tools, parallel=parallel, beside_reply=wanted is not None),
            )
            for index in range(count)
        ]

    # -- Reader ----------------------------------------------------------------------------------

    def begin(self) -> str:
        return "".join(self.shapes.role(choice.index) for choice in self._choices)

    def read(self, index: int, event: Event) -> str:
        choice = self._choices[index]
        if isinstance(event, Text):
            return choice.read(event, self.shapes)
        if isinstance(event, Queued):
            choice.begin(event.prompt_end)
        elif isinstance(event, Ended):
            event.stats.warnings.extend(self._warnings)
            return choice.end(event, self.shapes)
        return ""

    def end(self, stats: Sequence[RunStats]) -> str:
        return self.shapes.usage(stats) if self._wants_usage else ""

    def whole(self) -> dict[str, Any]:
        stats = [choice.stats for choice in self._choices if choice.stats is not None]
        return self.shapes.whole([c.whole(self._wants_logprobs) for c in self._choices], stats)


def _messages_of(body: ChatRequest) -> list[dict[str, Any]]:
    return [message_of(i, message).as_template_value() for i, message in enumerate(body.messages)]


def _message(value: Mapping[str, Any]) -> Message:
    extra = {name: found for name, found in value.items() if name not in ("role", "content")}
    return Message(str(value["role"]), str(value.get("content") or ""), extra)


def _tools_of(body: ChatRequest) -> tuple[list[Tool], ToolChoice]:
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if (body.model_extra or {}).get(name) is not None:
            raise invalid(f"{name}: this older form is not taken; use {instead}", name)
    tools = list(parse_tools(body.tools or [], checked_schema))
    wanted = body.tool_choice
    value = wanted.model_dump() if isinstance(wanted, NamedTool) else wanted
    return tools, parse_tool_choice(value, tools)


def _constraint_of(
    wanted: Constraint | None,
    dialect: Dialect,
    tools: Sequence[Tool],
    choice: ToolChoice,
    parallel: bool,
) -> Constraint | None:
    """What holds the answer: the form of calls, the reply's format, or that it is one of both."""
    reply = None
    if wanted is not None and tools:
        check_constraint(wanted)  # inside another grammar its faults could not be named
        reply = as_lark(wanted).removeprefix("start:").strip()
    calls = dialect.grammar(tools, choice, parallel=parallel, reply=reply)
    return wanted if calls is None else Constraint("lark", calls)


def format_of(found: ResponseFormat | None) -> Constraint | None:
    if found is None or found.type == "text":
        return None
    if found.type == "json_object":
        return Constraint("json_object")
    if found.json_schema is None or found.json_schema.schema_ is None:
        raise invalid("response_format.json_schema.schema is missing", "response_format.json_schema")
    return Constraint("json_schema", json.dumps(found.json_schema.schema_))


def _template_options(body: ChatRequest) -> dict[str, Any]:
    """Variables for the template: values, never code. Raises ApiError."""
    options = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        options.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            options.setdefault("enable_thinking", False)
    taken = _RESERVED & options.keys()
    if taken:
        raise invalid(f"chat_template_kwargs cannot set {sorted(taken)[0]!r}", "chat_template_kwargs")
    try:
        size = len(json.dumps(options))
    except (TypeError, ValueError, RecursionError):
        raise invalid("chat_template_kwargs is nested too deeply", "chat_template_kwargs") from None
    if size > _MOST_VARIABLE_CHARACTERS:
        raise invalid(
            f"chat_template_kwargs has {size} characters as JSON; too many", "chat_template_kwargs"
        )
    return options


__all__ = ["ApiError", "ChatJob"]
