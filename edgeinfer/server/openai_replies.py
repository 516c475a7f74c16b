"""OpenAI's reply shapes. One `Chat` or `Completion` for each HTTP request: its id, its time, its model.

Chunks are put together as text: this is done for every burst of tokens of every stream.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from edgeinfer.client import RunStats, TokenLogprob
from edgeinfer.server.sse import dumps as _dumps

LEAST_LOGPROB = -9999.0


def usage_of(stats: Sequence[RunStats], prompts: int = 1) -> dict[str, Any]:
    """Of all answers together; the prompt counts once for each of `prompts`, however many answers.

    stats: in the order of choices, which is prompt by prompt.
    """
    each = max(1, len(stats) // max(1, prompts))
    counted = stats[::each]
    prompt = sum(s.usage.prompt_tokens for s in counted)
    completion = sum(s.usage.completion_tokens for s in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(s.usage.cached_tokens for s in counted)},
    }


def stats_object(stats: RunStats) -> dict[str, Any]:
    """The `edgeinfer` object; the text is in the answer already."""
    found = stats.as_json()
    del found["text"]
    return found


def finish_reason(stats: RunStats) -> str:
    """OpenAI's word for it, which has none for an answer that was cancelled."""
    return "stop" if stats.finish_reason == "cancelled" else stats.finish_reason


class Chat:
    """Shapes of one /v1/chat/completions request."""

    def __init__(self, model: str) -> None:
        self.id = "chatcmpl-" + secrets.token_hex(12)
        self.created = int(time.time())
        self.model = model
        self._head = (
            f'data: {{"id":"{self.id}","object":"chat.completion.chunk","created":{self.created},'
            f'"model":{_dumps(model)},"choices":['
        )

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> str:
        return (
            f'{self._head}{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}]'
        )

    def role(self, index: int) -> str:
        return self._chunk(index, '{"role":"assistant","content":""}') + "}\n\n"

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> str:
        found = _dumps({"content": [logprob_of(one) for one in logprobs]}) if logprobs else "null"
        return self._chunk(index, f'{{"content":{_dumps(text)}}}', found) + "}\n\n"

    def reasoning(self, index: int, text: str) -> str:
        return self._chunk(index, f'{{"reasoning_content":{_dumps(text)}}}') + "}\n\n"

    def call(self, index: int, number: int, call_id: str, name: str) -> str:
        call = {
            "index": number,
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        return self._chunk(index, _dumps({"tool_calls": [call]})) + "}\n\n"

    def arguments(self, index: int, number: int, text: str) -> str:
        call = {"index": number, "function": {"arguments": text}}
        return self._chunk(index, _dumps({"tool_calls": [call]})) + "}\n\n"

    def finish(self, index: int, reason: str, stats: RunStats) -> str:
        end = self._chunk(index, "{}", finish=_dumps(reason))
        return f'{end},"edgeinfer":{_dumps(stats_object(stats))}}}\n\n'

    def usage(self, stats: Sequence[RunStats]) -> str:
        return f'{self._head}],"usage":{_dumps(usage_of(stats))}}}\n\n'

    def whole(self, choices: Sequence[dict[str, Any]], stats: Sequence[RunStats]) -> dict[str, Any]:
        reply = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            "usage": usage_of(stats),
        }
        return with_stats(reply, stats)


class Completion:
    """Shapes of one /v1/completions request; whole replies and chunks are the same object."""

    def __init__(self, model: str) -> None:
        self.id = "cmpl-" + secrets.token_hex(12)
        self.created = int(time.time())
        self.model = model
        self._head = (
            f'data: {{"id":"{self.id}","object":"text_completion","created":{self.created},'
            f'"model":{_dumps(model)},"choices":['
        )

    def text(self, index: int, text: str, logprobs: dict[str, Any] | None = None) -> str:
        found = "null" if logprobs is None else _dumps(logprobs)
        return (
            f'{self._head}{{"index":{index},"text":{_dumps(text)},"logprobs":{found},'
            f'"finish_reason":null}}]}}\n\n'
        )

    def finish(self, index: int, reason: str, stats: RunStats) -> str:
        return (
            f'{self._head}{{"index":{index},"text":"","logprobs":null,"finish_reason":{_dumps(reason)}}}],'
            f'"edgeinfer":{_dumps(stats_object(stats))}}}\n\n'
        )

    def usage(self, stats: Sequence[RunStats], prompts: int) -> str:
        return f'{self._head}],"usage":{_dumps(usage_of(stats, prompts))}}}\n\n'

    def whole(
        self, choices: Sequence[dict[str, Any]], stats: Sequence[RunStats], prompts: int
    ) -> dict[str, Any]:
        reply = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            "usage": usage_of(stats, prompts),
        }
        return with_stats(reply, stats)


def with_stats(reply: dict[str, Any], stats: Sequence[RunStats]) -> dict[str, Any]:
    """One answer's stats as the object it is in `run --json`; of several, a list."""
    found = [stats_object(one) for one in stats]
    reply["edgeinfer"] = found[0] if len(found) == 1 else found
    return reply


def logprob_of(one: TokenLogprob) -> dict[str, Any]:
    return {
        "token": one.token,
        "logprob": _finite(one.logprob),
        "bytes": list(one.bytes),
        "top_logprobs": [
            {"token": text, "logprob": _finite(value), "bytes": list(text.encode("utf-8", "replace"))}
            for text, value in one.top
        ],
    }


def _finite(logprob: float) -> float:
    """OpenAI's figure for "never": JSON has no infinity."""
    return max(logprob, LEAST_LOGPROB) if math.isfinite(logprob) else LEAST_LOGPROB


def legacy_logprobs(found: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
    """/v1/completions' shape. offsets: of each token, the characters of text before it."""
    return {
        "tokens": [one.token for one in found],
        "token_logprobs": [_finite(one.logprob) for one in found],
        "top_logprobs": [{text: _finite(value) for text, value in one.top} for one in found],
        "text_offset": list(offsets),
    }


def model_object(name: str, created: int, context: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {"id": name, "object": "model", "created": created, "owned_by": "edgeinfer"}
    if context is not None:
        found["context_length"] = context
    return found
