"""FastAPI behind the guard: what it makes of exceptions must not hide the guard's answers."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, StreamingResponse

from benchmarks.raw_http import PATIENCE_S, RawConnection
from edgeinfer.errors import EdgeInferError, PromptTooLong
from edgeinfer.server.errors import ApiError, as_api_error, internal_error
from edgeinfer.server.guard import Guard
from edgeinfer.server.serving import ServerThread, ServeSettings
from tests.server.sample_endpoint import GUARD, LIMITS

seen: queue.Queue[str] = queue.Queue()


class Body(BaseModel):
    text: str


async def echo(body: Body) -> dict[str, int]:
    if body.text == "too long":
        raise PromptTooLong(5000, 4096)
    return {"size": len(body.text)}


async def stream() -> StreamingResponse:
    async def ticks() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"tick\n"
                await asyncio.sleep(0.01)
        finally:
            seen.put("closed")

    return StreamingResponse(ticks())


async def fail() -> None:
    raise RuntimeError("the reason is for the log")


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Starlette answers exceptions below the guard: in its own words, unless it has these."""
    if isinstance(error, ApiError | EdgeInferError):
        answer = as_api_error(error)
    else:
        answer = internal_error(request.state.request_id)
    return JSONResponse(answer.body, answer.status, answer.headers)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[ServerThread]:
    app = FastAPI()
    for kind in (ApiError, EdgeInferError, Exception):
        app.add_exception_handler(kind, refuse)
    app.get("/fail")(fail)
    app.post("/echo")(echo)
    app.get("/stream")(stream)
    with ServerThread(Guard(app, GUARD), ServeSettings(limits=LIMITS)) as server:
        yield server


@pytest.fixture
def client(endpoint: ServerThread) -> Iterator[RawConnection]:
    with RawConnection(endpoint.address.host, endpoint.address.port) as it:
        yield it


def test_a_request_is_answered_and_an_error_of_ours_too(client: RawConnection) -> None:
    json_type = {"content_type": "application/json"}
    assert client.ask("/echo", b'{"text": "abc"}', **json_type).body == b'{"size":3}'
    assert client.ask("/echo", b'{"text": "too long"}', **json_type).code == "context_length_exceeded"
    assert client.ask("/echo", b'{"text": "ab"}', **json_type).body == b'{"size":2}'


def test_what_fails_inside_is_logged_once_under_the_id_that_is_told(
    client: RawConnection, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.ask("/fail")
    assert (answer.status, answer.code) == (500, "internal_error")
    request_id = answer.headers["x-request-id"]
    assert answer.error["message"].endswith(request_id)
    assert client.ask("/echo", b"").status == 422  # on the same connection
    (record,) = caplog.records
    assert request_id in record.getMessage()
    assert record.exc_info is not None


def test_a_body_too_large_is_a_413(client: RawConnection) -> None:
    client.send(client.head("/echo", method="POST", transfer_encoding="chunked"))
    client.send(b"%x\r\n%s\r\n" % (200_000, bytes(200_000)))
    assert client.answer().status == 413


def test_a_body_too_slow_is_a_408(client: RawConnection) -> None:
    client.send(client.head("/echo", method="POST", content_length="10") + b"{")
    assert client.answer().status == 408


def test_a_stream_is_closed_when_its_client_leaves(client: RawConnection) -> None:
    client.send_request("/stream")
    assert client.answer_head()[0] == 200
    assert next(client.chunks()) == b"tick\n"
    client.close()
    assert seen.get(timeout=PATIENCE_S) == "closed"
