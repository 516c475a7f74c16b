"""litellm, unmodified, against an endpoint with the real starter model."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import pytest

from tests.server.endpoints import Endpoint
from tests.server.library_scenarios import ASK, CALLED, KEY, TIME, WEATHER, Person, check_weather

# It would fetch a list of prices; there is no network but this machine's own.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    litellm = pytest.importorskip("litellm")

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore"),  # its own, of pydantic's classes and of its sockets
]


@pytest.fixture
def call(starter_endpoint: Endpoint) -> dict[str, Any]:
    return {
        "model": f"openai/{starter_endpoint.service.name}",
        "api_base": f"{starter_endpoint.url}/v1",
        "api_key": KEY,
        "max_retries": 0,
    }


def test_it_chats(call: dict[str, Any]) -> None:
    reply = litellm.completion(**call, messages=ASK, max_tokens=12)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens == 12
    assert reply.choices[0].finish_reason == "length"


def test_it_streams(call: dict[str, Any]) -> None:
    chunks = list(
        litellm.completion(
            **call, messages=ASK, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert any(getattr(chunk, "usage", None) for chunk in chunks)


async def test_it_streams_in_an_event_loop(call: dict[str, Any]) -> None:
    text = ""
    async for chunk in await litellm.acompletion(**call, messages=ASK, max_tokens=8, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_can_be_forced(call: dict[str, Any], stream: bool) -> None:
    reply = litellm.completion(
        **call,
        messages=ASK,
        tools=[TIME, WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=120,
        stream=stream,
    )
    if stream:
        reply = litellm.stream_chunk_builder(list(reply))
    assert reply.choices[0].finish_reason == "tool_calls"
    found = reply.choices[0].message.tool_calls[0]
    check_weather(found.function.name, found.function.arguments)


def test_results_of_tools_are_read(call: dict[str, Any]) -> None:
    reply = litellm.completion(
        **call, messages=CALLED, tools=[WEATHER], tool_choice="none", max_tokens=12
    )
    assert reply.choices[0].message.content


def test_answers_are_structured(call: dict[str, Any]) -> None:
    reply = litellm.completion(**call, messages=ASK, response_format=Person, max_tokens=200)
    Person.model_validate_json(reply.choices[0].message.content)
    reply = litellm.completion(
        **call, messages=ASK, response_format={"type": "json_object"}, max_tokens=100
    )
    assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_there_are_log_probabilities(call: dict[str, Any]) -> None:
    reply = litellm.completion(**call, messages=ASK, max_tokens=4, logprobs=True, top_logprobs=2)
    content = reply.choices[0].logprobs.content
    assert len(content) == 4 and all(len(one.top_logprobs) == 2 for one in content)


def test_texts_are_embedded(call: dict[str, Any]) -> None:
    reply = litellm.embedding(**call, input=["a river", "a clock"], encoding_format="float")
    assert len(reply.data) == 2
    assert sum(x * x for x in reply.data[0]["embedding"]) == pytest.approx(1.0, abs=1e-3)


def test_prompts_are_completed(call: dict[str, Any]) -> None:
    model = call.pop("model").replace("openai/", "text-completion-openai/")
    reply = litellm.text_completion(**call, model=model, prompt="Once upon a time", max_tokens=6)
    assert reply.choices[0].text


def test_errors_are_the_librarys_own(call: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**call, messages=[{"role": "user", "content": "word " * 4000}])
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**call, messages=ASK, temperature=9)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**call, "api_key": "wrong"}, messages=ASK)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**call, "model": "openai/gpt-4o"}, messages=ASK)
