"""Server-sent events: headers at once, comment pings while nothing else comes, and an end when the
reader goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the stream
]


_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
# Line ends for many clients (all that split as str.splitlines does), and what UTF-8 does not have.
_NO_PART_OF_A_LINE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def dumps(value: Any) -> str:
    """JSON that is one line, whatever its reader takes for a line's end."""
    text = _encode(value)
    if text.isascii():  # nearly always, and told by a flag of the text
        return text
    return _NO_PART_OF_A_LINE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def data(value: Any) -> bytes:
    return f"data: {dumps(value)}\n\n".encode()


class EventStream(Response):
    """A response that sends `chunks` as they come.

    on_gone: called when the reader went away; `chunks` is expected to come to its end soon after it,
    and is read to it, so that whatever makes them ends in order.
    """

    def __init__(
        self, chunks: AsyncIterator[bytes], on_gone: Callable[[], None], ping_s: float = 10.0
    ) -> None:
        super().__init__()
        self._chunks = chunks
        self._on_gone = on_gone
        self._ping_s = ping_s
        self._is_gone = False
        self._sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._sent = loop.time()
        watch = asyncio.create_task(self._watch(receive))
        ping = asyncio.create_task(self._ping(send))
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": _HEADERS})
            # The head goes out with the first body; a prompt may take minutes to read.
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": True})
            async for chunk in self._chunks:
                self._sent = loop.time()
                await self._send(send, {"type": "http.response.body", "body": chunk, "more_body": True})
            ping.cancel()  # one that waits for its reader to take more must not come after the end
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in (watch, ping):
                task.cancel()

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        if not self._is_gone:
            try:
                await send(message)
            except OSError:
                self._leave()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._on_gone()

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while True:
                await asyncio.sleep(max(0.05, self._sent + self._ping_s - loop.time()))
                if loop.time() - self._sent >= self._ping_s and not self._is_gone:
                    self._sent = loop.time()
                    await send({"type": "http.response.body", "body": PING, "more_body": True})
