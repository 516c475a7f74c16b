"""How the model that is served writes calls and thoughts: found in its template, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeinfer.client import LocalClient
from edgeinfer_models.chat_template import TemplateSource
from edgeinfer_models.reasoning import ReasoningTags, reasoning_tags
from edgeinfer_models.tool_formats import (
    Tool,
    ToolChoice,
    ToolFormat,
    ToolParser,
    choose_tool_format,
)


class Dialect:
    """ids: of the texts in `texts_wanted` that are one control token in this vocabulary."""

    def __init__(self, template: TemplateSource, ids: Mapping[str, int]) -> None:
        self.tools: ToolFormat = choose_tool_format(template)
        self.reasoning: ReasoningTags | None = reasoning_tags(template)
        self._ids = dict(ids)

    def grammar(
        self, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool, reply: str | None = None
    ) -> str | None:
        """See `ToolFormat.grammar`; None without tools."""
        if not tools:
            return None
        return self.tools.grammar(tools, choice, parallel=parallel, tokens=self._ids, reply=reply)

    def parser(self, tools: Sequence[Tool], *, parallel: bool, beside_reply: bool) -> ToolParser | None:
        """See `ToolFormat.parser`; None without tools."""
        return self.tools.parser(tools, parallel=parallel, beside_reply=beside_reply) if tools else None

    def visible_tokens(self, calls: bool) -> tuple[int, ...]:
        """Control tokens whose text the answer's readers need."""
        texts = list(self.reasoning.visible_tokens) if self.reasoning else []
        if calls:
            texts += self.tools.visible_tokens
        return tuple(self._ids[text] for text in texts if text in self._ids)


def dialect_of(client: LocalClient) -> Dialect:
    """Of a loaded model. May block for some milliseconds. Raises EdgeInferError."""
    client.load()
    template = client.template
    assert template is not None
    tags = reasoning_tags(template)
    wanted = [*choose_tool_format(template).visible_tokens, *(tags.visible_tokens if tags else ())]
    return Dialect(template, client.control_tokens(wanted))
