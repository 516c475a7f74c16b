"""HttpClient against an endpoint that is not ours: what it is asked, and what is made of its answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from edgeinfer.client import Message, Request
from edgeinfer.client.http import MOST_LINE, HttpClient, _lines
from edgeinfer.errors import EndpointFailed, UsageError
from edgeinfer.sampling import SamplingParams

BREAKS = "one\x0btwo\x0c\x1c\x1d\x1e\x85three\u2028four\u2029end"


def chunk(**delta: str) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


class Other:
    """`reply` is sent as it is; `bodies` are those it was asked with."""

    def __init__(self) -> None:
        self.owner = "somebody"
        self.reply = chunk(content="Hello.") + END
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.silent_s = 0.0
        self.asked = threading.Event()
        self.url = ""

    def ask(self, **request: Any) -> dict[str, Any]:
        """The body that a request becomes."""
        with HttpClient(self.url) as client:
            client.start(Request(**request)).result()
        return self.bodies[-1][1]


@pytest.fixture
def other() -> Iterator[Other]:
    found = Other()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(json.dumps({"data": [{"id": "theirs", "owned_by": found.owner}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            found.bodies.append((self.path, body))
            found.asked.set()
            time.sleep(found.silent_s)
            self._send(found.reply)

        def _send(self, content: bytes) -> None:
            try:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # it was cancelled
                pass

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        found.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


HI = (Message("user", "hi"),)


def answer_of(other: Other) -> str:
    with HttpClient(other.url) as client:
        return client.start(Request(messages=HI)).text()


# -- what is asked ---------------------------------------------------------------------------------


def test_it_is_asked_in_openais_words_alone(other: Other) -> None:
    body = other.ask(messages=HI)
    assert set(body) == {"model", "messages", "stream", "stream_options", "temperature", "top_p"}
    assert other.bodies[-1][0] == "/v1/chat/completions"


def test_what_differs_from_the_defaults_is_sent(other: Other) -> None:
    sampling = SamplingParams(
        top_k=7, min_p=0.2, presence_penalty=0.5, seed=3, logit_bias=((5, -100.0),)
    )
    body = other.ask(messages=HI, sampling=sampling, max_tokens=9, template_options={"x": 1})
    assert (body["top_k"], body["min_p"], body["presence_penalty"], body["seed"]) == (7, 0.2, 0.5, 3)
    assert body["logit_bias"] == {"5": -100.0}
    assert body["max_tokens"] == 9
    assert body["chat_template_kwargs"] == {"x": 1}
    assert not body.keys() & {"typical_p", "repeat_penalty", "dry_multiplier", "frequency_penalty"}


def test_a_plain_prompt_has_no_limit_that_only_ours_would_understand(other: Other) -> None:
    assert "max_tokens" not in other.ask(prompt="a")
    other.owner = "edgeinfer"
    assert other.ask(prompt="a")["max_tokens"] == -1
    assert "max_tokens" not in other.ask(messages=HI)  # its `--max-tokens` counts


def test_ours_is_told_all_of_the_sampling(other: Other) -> None:
    other.owner = "edgeinfer"
    body = other.ask(messages=HI)
    default = SamplingParams()
    for name in ("top_k", "min_p", "typical_p", "repeat_penalty", "dry_multiplier"):
        assert body[name] == getattr(default, name)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"embedding": True}, "embedding"),
        ({"logprobs": 0}, "logprobs"),
        ({"tools": ({"type": "function"},)}, "tools"),
        ({"sampling": SamplingParams(dry_base=2.0)}, "dry_base"),
    ],
)
def test_what_cannot_be_asked_is_an_error_and_not_left_out(
    other: Other, more: dict[str, Any], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        other.ask(messages=HI, **more)
    assert other.bodies == []


# -- what is answered ------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_only_a_line_feed_ends_a_line(other: Other, end: bytes) -> None:
    other.reply = (chunk(content=BREAKS) + END).replace(b"\n", end)
    assert answer_of(other) == BREAKS


def test_lines_are_put_together_from_parts() -> None:
    text = "data: a\u2028é\r\n\r\ndata: b\n: c".encode()
    parts = [text[i : i + 1] for i in range(len(text))]
    assert list(_lines(parts)) == list(_lines([text])) == ["data: a\u2028é", "", "data: b", ": c"]


def test_a_line_without_an_end_is_refused() -> None:
    with pytest.raises(EndpointFailed, match="too long"):
        list(_lines(b"x" * 2**20 for _ in range(MOST_LINE // 2**20 + 1)))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_is_shown_as_a_model_writes_it(other: Other, name: str) -> None:
    thought = chunk(**{name: "Let me"}) + chunk(**{name: " see."})
    other.reply = thought + chunk(content="Four") + chunk(content=".") + END
    assert answer_of(other) == "<think>\nLet me see.\n</think>\n\nFour."
    other.reply = thought + END
    assert answer_of(other) == "<think>\nLet me see."


@pytest.mark.parametrize("is_loaded", [True, False])
def test_cancelling_before_the_answer_begins_ends_it_at_once(other: Other, is_loaded: bool) -> None:
    other.silent_s = 30.0
    with HttpClient(other.url) as client:
        if is_loaded:
            client.load()
        generation = client.start(Request(messages=HI))
        assert other.asked.wait(20)
        ended = []
        reader = threading.Thread(target=lambda: ended.append(generation.result()), daemon=True)
        reader.start()
        generation.cancel()
        reader.join(20)
        assert [one.outcome for one in ended] == ["cancelled"]
