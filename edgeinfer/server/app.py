"""The endpoint's routes. What surrounds them (hosts, origins, keys, limits) is in guard.py."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from edgeinfer import __version__
from edgeinfer.client import PROGRESS_HEADER, Request
from edgeinfer.errors import EdgeInferError, RequestFailed, one_line
from edgeinfer.server import metrics, reading
from edgeinfer.server.answers import Answers
from edgeinfer.server.chat import ChatJob
from edgeinfer.server.completions import CompletionJob
from edgeinfer.server.disconnect import unless_gone
from edgeinfer.server.documentation import describe_errors_and_keys
from edgeinfer.server.embeddings import EmbeddingJob
from edgeinfer.server.errors import ApiError, ErrorType, as_api_error, internal_error, invalid
from edgeinfer.server.openai_replies import model_object
from edgeinfer.server.openai_requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    message_of,
)
from edgeinfer.server.service import Service
from edgeinfer.server.sse import EventStream

log = logging.getLogger("edgeinfer.server")

ROOM_CHECK_S = 0.1
MOST_TOKENIZED = 1 << 20  # characters


def create_app(service: Service, on_close: Callable[[], None] = lambda: None) -> FastAPI:
    """on_close: called when the server has stopped taking requests, before it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(task) for task in (service.rest_when_idle(), service.end_what_hangs())
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await asyncio.to_thread(on_close)

    app = FastAPIOffline(title="edgeinfer", version=__version__, lifespan=lifespan, redoc_url=None)
    app.add_middleware(JsonBodies)
    _add_error_replies(app)
    _add_openai(app, service)
    _add_tokens(app, service)
    _add_status(app, service)
    describe_errors_and_keys(app)
    return app


