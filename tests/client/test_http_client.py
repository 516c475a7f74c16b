"""HttpClient against a real endpoint: what a LocalClient tells, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeinfer.client import Message, Prefilled, Request, Started, Text
from edgeinfer.client.http import HttpClient
from edgeinfer.errors import (
    EndpointFailed,
    EndpointUnreachable,
    ModelNotFound,
    RequestFailed,
    UsageError,
)
from edgeinfer.sampling import SamplingParams
from edgeinfer.server.api_keys import ApiKeys
from edgeinfer.server.guard import GuardSettings
from tests.server.endpoints import Endpoint, scripted

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with scripted(tmp_path_factory.mktemp("endpoint")) as found:
        yield found


def asked(text: str, **options: object) -> Request:
    return Request(messages=(Message("user", text),), sampling=GREEDY, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_an_answer_is_the_one_a_local_client_gives(endpoint: Endpoint, path: str) -> None:
    with HttpClient(endpoint.url + path) as client:
        assert client.load().name == endpoint.service.name
        ended = client.start(asked("hi")).result()
    local = endpoint.client.start(asked("hi")).result()
    assert ended.stats.text == local.stats.text == "Hello there."
    assert ended.stats.finish_reason == "stop"
    assert ended.stats.usage.completion_tokens == local.stats.usage.completion_tokens
    assert ended.stats.backend == "scripted"
    assert ended.stats.context == local.stats.context


def test_events_tell_the_prompts_progress_and_the_tokens(endpoint: Endpoint) -> None:
    with HttpClient(endpoint.url) as client:
        events = list(client.start(asked("y" * 3000, max_tokens=8)).events())
    kinds = [type(event) for event in events]
    assert kinds.index(Started) < kinds.index(Prefilled) < kinds.index(Text)
    texts = [event for event in events if isinstance(event, Text)]
    assert texts[-1].num_tokens == 8


def test_a_plain_prompt_and_tokens_are_answered(endpoint: Endpoint) -> None:
    with HttpClient(endpoint.url) as client:
        request = Request(prompt="hi", max_tokens=4, sampling=GREEDY)
        local = endpoint.client.start(request).result().stats.text
        assert client.start(request).result().stats.text == local
        tokens = tuple(token.id for token in client.tokenize("hi", add_special=True))
        same = Request(tokens=tokens, max_tokens=4, sampling=GREEDY)
        assert client.start(same).result().stats.text == local
        assert client.count_tokens(asked("hi")) == endpoint.client.count_tokens(asked("hi"))
        assert client.detokenize(tokens[1:]) == "hi"


def test_cancelling_ends_the_answer_on_both_sides(tmp_path: Path) -> None:
    slow = {"answers": {"*": "x" * 3000}, "step_s": 0.01}
    with scripted(tmp_path, slow) as endpoint, HttpClient(endpoint.url) as client:
        generation = client.start(asked("hi"))
        events = generation.events()
        next(event for event in events if isinstance(event, Text))
        generation.cancel()
        ended = list(events)[-1]
        assert ended.outcome == "cancelled"  # type: ignore[union-attr]
        end = time.monotonic() + 20
        while endpoint.service.num_open and time.monotonic() < end:
            time.sleep(0.01)
        assert endpoint.service.num_open == 0


def test_a_refusal_is_an_error_with_its_reason(endpoint: Endpoint) -> None:
    with HttpClient(endpoint.url) as client, pytest.raises(RequestFailed, match="tokens"):
        client.start(asked("x" * 9000)).result()


def test_nobody_there_is_said(endpoint: Endpoint) -> None:
    with HttpClient("http://127.0.0.1:9") as client:
        with pytest.raises(EndpointUnreachable, match="edgeinfer serve"):
            client.load()
        with pytest.raises(EndpointUnreachable):
            client.start(asked("hi")).result()


def test_another_model_is_not_found(endpoint: Endpoint) -> None:
    with HttpClient(endpoint.url, model="other") as client, pytest.raises(ModelNotFound, match="other"):
        client.load()


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a:b", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--attach"):
        HttpClient(url)


def test_a_key_opens_and_its_lack_is_said(tmp_path: Path) -> None:
    guard = GuardSettings(keys=ApiKeys(["secret"]))
    with scripted(tmp_path, guard=guard) as endpoint:
        with HttpClient(endpoint.url, api_key="secret") as client:
            assert client.start(asked("hi")).text() == "Hello there."
        with HttpClient(endpoint.url) as client, pytest.raises(EndpointFailed, match="--api-key"):
            client.load()


def test_a_closed_client_ends_what_runs(tmp_path: Path) -> None:
    slow = {"answers": {"*": "x" * 3000}, "step_s": 0.01}
    with scripted(tmp_path, slow) as endpoint:
        client = HttpClient(endpoint.url)
        generation = client.start(asked("hi"))
        events = generation.events()
        next(event for event in events if isinstance(event, Text))
        client.close()
        assert list(events)[-1].outcome == "cancelled"  # type: ignore[union-attr]
        assert client.start(asked("hi")).events().__next__().outcome == "failed"  # type: ignore[union-attr]
