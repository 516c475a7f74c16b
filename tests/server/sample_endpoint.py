"""An app that does, for the asking, what apps do, behind the guard on a real socket. Also a program."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.raw_http import PATIENCE_S, RawConnection
from edgeinfer.errors import PromptTooLong
from edgeinfer.server.connection import ConnectionLimits
from edgeinfer.server.errors import ApiError
from edgeinfer.server.guard import Guard, GuardSettings
from edgeinfer.server.serving import ServerThread, ServeSettings, serve

# Long enough for what is meant to arrive in time, on a busy machine; what is refused for slowness is
# never finished by its test.
LIMITS = ConnectionLimits(head_timeout_s=1.0, linger_s=2.0)
GUARD = GuardSettings(max_body_bytes=100_000, body_timeout_s=1.0)


class SampleApp:
    """seen: a line for each thing that happened, in order."""

    def __init__(self) -> None:
        self.seen: queue.Queue[str] = queue.Queue()

    def wait_for(self, line: str) -> None:
        """Raises queue.Empty if it does not come."""
        while self.seen.get(timeout=PATIENCE_S) != line:
            pass

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        self.seen.put(scope["path"])
        route = getattr(self, "_" + scope["path"].strip("/").replace("-", "_"), self._missing)
        await route(scope, receive, send)

    async def _lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        self.seen.put("up")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.seen.put("down")
        await send({"type": "lifespan.shutdown.complete"})

    async def _missing(self, scope: Any, receive: Any, send: Any) -> None:
        await _say(send, {"missing": scope["path"]}, status=404)

    async def _health(self, scope: Any, receive: Any, send: Any) -> None:
        await _say(send, {"status": "ok"})

    async def _echo(self, scope: Any, receive: Any, send: Any) -> None:
        """Reads the body, and says what it was asked."""
        size, message = 0, {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                self.seen.put("left while sending")
                raise RuntimeError("the client left")  # as frameworks do
            size += len(message["body"])
        headers = [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]]
        say = {"size": size, "headers": headers, "path": scope["path"], "method": scope["method"]}
        await _say(send, {**say, "request_id": scope["state"]["request_id"]})

    async def _unread(self, scope: Any, receive: Any, send: Any) -> None:
        await _say(send, {"read": False})

    async def _cors(self, scope: Any, receive: Any, send: Any) -> None:
        """As a framework's own CORS middleware would have it."""
        headers = [
            (b"access-control-allow-origin", b"*"),
            (b"access-control-allow-credentials", b"true"),
        ]
        await _say(send, {}, headers=headers)

    async def _fail(self, scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("the reason is for the log")

    async def _fail_midway(self, scope: Any, receive: Any, send: Any) -> None:
        await _begin(send)
        await send({"type": "http.response.body", "body": b"some\n", "more_body": True})
        raise RuntimeError("the reason is for the log")

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        raise ApiError(400, "n is too large", "invalid_request_error", param="n", code="bad_n")

    async def _too_long(self, scope: Any, receive: Any, send: Any) -> None:
        raise PromptTooLong(5000, 4096)

    async def _think(self, scope: Any, receive: Any, send: Any) -> None:
        """Says nothing until the client leaves."""
        await _body(receive)
        self.seen.put("thinking")
        while (await receive())["type"] != "http.disconnect":
            pass
        self.seen.put("left")

    async def _stream(self, scope: Any, receive: Any, send: Any) -> None:
        """Tells the time until the client leaves or the server ends it."""
        await _body(receive)
        await _begin(send)
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while not gone.done():
                await send({"type": "http.response.body", "body": b"tick\n", "more_body": True})
                await asyncio.sleep(0.01)
            self.seen.put("left")
        except asyncio.CancelledError:
            self.seen.put("ended")
            raise
        finally:
            gone.cancel()

    async def _three(self, scope: Any, receive: Any, send: Any) -> None:
        """A stream that ends by itself."""
        await _begin(send)
        for number in range(3):
            await send({"type": "http.response.body", "body": b"%d\n" % number, "more_body": True})
            await asyncio.sleep(0.3)
        await send({"type": "http.response.body", "body": b"done\n"})
        self.seen.put("finished")

    async def _flood(self, scope: Any, receive: Any, send: Any) -> None:
        await _begin(send)
        gone = asyncio.ensure_future(_disconnected(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        self.seen.put("left")


async def _body(receive: Any) -> None:
    while (await receive()).get("more_body"):
        pass


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _begin(send: Any) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _say(send: Any, what: Any, status: int = 200, headers: Any = ()) -> None:
    body = json.dumps(what).encode()
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Served:
    def __init__(self, server: ServerThread, app: SampleApp) -> None:
        self.server = server
        self.app = app

    def connect(self) -> RawConnection:
        return RawConnection(self.server.address.host, self.server.address.port)


@contextlib.contextmanager
def served(
    guard: GuardSettings = GUARD, limits: ConnectionLimits = LIMITS, shutdown_s: float = 1.0
) -> Iterator[Served]:
    app = SampleApp()
    settings = ServeSettings(limits=limits, shutdown_s=shutdown_s)
    with ServerThread(Guard(app, guard), settings) as server:
        yield Served(server, app)


def main() -> int:
    """Serve on a free port until stopped: a line with the address, then a line for each thing seen."""
    logging.basicConfig(level=logging.INFO)
    settings = replace(ServeSettings(port=0, limits=LIMITS), **json.loads(sys.argv[1]))

    class Printing(queue.Queue[str]):
        def put(self, item: str, block: bool = True, timeout: float | None = None) -> None:
            print(item, flush=True)

    app = SampleApp()
    app.seen = Printing()
    try:
        serve(Guard(app, GUARD), settings, lambda address: print(address.port, flush=True))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
