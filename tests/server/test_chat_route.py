"""/v1/chat/completions over a real socket, with a script for a model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeinfer.server.service import ServiceSettings
from tests.server.endpoints import Endpoint, ask, scripted


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with scripted(tmp_path_factory.mktemp("endpoint")) as found:
        yield found


# "Hello there." in the scripted vocabulary, and the end of turn
NUM_TOKENS = 10


def beginning(endpoint: Endpoint, count: int) -> str:
    """The text of the answer's first tokens."""
    return "".join(token.text for token in endpoint.client.tokenize("Hello there.")[:count])


# -- whole replies ---------------------------------------------------------------------------------


def test_an_answer_has_openais_shape(endpoint: Endpoint) -> None:
    reply = endpoint.chat().json()
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == endpoint.service.name
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there.", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == NUM_TOKENS
    assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


def test_the_reply_carries_the_stats_of_run(endpoint: Endpoint) -> None:
    stats = endpoint.chat().json()["edgeinfer"]
    assert stats["finish_reason"] == "stop"
    assert set(stats) >= {
        "usage",
        "timings",
        "speculation",
        "kv",
        "cache",
        "backend",
        "model",
        "warnings",
    }
    assert stats["backend"] == "scripted"


def test_a_length_limit_ends_with_length(endpoint: Endpoint) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        (choice,) = endpoint.chat(**{name: 5}).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == beginning(endpoint, 5)


def test_max_completion_tokens_counts_before_max_tokens(endpoint: Endpoint) -> None:
    (choice,) = endpoint.chat(max_tokens=9, max_completion_tokens=5).json()["choices"]
    assert choice["message"]["content"] == beginning(endpoint, 5)


@pytest.mark.parametrize("stop", ["there", ["nowhere", "there"]])
def test_a_stop_string_ends_the_answer_and_is_left_out(endpoint: Endpoint, stop: object) -> None:
    (choice,) = endpoint.chat(stop=stop).json()["choices"]
    assert choice["message"]["content"] == "Hello "
    assert choice["finish_reason"] == "stop"


def test_several_choices_are_numbered(endpoint: Endpoint) -> None:
    reply = endpoint.chat(n=3, seed=7).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert len(reply["edgeinfer"]) == 3
    assert reply["usage"]["completion_tokens"] == 3 * (NUM_TOKENS)
    assert reply["usage"]["prompt_tokens"] == reply["edgeinfer"][0]["usage"]["prompt_tokens"]


def test_log_probabilities_cover_every_token(endpoint: Endpoint) -> None:
    (choice,) = endpoint.chat(logprobs=True, top_logprobs=3).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == "Hello there."  # without the end token
    assert all(len(one["top_logprobs"]) == 3 and one["logprob"] <= 0 for one in content)
    assert bytes(content[0]["bytes"]) == b"H"


def test_content_may_come_in_parts(endpoint: Endpoint) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    reply = endpoint.chat(messages=[{"role": "user", "content": parts}])
    assert reply.status_code == 200


def test_unknown_fields_are_ignored_and_named(endpoint: Endpoint) -> None:
    reply = endpoint.chat(wibble=1, messages=ask("hi"))
    assert any("wibble" in warning for warning in reply.json()["edgeinfer"]["warnings"])


# -- streams ---------------------------------------------------------------------------------------


def test_a_stream_has_openais_order(endpoint: Endpoint) -> None:
    chunks = endpoint.chunks()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == "Hello there."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["edgeinfer"]["finish_reason"] == "stop"


