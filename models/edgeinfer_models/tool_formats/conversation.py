"""A conversation with tool calls as chat templates expect it, in Hugging Face's convention."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = dict[str, Any]


def normalised(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages with tool calls as templates read them; new dictionaries, the given ones stay.

    - arguments are objects (OpenAI sends them as a string; a text that is no object is kept, under the
      key `invalid_arguments`, so that the model sees what it wrote);
    - a message of role `tool` has the `name` of the call it answers;
    - content is text, "" where there was none.
    """
    names: dict[str, str] = {}
    result: list[Message] = []
    for message in messages:
        role = str(message.get("role") or "")
        copy = {**message, "role": role, "content": text_of(message.get("content"))}
        calls = message.get("tool_calls")
        if isinstance(calls, Sequence) and calls:
            copy["tool_calls"] = [_call(call) for call in calls]
            for call in copy["tool_calls"]:
                names[call["id"]] = call["function"]["name"]
        else:
            copy.pop("tool_calls", None)
        if role == "tool" and not message.get("name"):
            copy["name"] = names.get(str(message.get("tool_call_id") or ""), "")
        result.append(copy)
    return result


def text_of(content: Any) -> str:
    """Content as one text: OpenAI also sends None, or parts, of which those of text are taken."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


def with_ids(messages: Sequence[Message], new_id: Callable[[str], str]) -> list[Message]:
    """The same with every call's id, and every reference to it, mapped by `new_id`."""
    result: list[Message] = []
    for message in messages:
        copy = dict(message)
        if "tool_calls" in copy:
            copy["tool_calls"] = [{**call, "id": new_id(call["id"])} for call in copy["tool_calls"]]
        if copy.get("tool_call_id"):
            copy["tool_call_id"] = new_id(str(copy["tool_call_id"]))
        result.append(copy)
    return result


def one_call_each(messages: Sequence[Message]) -> list[Message]:
    """For templates that take one call a message: several become several turns, each with its result."""
    result: list[Message] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            result.append(message)
            continue
        end = at
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        answers, at = list(messages[at:end]), end
        for call in calls:
            is_first = call is calls[0]
            result.append(
                {**message, "content": message["content"] if is_first else "", "tool_calls": [call]}
            )
            result += [each for each in answers if each.get("tool_call_id") == call["id"]]
        ids = {call["id"] for call in calls}
        result += [each for each in answers if each.get("tool_call_id") not in ids]
    return result


def _call(call: Any) -> dict[str, Any]:
    call = call if isinstance(call, Mapping) else {}
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    arguments = _arguments(function.get("arguments"))
    name = str(function.get("name") or "")
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    try:
        read = json.loads(value)
        json.dumps(read, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        read = None
    return read if isinstance(read, dict) else {"invalid_arguments": str(value)}
