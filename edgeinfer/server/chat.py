"""/v1/chat/completions: from OpenAI's request to the engine's, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgeinfer.client import Ended, Event, Request, RunStats, Text
from edgeinfer.constraint import Constraint, check_constraint
from edgeinfer.server.choice import Choice
from edgeinfer.server.errors import invalid
from edgeinfer.server.openai_replies import Chat
from edgeinfer.server.openai_requests import ChatRequest, NamedTool, ResponseFormat, message_of
from edgeinfer.server.service import Service
from edgeinfer_models.reasoning import ReasoningParser
from edgeinfer_models.tool_formats import Tool, ToolChoice, ToolFormat

# A template's own variables, which a request may not replace.
_RESERVED = {"messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt"}


class ChatJob:
    """What one request asks for: the engine's requests, one for each choice, and how to read them."""

    def __init__(self, service: Service, body: ChatRequest, asked_by: str) -> None:
        """Raises ApiError, EdgeInferError."""
        self.shapes = Chat(service.name)
        self.wants_logprobs = bool(body.logprobs)
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._warnings = _warnings(body)
        messages = tuple(message_of(i, message) for i, message in enumerate(body.messages))
        tools = _tools_of(body)
        form = service.tool_format if tools else None
        choice = _choice_of(body, tools)
        constraint = _constraint_of(body.response_format)
        request = Request(
            messages=messages,
            sampling=body.sampling(service.sampling),
            max_tokens=body.longest or service.max_tokens,
            stop=body.stop_strings,
            ignore_eos=body.ignore_eos,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            template_options=_template_options(body),
            constraint=constraint,
            asked_by=asked_by,
        )
        self.requests = [_numbered(request, i) for i in range(body.n or 1)]
        self.choices = [Choice(i, None, None) for i in range(body.n or 1)]

    # -- Reader ----------------------------------------------------------------------------------

    def begin(self) -> str:
        return "".join(self.shapes.role(choice.index) for choice in self.choices)

    def read(self, index: int, event: Event) -> str:
        if isinstance(event, Text):
            return self.choices[index].read(event, self.shapes)
        if isinstance(event, Ended):
            event.stats.warnings.extend(self._warnings)
            return self.choices[index].end(event, self.shapes)
        return ""

    def end(self, stats: Sequence[RunStats]) -> str:
        return self.shapes.usage(stats) if self._wants_usage else ""

    def whole(self) -> dict[str, Any]:
        stats = [choice.stats for choice in self.choices if choice.stats is not None]
        return self.shapes.whole([c.whole(self.wants_logprobs) for c in self.choices], stats)
