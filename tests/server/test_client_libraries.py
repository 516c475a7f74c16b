"""The client libraries people use, unmodified, against an endpoint with the real starter model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.client import OpenOptions
from tests.server.endpoints import Endpoint, running

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
pytestmark = pytest.mark.model

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def endpoint(starter: Path) -> Iterator[Endpoint]:
    with running(OpenOptions(model=str(starter), sequences=2, context=2048, threads=1)) as found:
        yield found


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def model(client: Any) -> str:
    return str(next(iter(client.models.list())).id)


def test_openai_chats(client: Any) -> None:
    reply = client.chat.completions.create(model=model(client), messages=ASK, max_tokens=12)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens <= 12


def test_openai_streams(client: Any) -> None:
    stream = client.chat.completions.create(
        model=model(client),
        messages=ASK,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.completion_tokens <= 12


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_openai_forces_a_tool(client: Any, choice: Any, stream: bool) -> None:
    asked = {
        "model": model(client),
        "messages": ASK,
        "tools": [WEATHER],
        "tool_choice": choice,
        "max_tokens": 120,
        "parallel_tool_calls": False,
    }
    if stream:
        name, arguments, reason = "", "", ""
        for chunk in client.chat.completions.create(**asked, stream=True):
            reason = chunk.choices[0].finish_reason or reason
            for call in chunk.choices[0].delta.tool_calls or ():
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    else:
        reply = client.chat.completions.create(**asked)
        (call,) = reply.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        reason = reply.choices[0].finish_reason
    assert name == "get_weather"
    if reason != "length":
        assert reason == "tool_calls"
        assert isinstance(json.loads(arguments)["city"], str)


def test_openai_parses_structured_answers(client: Any) -> None:
    class Person(pydantic.BaseModel):  # type: ignore[name-defined,misc]
        name: str = pydantic.Field(max_length=30)
        age: int

    reply = client.chat.completions.parse(
        model=model(client), messages=ASK, response_format=Person, max_tokens=200
    )
    assert isinstance(reply.choices[0].message.parsed, Person)


def test_openai_has_log_probabilities(client: Any) -> None:
    reply = client.chat.completions.create(
        model=model(client), messages=ASK, max_tokens=5, logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(one.top_logprobs) == 2 for one in content)


def test_openai_embeds(client: Any) -> None:
    reply = client.embeddings.create(model=model(client), input=["a river", "a clock"])
    assert len(reply.data) == 2
    assert sum(x * x for x in reply.data[0].embedding) == pytest.approx(1.0, abs=1e-3)


def test_openai_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=ASK)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=model(client), messages=ASK, temperature=9)
    with pytest.raises(openai.BadRequestError) as found:
        long = [{"role": "user", "content": "word " * 4000}]
        client.chat.completions.create(model=model(client), messages=long)
    assert found.value.code == "context_length_exceeded"


def test_langchain_chats_and_calls_tools(endpoint: Endpoint, client: Any) -> None:
    langchain = pytest.importorskip("langchain_openai")
    llm = langchain.ChatOpenAI(
        base_url=f"{endpoint.url}/v1", api_key="none", model=model(client), max_tokens=120, temperature=0
    )
    assert llm.invoke("Say hello.").content
    assert "".join(str(chunk.content) for chunk in llm.stream("Say hello."))
    found = llm.bind_tools([WEATHER], tool_choice="get_weather").invoke("Weather in Paris?")
    assert (
        found.tool_calls[0]["name"] == "get_weather"
        or found.response_metadata["finish_reason"] == "length"
    )


def test_litellm_chats(endpoint: Endpoint, client: Any) -> None:
    litellm = pytest.importorskip("litellm")
    reply = litellm.completion(
        model=f"openai/{model(client)}",
        api_base=f"{endpoint.url}/v1",
        api_key="none",
        messages=ASK,
        max_tokens=12,
    )
    assert reply.choices[0].message.content