def test_usage_comes_only_when_it_is_asked_for(endpoint: Endpoint) -> None:
    chunks = endpoint.chunks(stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == NUM_TOKENS
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_streamed_choices_come_each_to_an_end(endpoint: Endpoint) -> None:
    chunks = endpoint.chunks(n=2)
    ends = [c["choices"][0] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(end["index"] for end in ends) == [0, 1]


def test_streamed_log_probabilities_are_those_of_the_whole_reply(endpoint: Endpoint) -> None:
    whole = endpoint.chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    chunks = endpoint.chunks(logprobs=True, top_logprobs=1)
    streamed = [
        one
        for chunk in chunks
        for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == whole


def test_progress_is_told_to_those_who_ask(endpoint: Endpoint) -> None:
    body = {"messages": ask("x" * 900), "stream": True}
    with endpoint.http() as http:
        plain = http.post("/v1/chat/completions", json=body).text
        asked = http.post("/v1/chat/completions", json=body, headers={"x-edgeinfer-progress": "1"}).text
    assert ": progress" not in plain
    told = [json.loads(line[11:]) for line in asked.splitlines() if line.startswith(": progress ")]
    assert {"cached", "of"} == set(told[0])
    assert told[-1]["tokens"] >= NUM_TOKENS - 1


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "role"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 200}}, "logit_bias"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),  # of another vocabulary
        ({"stop": ["x"] * 17}, "stop"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "text only",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "text only"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_what_is_wrong_is_named(endpoint: Endpoint, body: dict[str, object], words: str) -> None:
    for stream in (False, True):
        reply = endpoint.chat(**body, stream=stream)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"


def test_another_model_is_not_found(endpoint: Endpoint) -> None:
    reply = endpoint.chat(model="gpt-4o")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert endpoint.service.name in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(tmp_path: Path, stream: bool) -> None:
    with scripted(tmp_path, context=256) as endpoint:
        reply = endpoint.chat(messages=ask("x" * 1000), stream=stream)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("exceed_context_size_error", "context_length_exceeded")
    assert "256" in error["message"]


def test_what_is_no_json_is_refused(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b'{"messages": NaN}'):
            reply = http.post("/v1/chat/completions", content=content)
            assert reply.status_code == 400, content[:20]
            assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_body_without_a_content_type_is_read(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        content = json.dumps({"messages": ask("hi")}).encode()
        headers = {"content-type": "application/x-www-form-urlencoded"}
        assert http.post("/v1/chat/completions", content=content, headers=headers).status_code == 200


def test_half_a_surrogate_pair_is_no_server_error(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        for body in (
            b'{"messages":[{"role":"user","content":"\\ud800"}]}',
            b'{"messages":[{"role":"user","content":"a","name":"\\udfff"}]}',
            b'{"messages":[{"role":"user","content":"a"}],"wibble\\ud800":1}',
            b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"\\ud800":"\\ud800"}}',
            b'{"messages":[{"role":"user","content":"a"}],"model":"\\ud800"}',
        ):
            reply = http.post("/v1/chat/completions", content=body)
            assert reply.status_code < 500, (body, reply.text)
            json.loads(reply.text)


# -- under load ------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    slow = {"answers": {"*": "x" * 400}, "step_s": 0.02}
    settings = ServiceSettings(parallel=1, queue=1)
    with scripted(tmp_path, slow, sequences=1, settings=settings) as endpoint, endpoint.http() as http:
        body = {"messages": ask("hi"), "stream": True}
        with (
            http.stream("POST", "/v1/chat/completions", json=body),
            http.stream("POST", "/v1/chat/completions", json=body),
        ):
            refused = http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"


def test_an_answer_that_takes_too_long_is_ended_and_says_so(tmp_path: Path) -> None:
    slow = {"answers": {"*": "x" * 2000}, "step_s": 0.02}
    settings = ServiceSettings(parallel=1, timeout_s=0.3)
    with scripted(tmp_path, slow, sequences=1, settings=settings) as endpoint:
        whole = endpoint.chat()
        assert whole.status_code == 504
        assert whole.json()["error"]["code"] == "timeout"
        with endpoint.http() as http:
            streamed = http.post("/v1/chat/completions", json={"messages": ask("hi"), "stream": True})
        assert streamed.status_code == 200
        events = [event for event in streamed.text.split("\n\n") if event]
        assert json.loads(events[-1][6:])["error"]["code"] == "timeout"


def test_pings_come_while_a_prompt_waits(tmp_path: Path) -> None:
    slow = {"answers": {"*": "x" * 60}, "step_s": 0.02}
    settings = ServiceSettings(parallel=1, ping_s=0.05)
    with scripted(tmp_path, slow, sequences=1, settings=settings) as endpoint, endpoint.http() as http:
        body = {"messages": ask("hi"), "stream": True}
        first = threading.Thread(target=lambda: endpoint.chat())
        first.start()
        while not (status := endpoint.client.status()) or not status.running:
            time.sleep(0.01)
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            text = "".join(reply.iter_text())
        first.join()
    assert ": ping" in text
    assert text.rstrip().endswith("data: [DONE]")
