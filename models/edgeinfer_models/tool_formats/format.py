"""What families of models have in common: the interface, and how grammars are put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from edgeinfer_models.lark_text import ANY_TEXT, LarkText, literal
from edgeinfer_models.tool_formats.call_text import MAX_CALLS
from edgeinfer_models.tool_formats.conversation import Message, normalised
from edgeinfer_models.tool_formats.parsing import Reader, ToolParser
from edgeinfer_models.tool_formats.tools import Tool, ToolChoice

MORE_CALLS = 15  # after the first; without a bound a small model calls for ever


@dataclass(frozen=True)
class CallRules:
    """Expressions over a grammar's rules."""

    forced: str  # a call, at the answer's beginning
    led: tuple[str, ...]  # free text (LEAD) and a call, for each way one begins
    following: str = ""  # a further call; "" where the form has none
    end: str = ""  # what may stand at the very end


class ToolFormat(ABC):
    """How one family of models is told about tools and writes its calls. Holds no state of a request."""

    name: ClassVar[str]
    # Control tokens have no text: the detokenizer must give out that of these for this request.
    visible_tokens: tuple[str, ...] = ()
    # Ends an answer, beside the model's own end tokens; needed only where no grammar holds the answer.
    stop: tuple[str, ...] = ()

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], choice: ToolChoice
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Messages and `tools` for the template. All tools are shown, also where `choice` names one: a
        prompt that stays the same is found in the prefix cache."""
        shown = [tool.for_template() for tool in tools] if choice.kind != "none" else []
        return normalised(messages), shown or None

    def grammar(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        *,
        parallel: bool = True,
        tokens: Mapping[str, int] | None = None,
        reply: str | None = None,
    ) -> str | None:
        """The answer's grammar (llguidance's Lark), or None where nothing is to be held.

        required, named: the answer is a call (required and parallel: up to MORE_CALLS more) and ends
        after it. auto: free text; once a call has begun it must be one of the tools with arguments that
        its schema allows, and after it only further calls or the end may come.
        tokens: see `lark_text`; the ids of those of `visible_tokens` that are control tokens.
        reply: for auto, an expression that an answer without a call is held to: then the answer is that
        or calls, and no free text.
        Raises ToolsInvalid or ConstraintInvalid for a strict tool whose schema cannot be held.
        """
        allowed = choice.select(tools)
        if not allowed:
            return None
        for tool in allowed:
            tool.verify()
        rules = LarkText(tokens or {})
        rules.add("WS", r"/[ \t\r\n]{0,32}/")
        rules.add("LEAD", ANY_TEXT)
        is_several = parallel and choice.kind != "named"
        calls = self._calls(rules, allowed, is_several)
        more = f" ({calls.following}){{0,{MORE_CALLS}}} WS" if is_several and calls.following else ""
        if choice.kind != "auto":
            return rules.grammar(f"{calls.forced}{more}{calls.end}")
        if reply is not None:
            rules.add("reply", reply)
            return rules.grammar(f"reply | {calls.forced}{more}{calls.end}")
        return rules.grammar(" | ".join(["LEAD", *(f"{each}{more}{calls.end}" for each in calls.led)]))

    def parser(
        self, tools: Sequence[Tool], *, parallel: bool = True, beside_reply: bool = False
    ) -> ToolParser:
        """For one answer; `tools` are those that may be called. beside_reply: of a grammar with `reply`,
        whose text may have marks in it."""
        reader = self._reader_beside_reply(tools) if beside_reply else self._reader(tools)
        return ToolParser(reader, {tool.name for tool in tools}, MAX_CALLS if parallel else 1)

    def begins_call(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        """Texts without one of which there is no call in an answer."""
        reader = self._reader(tools)
        return (*reader.triggers, *reader.starts)

    @abstractmethod
    def _calls(self, rules: LarkText, tools: Sequence[Tool], several: bool) -> CallRules:
        """several: a form that puts all calls into one may take more than one there."""

    @abstractmethod
    def _reader(self, tools: Sequence[Tool]) -> Reader: ...

    def _reader_beside_reply(self, tools: Sequence[Tool]) -> Reader:
        """Of what a forced call may be."""
        return replace(self._reader(tools), starts=(), is_edge_only=True)


def json_call(rules: LarkText, tools: Sequence[Tool], *, key: str, end: str = "}") -> str:
    """A rule for a call as a JSON object, from its name on: what stands before is `{"name": "`.

    The framing is fixed, as templates write it: there a model has nothing to decide.
    """
    calls = []
    for number, tool in enumerate(tools):
        arguments = rules.add(f"arguments_{number}", f"%json {tool.arguments_json()}")
        framing = literal(f'{tool.name}", "{key}": ')
        calls.append(rules.add(f"call_{number}", f"{framing} {arguments} {literal(end)}"))
    return rules.add("call", " | ".join(calls))
