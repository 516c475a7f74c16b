"""One request and its answer, between server and app: the body's limits, every answer's headers."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from edgeinfer.server.errors import ApiError, Headers

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Send


class BodyBudget:
    """Bytes of all bodies together that wait for their answers to begin. Hundreds of connections with
    one body each, none of them too large, would fill the memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0


class Exchange:
    """`receive` and `send` for the app.

    The body may have `max_bytes`, and be waited for `timeout_s` in all (time in which the app does not
    ask for it does not count). Past that the request is refused from here, in the midst of `receive`: an
    exception would have to get through whatever the app makes of exceptions there. The app sees a
    disconnected client and may send what it likes.
    """

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        has_body: bool,
        max_bytes: int,
        timeout_s: float,
        budget: BodyBudget,
    ) -> None:
        self.headers: Headers = []  # of every answer; they replace the app's own of the same names
        self.is_begun = False
        self.is_refused = False
        self.is_disconnected = False
        self._receive = receive
        self._send = send
        self._has_body = has_body
        self._body_done = False
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._budget = budget
        self._num_bytes = 0
        self._held_bytes = 0
        self._waited_s = 0.0

    async def receive(self) -> Message:
        if self.is_refused:
            return {"type": "http.disconnect"}
        message = await (self._receive() if self._body_done else self._receive_body())
        if message["type"] == "http.disconnect":
            self.is_disconnected = True
        return message

    async def _receive_body(self) -> Message:
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s - self._waited_s):
                message = await self._receive()
        except TimeoutError:
            return await self._refused_while_reading(
                ApiError(
                    408,
                    f"the request's body did not arrive within {self._timeout_s:g} s",
                    "invalid_request_error",
                    code="request_timeout",
                )
            )
        finally:
            self._waited_s += time.monotonic() - begin
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._num_bytes += size
            if self._num_bytes > self._max_bytes:
                return await self._refused_while_reading(too_large(self._max_bytes))
            if self._budget.held + size > self._budget.max_bytes:
                return await self._refused_while_reading(_too_much_at_once())
            self._hold(size)
            self._body_done = not message.get("more_body", False)
        return message

    def _hold(self, size: int) -> None:
        if not self.is_begun:
            self._held_bytes += size
            self._budget.held += size

    def release(self) -> None:
        """To be called at the end, however it ends."""
        self._budget.held -= self._held_bytes
        self._held_bytes = 0

    async def _refused_while_reading(self, error: ApiError) -> Message:
        await self.refuse(error)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.is_refused:
            return
        if message["type"] == "http.response.start":
            self.is_begun = True
            self.release()
            message = {**message, "headers": self._with_ours(list(message.get("headers", ())))}
        await self._send(message)

    def _with_ours(self, headers: Headers) -> Headers:
        names = {name for name, _ in self.headers if name != b"vary"}
        kept = [
            (name, value)
            for name, value in headers
            if name.lower() not in names and not name.lower().startswith(b"access-control-")
        ]
        if self._has_body and not self._body_done:
            # What is left of the body would be taken for the next request, or be read for nothing.
            kept = [(name, value) for name, value in kept if name.lower() != b"connection"]
            kept.append((b"connection", b"close"))
        return kept + self.headers

    async def refuse(self, error: ApiError) -> None:
        """Answer in the app's place. Where its answer has begun, that is broken off instead."""
        if not self.is_begun:
            await self.answer(error.status, *error.on_the_wire())
        self.is_refused = True

    async def answer(self, status: int, headers: Headers, content: bytes = b"") -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})


def too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the request's body is larger than {max_bytes} bytes, which is the most this endpoint takes",
        "invalid_request_error",
        code="request_too_large",
    )


def _too_much_at_once() -> ApiError:
    return ApiError(
        503,
        "too many large requests come at once; try again",
        "server_error",
        code="unavailable",
        headers={"retry-after": "1"},
    )
