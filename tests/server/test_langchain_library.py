"""langchain-openai, unmodified, against an endpoint with the real starter model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.server.endpoints import Endpoint
from tests.server.library_scenarios import KEY, TIME, WEATHER, Person

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore"),  # its own, of pydantic's classes
]


@pytest.fixture
def reach(starter_endpoint: Endpoint) -> dict[str, Any]:
    return {
        "base_url": f"{starter_endpoint.url}/v1",
        "api_key": KEY,
        "model": starter_endpoint.service.name,
        "max_retries": 0,
    }


@pytest.fixture
def llm(reach: dict[str, Any]) -> Any:
    return langchain.ChatOpenAI(**reach, max_tokens=120, temperature=0)


def test_it_chats(llm: Any) -> None:
    reply = llm.invoke("Say hello.")
    assert reply.content
    assert reply.usage_metadata["output_tokens"] > 0
    assert reply.response_metadata["finish_reason"] in ("stop", "length")


def test_it_streams(llm: Any) -> None:
    chunks = list(llm.stream("Say hello.", stream_usage=True))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == llm.invoke("Say hello.").content
    assert whole.usage_metadata["output_tokens"] > 0


async def test_it_answers_several_at_once(llm: Any) -> None:
    replies = await llm.abatch(["Say hello.", "Say goodbye.", "Say nothing."])
    assert all(reply.content for reply in replies)


def test_a_tool_can_be_forced_and_its_result_is_read(llm: Any) -> None:
    bound = llm.bind_tools([TIME, WEATHER], tool_choice="get_weather")
    called = bound.invoke("What is the weather in Paris?")
    (call,) = called.tool_calls
    assert call["name"] == "get_weather" and isinstance(call["args"]["city"], str)
    assert not called.invalid_tool_calls
    answer = llm.invoke(
        [
            HumanMessage("What is the weather in Paris?"),
            AIMessage("", tool_calls=[call]),
            ToolMessage('{"sky":"clear"}', tool_call_id=call["id"]),
        ]
    )
    assert answer.content


def test_the_call_of_a_forced_tool_streams(llm: Any) -> None:
    whole = None
    for chunk in llm.bind_tools([WEATHER], tool_choice="required").stream("Weather in Paris?"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.tool_calls[0]["name"] == "get_weather"
    assert isinstance(whole.tool_calls[0]["args"]["city"], str)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_answers_are_structured(llm: Any, method: str) -> None:
    found = llm.with_structured_output(Person, method=method).invoke("Describe Ada, 36.")
    assert isinstance(found, Person)


def test_there_are_log_probabilities(llm: Any) -> None:
    reply = llm.bind(logprobs=True, top_logprobs=2).invoke("Say hello.")
    content = reply.response_metadata["logprobs"]["content"]
    assert content and all(len(one["top_logprobs"]) == 2 for one in content)


def test_texts_are_embedded(reach: dict[str, Any]) -> None:
    embeddings = langchain.OpenAIEmbeddings(**reach, check_embedding_ctx_length=False)
    vectors = embeddings.embed_documents(["a river", "a clock"])
    assert len(vectors) == 2
    assert sum(x * x for x in vectors[0]) == pytest.approx(1.0, abs=1e-3)
    assert embeddings.embed_query("a river") == pytest.approx(vectors[0], abs=1e-3)


def test_errors_are_openais(llm: Any, reach: dict[str, Any]) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as long:
        llm.invoke("word " * 4000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        langchain.ChatOpenAI(**{**reach, "api_key": "wrong"}).invoke("Say hello.")
    with pytest.raises(openai.NotFoundError):
        langchain.ChatOpenAI(**{**reach, "model": "gpt-4o"}).invoke("Say hello.")
