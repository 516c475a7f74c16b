"""What an endpoint does where a conversation is longer than its context."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.endpoints import Endpoint, ask, scripted


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    with scripted(tmp_path, {"answers": {"*": "Hello there. " * 20}}, context=128) as found:
        yield found


def test_an_answer_stops_and_a_long_prompt_is_refused(endpoint: Endpoint) -> None:
    reply = endpoint.chat().json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["edgeinfer"]["kv"]["evicted_tokens"] == 0
    refused = endpoint.chat(messages=ask("x" * 200))
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_old_tokens_leave_and_it_is_said_and_counted(endpoint: Endpoint) -> None:
    endpoint.service.overflow = "stream"
    reply = endpoint.chat(messages=ask("x" * 200), max_tokens=200).json()
    kv = reply["edgeinfer"]["kv"]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert kv["evicted_tokens"] == kv["newly_evicted"] > 90
    assert any("oldest tokens left" in warning for warning in reply["edgeinfer"]["warnings"])
    with endpoint.http() as http:
        page = http.get("/metrics").text
    assert f"edgeinfer_evicted_tokens_total {float(kv['newly_evicted'])}" in page


def test_a_full_context_is_an_error_where_that_is_wanted(endpoint: Endpoint) -> None:
    endpoint.service.overflow = "error"
    failed = endpoint.chat()
    assert failed.status_code == 400
    error = failed.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "filled the context of 128 tokens" in error["message"]
    with endpoint.http() as http:
        streamed = http.post("/v1/chat/completions", json={"messages": ask("hi"), "stream": True})
    assert "context_length_exceeded" in streamed.text
    assert "Hello there." in streamed.text


def test_completions_stream_too(endpoint: Endpoint) -> None:
    endpoint.service.overflow = "stream"
    with endpoint.http() as http:
        body = {"prompt": "x" * 300, "max_tokens": 4}
        reply = http.post("/v1/completions", json=body).json()
    assert reply["edgeinfer"]["kv"]["evicted_tokens"] > 150
