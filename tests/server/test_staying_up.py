"""Readers that go away, a worker that dies, a model that rests, an endpoint that closes."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.server.service import ServiceSettings
from tests.server.endpoints import Endpoint, ask, scripted

SLOW = {"answers": {"*": "x" * 3000}, "step_s": 0.01}


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def running(endpoint: Endpoint) -> int:
    status = endpoint.client.status()
    assert status is not None
    return status.running + status.waiting


def raw_request(endpoint: Endpoint, route: str, body: dict[str, object]) -> socket.socket:
    content = json.dumps(body).encode()
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", {"messages": ask("hi"), "stream": True}),
        ("/v1/chat/completions", {"messages": ask("hi")}),
        ("/v1/chat/completions", {"messages": ask("hi"), "n": 2, "stream": True}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 2000, "stream": True}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 2000}),
        ("/v1/embeddings", {"input": "x" * 3000}),
    ],
)
def test_a_reader_that_goes_away_ends_its_request(
    tmp_path: Path, route: str, body: dict[str, object]
) -> None:
    with scripted(tmp_path, SLOW) as endpoint:
        connection = raw_request(endpoint, route, body)
        until(lambda: running(endpoint) >= 1)
        connection.close()
        until(lambda: running(endpoint) == 0)
        until(lambda: endpoint.service.num_open == 0)
        page = endpoint.service.metrics.page(None).decode()
        assert 'outcome="cancelled"' in page


def test_a_dead_worker_is_an_error_and_the_next_request_is_answered(tmp_path: Path) -> None:
    with scripted(tmp_path, SLOW) as endpoint, endpoint.http() as http:
        body = {"messages": ask("hi"), "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(line for line in lines if "xx" in line)
            pid = endpoint.client.worker_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            rest = [line for line in lines if line]
        error = json.loads(rest[-1][6:])["error"]
        assert error["code"] == "worker_died"
        assert "SIGKILL" in error["message"]
        again = endpoint.chat(max_tokens=3)
        assert again.status_code == 200
        assert again.json()["choices"][0]["message"]["content"] == "xxx"
        assert endpoint.service.num_open == 0


def test_a_worker_that_hangs_is_ended_and_the_next_request_is_answered(tmp_path: Path) -> None:
    settings = ServiceSettings(parallel=2, timeout_s=0.5, hang_s=0.5)
    with scripted(tmp_path, SLOW, settings=settings) as endpoint, endpoint.http() as http:
        pid = endpoint.client.worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        reply = http.post("/v1/chat/completions", json={"messages": ask("hi"), "max_tokens": 3})
        assert reply.status_code == 503
        assert "had not answered" in reply.json()["error"]["message"]
        until(lambda: endpoint.client.worker_pid not in (pid, None))
        until(lambda: endpoint.chat(max_tokens=1).status_code == 200)
        assert endpoint.service.num_open == 0


def test_an_idle_model_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    settings = ServiceSettings(parallel=2, idle_unload_s=1.0)
    with scripted(tmp_path, settings=settings) as endpoint, endpoint.http() as http:
        assert http.get("/health").json()["loaded"]
        until(lambda: not http.get("/health").json()["loaded"])
        assert "edgeinfer_model_loaded 0.0" in http.get("/metrics").text
        assert endpoint.chat().json()["choices"][0]["message"]["content"] == "Hello there."


def test_closing_ends_streams_with_a_reason(tmp_path: Path) -> None:
    with scripted(tmp_path, SLOW) as endpoint:
        connection = raw_request(
            endpoint, "/v1/chat/completions", {"messages": ask("hi"), "stream": True}
        )
        until(lambda: running(endpoint) == 1)
        endpoint.client.close()
        connection.settimeout(20)
        data = b""
        while part := connection.recv(65536):
            data += part
            if b'"error"' in data:
                break
        connection.close()
    assert b'"code":"closing"' in data


@pytest.mark.slow
def test_large_prompts_beside_busy_streams_hold_up_nobody(tmp_path: Path) -> None:
    """What is more than a pipe holds goes both ways at once, while a text is being tokenized."""
    large, text = "y" * 80_000, "z" * 800_000
    talkative = {"messages": ask("hi"), "max_tokens": 1000, "logprobs": True, "top_logprobs": 20}
    asked: list[tuple[str, dict[str, Any]]] = [("/v1/chat/completions", talkative)] * 3
    asked += [("/v1/tokenize", {"text": text})] * 2
    asked += [("/v1/completions", {"prompt": large, "max_tokens": 1})] * 2
    script = {"answers": {"*": "x" * 3000}}
    with (
        scripted(tmp_path, script, sequences=6, context=100_000) as endpoint,
        ThreadPoolExecutor(len(asked)) as asking,
        endpoint.http() as http,
    ):
        replies = [asking.submit(http.post, route, json=body) for route, body in asked]
        for reply in replies:
            assert reply.result(timeout=60).status_code == 200
            assert http.get("/health").status_code == 200
        until(lambda: endpoint.service.num_open == 0)


def test_who_goes_away_while_a_large_prompt_is_read_is_heard(tmp_path: Path) -> None:
    with scripted(tmp_path, SLOW, context=100_000) as endpoint, endpoint.http() as http:
        running_one = raw_request(endpoint, "/v1/chat/completions", {"messages": ask("hi")})
        until(lambda: running(endpoint) == 1)
        waiting = [
            raw_request(endpoint, "/v1/completions", {"prompt": "y" * 80_000, "max_tokens": 1})
            for _ in range(2)
        ]
        for connection in (running_one, *waiting):
            connection.close()
        until(lambda: endpoint.service.num_open == 0)
        assert 'edgeinfer_requests_total{outcome="cancelled"' in http.get("/metrics").text


def test_tokenizing_keeps_a_model_from_resting(tmp_path: Path) -> None:
    settings = ServiceSettings(parallel=2, idle_unload_s=1.0)
    with scripted(tmp_path, settings=settings) as endpoint, endpoint.http() as http:
        until(lambda: not endpoint.client.info)
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert http.post("/v1/tokenize", json={"text": "hello"}).status_code == 200
            assert endpoint.client.info is not None
        until(lambda: not endpoint.client.info)


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(tmp_path: Path) -> None:
    with scripted(tmp_path, context=512) as endpoint, endpoint.http() as http:
        reply = http.post("/v1/completions", json={"prompt": "y" * 1_000_000})
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert "at least" in reply.json()["error"]["message"]