class JsonBodies:
    """Every body is read as JSON, whatever its sender calls it: `curl -d` says that it sends a form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        await self._app(scope, receive, send)


# -- OpenAI ----------------------------------------------------------------------------------------


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", tags=["OpenAI"], response_model=None)
    async def chat_completions(http: HttpRequest, body: ChatRequest) -> Response:
        """An answer to a conversation, whole or as server-sent events."""
        service.check_model(body.model)
        who = asked_by(http, body.user)
        if body.tools:  # whose schemas may take the better part of a second to check
            job = await run_in_threadpool(ChatJob, service, body, who)
        else:
            job = ChatJob(service, body, who)
        answers = service.start("chat", job.requests)
        return await _reply(http, service, answers, job, bool(body.stream))

    @app.post("/v1/completions", tags=["OpenAI"], response_model=None)
    async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
        """Text that goes on from a prompt, without a chat template."""
        service.check_model(body.model)
        job = CompletionJob(service, body, asked_by(http, body.user))
        answers = service.start("completions", job.requests)
        return await _reply(http, service, answers, job, bool(body.stream))

    @app.post("/v1/embeddings", tags=["OpenAI"], response_model=None)
    async def embeddings(http: HttpRequest, body: EmbeddingRequest) -> Response:
        """Vectors of texts, mean-pooled over the model's last hidden states."""
        service.check_model(body.model)
        job = EmbeddingJob(service, body, asked_by(http, body.user))
        await _embed(http, service, job)
        return JSONResponse(job.whole())

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """The models that can be asked."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        service.check_model(name)
        return _model(service)


def _model(service: Service) -> dict[str, Any]:
    info = service.info
    return model_object(service.name, service.created, info.context if info else None)


async def _reply(
    http: HttpRequest, service: Service, answers: Answers, job: ChatJob | CompletionJob, streams: bool
) -> Response:
    settings = service.settings
    if streams:
        try:
            await unless_gone(http, answers.cancel, answers.accepted(settings.accept_s))
        except BaseException:
            answers.leave()
            raise
        progress = PROGRESS_HEADER in http.headers
        chunks = reading.stream(answers, job, settings.timeout_s, progress=progress)
        return EventStream(chunks, answers.cancel, settings.ping_s)
    await unless_gone(http, answers.cancel, reading.read_all(answers, job.read, settings.timeout_s))
    return JSONResponse(job.whole())


async def _embed(http: HttpRequest, service: Service, job: EmbeddingJob) -> None:
    """A few inputs at a time: a long list is no reason to fill the queue."""
    some = max(1, service.settings.parallel)
    timeout_s = service.settings.timeout_s
    end = time.monotonic() + timeout_s
    for begin in range(0, len(job.requests), some):
        requests = job.requests[begin : begin + some]
        # Once begun, a full queue is waited for: what was computed would be lost.
        while begin and not service.has_room(len(requests)):
            await asyncio.sleep(ROOM_CHECK_S)
        answers = service.start("embeddings", requests)
        left_s = max(0.001, end - time.monotonic()) if timeout_s else 0.0
        work = reading.read_all(answers, job.reader(begin), left_s, said_s=timeout_s)
        await unless_gone(http, answers.cancel, work)


def asked_by(http: HttpRequest, user: str | None) -> str:
    """Who asks, for fairness between them: a program at an address with a key, and its user."""
    headers = http.headers
    words = (
        http.client.host if http.client else "",
        headers.get("authorization", headers.get("x-api-key", "")),
        headers.get("user-agent", ""),
        user or "",
    )
    return hashlib.blake2b("\0".join(words).encode("utf-8", "replace"), digest_size=8).hexdigest()


# -- tokens ----------------------------------------------------------------------------------------


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/v1/tokenize", tags=["Tokens"], response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        """A text's tokens, as the model would read it; of messages, how many their prompt has."""
        service.check_model(body.model)
        if body.messages is not None:
            request = Request(messages=tuple(message_of(i, m) for i, m in enumerate(body.messages)))
            with service.in_use():
                count = await run_in_threadpool(service.client.count_tokens, request)
            return JSONResponse({"count": count})
        text = body.text
        if text is None:
            raise invalid("text or messages is missing", "text")
        if len(text) > MOST_TOKENIZED:
            raise invalid(
                f"the text has {len(text)} characters; at most {MOST_TOKENIZED} are taken", "text"
            )

        def tokenized() -> Response:  # the reply of a long text takes a while to put together, too
            found = service.client.tokenize(
                text, add_special=body.add_special, parse_special=body.parse_special
            )
            tokens = [one.id for one in found]
            return JSONResponse(
                {"count": len(tokens), "tokens": tokens, "texts": [one.text for one in found]}
            )

        with service.in_use():
            return await run_in_threadpool(tokenized)

    @app.post("/v1/detokenize", tags=["Tokens"])
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens."""
        service.check_model(body.model)
        try:
            with service.in_use():
                return {"text": await run_in_threadpool(service.client.detokenize, body.tokens)}
        except RequestFailed as error:
            raise invalid(str(error), "tokens") from None


# -- status ----------------------------------------------------------------------------------------


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["Status"])
    async def health() -> dict[str, Any]:
        """Whether the endpoint answers. A model that rests is loaded by the next request."""
        return {
            "status": "ok",
            "model": service.name,
            "loaded": service.info is not None,
            "open_requests": service.num_open,
        }

    @app.get("/metrics", tags=["Status"], response_class=Response)
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        status = await run_in_threadpool(service.status)
        return Response(service.metrics.page(status), media_type=metrics.CONTENT_TYPE)


# -- errors ----------------------------------------------------------------------------------------


def _add_error_replies(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api(_: HttpRequest, error: ApiError) -> Response:
        return _error_reply(error)

    @app.exception_handler(EdgeInferError)
    async def ours(_: HttpRequest, error: EdgeInferError) -> Response:
        return _error_reply(as_api_error(error))

    @app.exception_handler(Exception)
    async def bug(http: HttpRequest, error: Exception) -> Response:
        return _error_reply(internal_error(http.state.request_id))

    @app.exception_handler(RequestValidationError)
    async def validation(_: HttpRequest, error: RequestValidationError) -> Response:
        return _error_reply(_wrong_field(error))

    @app.exception_handler(HTTPException)
    async def http(_: HttpRequest, error: HTTPException) -> Response:
        kind: ErrorType = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        said = one_line(str(error.detail))
        if error.status_code == 404:
            said = "there is no such route; /docs lists those there are"
        return _error_reply(ApiError(error.status_code, said, kind, headers=dict(error.headers or {})))


def _error_reply(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _wrong_field(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, by its path."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        place = first["loc"][-1]
        return ApiError(
            400, f"the body is no JSON: {first['ctx']['error']} at {place}", "invalid_request_error"
        )
    path = [str(part) for part in first["loc"] if part != "body"]
    where = "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in path).lstrip(".")
    said = one_line(str(first["msg"]), 300)
    what = f"{where}: {said}" if where else f"the body is not what this route takes: {said}"
    return ApiError(400, one_line(what), "invalid_request_error", param=where or None)
