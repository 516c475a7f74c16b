"""OpenAI's own client library, unmodified, against an endpoint with the real starter model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.server.service import ServiceSettings
from tests.server.endpoints import Endpoint, scripted
from tests.server.library_scenarios import ASK, CALLED, KEY, TIME, WEATHER, Person, check_weather

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def client(starter_endpoint: Endpoint) -> Iterator[Any]:
    url = f"{starter_endpoint.url}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture
def model(starter_endpoint: Endpoint) -> str:
    return starter_endpoint.service.name


def test_models_are_listed(client: Any, model: str) -> None:
    assert [found.id for found in client.models.list()] == [model]
    assert client.models.retrieve(model).object == "model"


def test_it_chats(client: Any, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=ASK, max_completion_tokens=12)
    assert reply.object == "chat.completion" and reply.model == model
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    again = client.chat.completions.create(model=model, messages=ASK, max_completion_tokens=12)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert again.choices[0].message.content == reply.choices[0].message.content


def test_it_makes_several_choices(client: Any, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=ASK, max_tokens=8, n=3, temperature=1.5, seed=7
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) > 1


def test_it_streams(client: Any, model: str) -> None:
    asked = {"model": model, "messages": ASK, "max_tokens": 12, "temperature": 0}
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == client.chat.completions.create(**asked).choices[0].message.content
    without = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


async def test_it_streams_to_many_at_once(starter_endpoint: Endpoint, model: str) -> None:
    import asyncio

    url = f"{starter_endpoint.url}/v1"

    async def one(client: Any, number: int) -> str:
        text = ""
        messages = [{"role": "user", "content": f"Count from {number}."}]
        stream = await client.chat.completions.create(
            model=model, messages=messages, max_tokens=6, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text

    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        texts = await asyncio.gather(*(one(client, number) for number in range(5)))
    assert all(texts)


def test_a_stream_that_is_left_ends_its_request(
    client: Any, model: str, starter_endpoint: Endpoint
) -> None:
    stream = client.chat.completions.create(model=model, messages=ASK, max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(200):
        if starter_endpoint.service.num_open == 0:
            break
        import time

        time.sleep(0.02)
    assert starter_endpoint.service.num_open == 0


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_tool_can_be_forced(client: Any, model: str, choice: Any) -> None:
    tools = [WEATHER] if choice == "required" else [TIME, WEATHER]
    reply = client.chat.completions.create(
        model=model,
        messages=ASK,
        tools=tools,
        tool_choice=choice,
        max_tokens=120,
        parallel_tool_calls=False,
    )
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls
    assert call.type == "function" and call.id
    check_weather(call.function.name, call.function.arguments)
    assert reply.choices[0].message.content is None


def test_the_call_of_a_forced_tool_streams(client: Any, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=ASK,
        tools=[TIME, WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=120,
        stream=True,
    )
    calls: dict[int, list[str]] = {}
    reason, pieces = "", 0
    for chunk in stream:
        reason = chunk.choices[0].finish_reason or reason
        for call in chunk.choices[0].delta.tool_calls or ():
            if call.id:
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments or ""
            pieces += bool(call.function.arguments)
    assert reason == "tool_calls"
    check_weather(*calls[0])
    assert pieces > 1, "the arguments came in one piece"


def test_the_librarys_own_reader_of_streams_takes_calls(client: Any, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=ASK, tools=[_strict(WEATHER)], tool_choice="required", max_tokens=120
    ) as stream:
        reply = stream.get_final_completion()
    (call, *_) = reply.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments["city"], str)


def test_tools_may_be_left_and_their_results_are_read(client: Any, model: str) -> None:
    for choice in ("none", "auto"):
        reply = client.chat.completions.create(
            model=model, messages=CALLED, tools=[WEATHER], tool_choice=choice, max_tokens=16
        )
        message = reply.choices[0].message
        assert message.content or message.tool_calls
        assert choice != "none" or not message.tool_calls


def test_structured_answers_are_parsed(client: Any, model: str) -> None:
    reply = client.chat.completions.parse(
        model=model, messages=ASK, response_format=Person, max_tokens=200
    )
    assert isinstance(reply.choices[0].message.parsed, Person)
    with client.chat.completions.stream(
        model=model, messages=ASK, response_format=Person, max_tokens=200
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)


def test_answers_can_be_json(client: Any, model: str) -> None:
    import json

    reply = client.chat.completions.create(
        model=model, messages=ASK, response_format={"type": "json_object"}, max_tokens=100
    )
    assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_there_are_log_probabilities(client: Any, model: str) -> None:
    asked = {"model": model, "messages": ASK, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in content)
    assert all(bytes(one.bytes).decode("utf-8", "replace") == one.token for one in content)
    streamed = [
        one
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in streamed] == [one.token for one in content]


def test_tokens_can_be_forbidden_and_texts_stop(client: Any, model: str) -> None:
    asked = {"model": model, "messages": ASK, "max_tokens": 10, "temperature": 0, "logprobs": True}
    first = client.chat.completions.create(**asked).choices[0]
    ids = client.post("/tokenize", body={"text": first.logprobs.content[0].token}, cast_to=object)
    bias = {str(ids["tokens"][0]): -100}
    other = client.chat.completions.create(**asked, logit_bias=bias).choices[0]
    assert other.logprobs.content[0].token != first.logprobs.content[0].token
    word = first.message.content.split()[2]
    stopped = client.chat.completions.create(**asked, stop=[word]).choices[0]
    assert word not in stopped.message.content and stopped.finish_reason == "stop"


def test_prompts_are_completed(client: Any, model: str) -> None:
    asked = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    reply = client.completions.create(**asked, logprobs=2)
    assert reply.choices[0].text and reply.choices[0].finish_reason == "length"
    assert len(reply.choices[0].logprobs.tokens) == 8
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert text == reply.choices[0].text
    echo = client.completions.create(**asked, echo=True)
    assert echo.choices[0].text == "Once upon a time" + reply.choices[0].text
    several = client.completions.create(model=model, prompt=["One", "Two"], max_tokens=2)
    assert [choice.index for choice in several.choices] == [0, 1]


def test_texts_are_embedded(client: Any, model: str) -> None:
    reply = client.embeddings.create(model=model, input=["a river", "a stream", "a tax form"])
    vectors = [found.embedding for found in reply.data]
    assert [found.index for found in reply.data] == [0, 1, 2]
    assert all(sum(x * x for x in vector) == pytest.approx(1.0, abs=1e-3) for vector in vectors)
    river, stream, form = vectors
    assert _dot(river, stream) > _dot(river, form)
    plain = client.embeddings.create(model=model, input="a river", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(river, abs=1e-3)
    assert plain.usage.prompt_tokens > 0


def test_errors_are_the_librarys_own(client: Any, model: str, starter_endpoint: Endpoint) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-4o", messages=ASK)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        create(model=model, messages=ASK, temperature=9)
    assert wrong.value.param == "temperature"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            create(model=model, messages=[{"role": "user", "content": "word " * 4000}], stream=stream)
        assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="image"):
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
        create(model=model, messages=[{"role": "user", "content": [part]}])
    with pytest.raises(openai.BadRequestError, match="'not'"):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
        create(model=model, messages=ASK, response_format=form)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_full_queue_is_a_rate_limit(tmp_path: Path) -> None:
    script = {"answers": {"*": "word " * 300}, "step_s": 0.01}
    settings = ServiceSettings(parallel=1, queue=0)
    with scripted(tmp_path, script, sequences=1, settings=settings) as endpoint:
        url = f"{endpoint.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            ask = {"model": endpoint.service.name, "messages": ASK}
            stream = client.chat.completions.create(**ask, stream=True)
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(**ask)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            stream.close()


def _strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {**tool["function"], "strict": True}}


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
