"""One choice of a chat reply in the making: the model's text as thinking, text and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeinfer.client import Ended, RunStats, Text, TokenLogprob
from edgeinfer.server.openai_replies import Chat, finish_reason, logprob_of
from edgeinfer_models.reasoning import ContentDelta, ReasoningDelta, ReasoningParser, ReasoningTags
from edgeinfer_models.tool_formats import ArgumentsDelta, CallStarted, Delta, TextDelta, ToolParser


class Choice:
    """tags, tools: None where the text is not looked through for them."""

    def __init__(self, index: int, tags: ReasoningTags | None, tools: ToolParser | None) -> None:
        self.index = index
        self.stats: RunStats | None = None
        self._tags = tags
        self._reasoning: ReasoningParser | None = None
        self._tools = tools
        self._text: list[str] = []
        self._thought: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[TokenLogprob] = []
        self._unsent: list[TokenLogprob] = []  # of tokens whose text is held back

    def begin(self, prompt_end: str) -> None:
        """The prompt is known, and with it whether the answer begins inside a thought."""
        if self._tags is not None:
            opened = self._tags.opened_by(prompt_end)
            self._reasoning = ReasoningParser(self._tags, opened=opened)

    # -- as it comes -----------------------------------------------------------------------------

    def read(self, event: Text, shapes: Chat) -> str:
        """The chunks that tell it."""
        self._logprobs += event.logprobs
        self._unsent += event.logprobs
        if self._reasoning is None and self._tools is None:  # the path of nearly every token
            self._text.append(event.text)
            return self._text_chunk(event.text, shapes)
        thought, content = "", event.text
        if self._reasoning is not None:
            thought, content = _split(self._reasoning.feed(event.text))
        deltas = self._tools.feed(content) if self._tools is not None else [TextDelta(content)]
        return self._chunks(thought, deltas, shapes)

    def end(self, event: Ended, shapes: Chat) -> str:
        """The chunks of what was held back, and the one that ends the choice."""
        self.stats = event.stats
        thought, content = ("", "") if self._reasoning is None else _split(self._reasoning.finish())
        deltas: list[Delta] = [TextDelta(content)]
        if self._tools is not None:
            deltas = [*self._tools.feed(content), *self._tools.finish()]
        chunks = self._chunks(thought, deltas, shapes)
        if self._unsent:
            chunks += self._text_chunk("", shapes)
        if self._calls and event.stats.finish_reason == "stop":  # what was cut stays `length`
            event.stats.finish_reason = "tool_calls"
        return chunks + shapes.finish(self.index, self.finish_reason, event.stats)

    def _chunks(self, thought: str, deltas: Sequence[Delta], shapes: Chat) -> str:
        chunks = ""
        if thought:
            self._thought.append(thought)
            chunks += shapes.reasoning(self.index, thought)
        for delta in deltas:
            if isinstance(delta, TextDelta):
                if delta.text:
                    self._text.append(delta.text)
                    chunks += self._text_chunk(delta.text, shapes)
            elif isinstance(delta, CallStarted):
                call = {"name": delta.name, "arguments": ""}
                self._calls.append({"id": delta.id, "type": "function", "function": call})
                chunks += shapes.call(self.index, delta.index, delta.id, delta.name)
            elif isinstance(delta, ArgumentsDelta):
                self._calls[delta.index]["function"]["arguments"] += delta.text
                chunks += shapes.arguments(self.index, delta.index, delta.text)
        return chunks

    def _text_chunk(self, text: str, shapes: Chat) -> str:
        logprobs, self._unsent = self._unsent, []
        return shapes.text(self.index, text, logprobs)

    # -- as a whole ------------------------------------------------------------------------------

    @property
    def finish_reason(self) -> str:
        assert self.stats is not None
        return finish_reason(self.stats)

    def whole(self, wants_logprobs: bool) -> dict[str, Any]:
        text = "".join(self._text)
        message: dict[str, Any] = {
            "role": "assistant",
            # OpenAI's way: calls and nothing else have no content
            "content": None if self._calls and not text.strip() else text,
            "refusal": None,
        }
        if self._thought:
            message["reasoning_content"] = "".join(self._thought)
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = {"content": [logprob_of(one) for one in self._logprobs]} if wants_logprobs else None
        return {
            "index": self.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }


def _split(deltas: Sequence[ReasoningDelta | ContentDelta]) -> tuple[str, str]:
    """The thought's text and the answer's: a thought comes first."""
    thought = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    return thought, "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
