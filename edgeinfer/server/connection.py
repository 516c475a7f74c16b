"""One connection: uvicorn's HTTP protocol with bounds on what a client may send, and how slowly.

The parser (llhttp) bounds nothing: it keeps a header line of any length, waits for its end for ever, and
calls back only for what is complete. So bytes and time are counted here.
"""

from __future__ import annotations

import asyncio
import http
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from edgeinfer.errors import one_line
from edgeinfer.server.errors import ApiError
from edgeinfer.server.refusals import CLOSE, head_too_large, malformed, refusal
from edgeinfer.server.transport import GentleTransport

if TYPE_CHECKING:
    from starlette.types import Message

log = logging.getLogger("edgeinfer.server")
access_log = logging.getLogger("edgeinfer.access")

_ABSOLUTE = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?#]*)(.*)", re.DOTALL)
_MOST_QUEUED = 16  # requests sent ahead of their answers; uvicorn starts them one after another


@dataclass(frozen=True)
class ConnectionLimits:
    """max_connections: those beyond get a 503.
    head_timeout_s: from connecting, or on a kept connection from a request's first byte, to the end of
    its head. keep_alive_s: between two requests. write_stall_s: how long a client may take nothing of
    its answer. linger_s: see GentleTransport. max_head_bytes: request line and headers together; also
    any other run of bytes that brings nothing, as an endless trailer.
    """

    max_connections: int = 512
    head_timeout_s: float = 10.0
    keep_alive_s: float = 75.0
    write_stall_s: float = 120.0
    linger_s: float = 5.0
    max_head_bytes: int = 64 << 10
    max_url_bytes: int = 8 << 10
    max_headers: int = 128


class Connection(HttpToolsProtocol):
    def __init__(
        self,
        limits: ConnectionLimits,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._limits = limits
        self.timeout_keep_alive = limits.keep_alive_s  # type: ignore[assignment]  # call_later takes both
        self._gentle: GentleTransport
        self._running: RequestResponseCycle | None = None  # uvicorn's `cycle` is the newest one
        self._in_head = False
        self._in_body = False
        self._is_refused = False
        self._refusal: ApiError | None = None  # raised in a callback of the parser
        self._upgrade_ignored = False
        self._idle_bytes = 0  # since something complete came
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._gentle = GentleTransport(
            transport,
            linger_s=self._limits.linger_s,
            may_linger=lambda: self._in_body or self._is_refused,
            on_linger=self._cancel_timers,
        )
        super().connection_made(self._gentle)
        num_others = len(self.connections) - 1
        if num_others >= 2 * self._limits.max_connections:  # they do not even read what they are told
            self._gentle.abort()
        elif num_others >= self._limits.max_connections:
            self._refuse(refusal(503, f"this endpoint has {num_others} connections open; try again"))
        else:
            self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        self._cancel_stall_timer()
        self._gentle.lost()
        self._disconnect_cycles()
        super().connection_lost(exc)

    def _disconnect_cycles(self) -> None:
        """The app learns at once that nobody listens. uvicorn tells the newest request only, which with
        pipelining is not the one being answered."""
        queued = [cycle for cycle, _ in self.pipeline]
        for cycle in (self._running, self.cycle, *queued):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()

    def shutdown(self) -> None:
        """Close now, or after the answer under way; no other begins."""
        if self._gentle.is_lingering:
            self._gentle.close_now()
        elif self._running is None:
            self._gentle.close()
        else:
            self._running.keep_alive = False

    def abort(self) -> None:
        self._gentle.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._limits.write_stall_s, self._stalled)

    def resume_writing(self) -> None:
        self._cancel_stall_timer()
        super().resume_writing()

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _stalled(self) -> None:
        log.info("%s took nothing of its answer for %g s", _peer(self), self._limits.write_stall_s)
        self._gentle.abort()

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self._gentle.is_closing():
            return
        self._unset_keepalive_if_required()
        if not self._in_body:
            self._arm_head_timer()
        self._idle_bytes += len(data)
        self._feed(data)
        if self._idle_bytes > self._limits.max_head_bytes and not self._is_refused:
            self._refuse(head_too_large(self._limits.max_head_bytes))

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as pause:
            self._ignore_upgrade(data[int(pause.args[0]) :])
        except httptools.HttpParserError as error:
            self._refuse(self._refusal or malformed(data, error))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Go on as if no upgrade had been asked for, which a server may.

        The parser takes what follows such a head for another protocol's, but clients that offer HTTP/2
        in passing (Java's) send an ordinary body.
        """
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name not in (b"connection", b"upgrade", b"http2-settings"):
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._upgrade_ignored = False
        self._feed(b"".join([*head, b"\r\n", rest]))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._in_head = True
        self._arm_head_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:  # a trailer; nobody here wants one, and the app has the headers already
            return
        self._head_bytes += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._idle_bytes = 0
        self._in_head = False
        self._cancel_head_timer()
        self._check_head()
        if self.parser.should_upgrade():
            self._upgrade_ignored = True
            return
        absolute = _ABSOLUTE.fullmatch(self.url)
        if absolute is not None:
            # Its authority takes the place of Host (RFC 9112, 3.2.2), so it is what the guard must see.
            self.headers[:] = [header for header in self.headers if header[0] != b"host"]
            self.headers.append((b"host", absolute[1]))
            self.url = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
        if len(self.pipeline) >= _MOST_QUEUED:
            raise self._refused_in_callback(429, "too many requests were sent ahead of their answers")
        super().on_headers_complete()
        self._in_body = True

    def _check_head(self) -> None:
        limits = self._limits
        if self.parser.get_method() == b"CONNECT":
            raise self._refused_in_callback(405, "this endpoint is no proxy")
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise self._refused_in_callback(505, "this endpoint speaks HTTP/1.1")
        if len(self.url) > limits.max_url_bytes:
            raise self._refused_in_callback(414, f"the URL is longer than {limits.max_url_bytes} bytes")
        if self._head_bytes > limits.max_head_bytes:
            self._refusal = head_too_large(limits.max_head_bytes)
            raise self._refusal
        if len(self.headers) > limits.max_headers:
            raise self._refused_in_callback(431, f"there are more than {limits.max_headers} headers")

    def _refused_in_callback(self, status: int, message: str) -> ApiError:
        self._refusal = refusal(status, message)
        return self._refusal

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._idle_bytes = 0
        if self._upgrade_ignored:
            return
        self._in_body = False
        super().on_message_complete()

    # Time for a head

    def _arm_head_timer(self) -> None:
        if self._head_timer is None and not self._is_refused:
            self._head_timer = self.loop.call_later(self._limits.head_timeout_s, self._head_overdue)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        self._head_timer = None
        if self._running is not None:  # a head sent ahead; the answer before it is not cut off for that
            self._arm_head_timer()
        elif not self._in_head:  # a connection opened in advance, as browsers do
            self._gentle.close()
        else:
            timeout_s = self._limits.head_timeout_s
            self._refuse(refusal(408, f"the request's head did not arrive within {timeout_s:g} s"))

    def _cancel_timers(self) -> None:
        self._cancel_head_timer()
        self._unset_keepalive_if_required()

    # What goes out

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        task = self.loop.create_task(self._answer(cycle, app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _answer(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Run the app. However it ends, its request is answered in full, or its connection closed."""
        begin = time.monotonic()
        status = 0
        is_old = cycle.scope["http_version"] == "1.0"

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if is_old:  # it knows no chunks: the answer's end is the connection's
                    cycle.chunked_encoding = False
            elif is_old and message["type"] == "http.response.body":
                cycle.expected_content_length = len(message.get("body", b""))
            await cycle.send(message)  # type: ignore[arg-type]

        try:
            await app(cycle.scope, cycle.receive, send)
        except asyncio.CancelledError:  # the server's time to shut down is over
            await _say(cycle, send, refusal(503, "this endpoint is shutting down"))
        except Exception as error:
            log.error("a request failed outside the guard", exc_info=error)
            await _say(cycle, send, refusal(500, "something failed inside edgeinfer; see its log"))
        finally:
            is_whole = cycle.response_complete
            if not is_whole and not cycle.disconnected:
                self._gentle.close()
            cycle.on_response = _nothing  # it would keep this connection alive
            if access_log.isEnabledFor(logging.INFO):
                _log_access(cycle, status, time.monotonic() - begin, is_whole)

    def on_response_complete(self) -> None:
        finished, self._running = self._running, None
        if finished is self.cycle and self._in_body:
            self._gentle.close()
        super().on_response_complete()

    def _refuse(self, error: ApiError) -> None:
        """Answer what never became a request, or broke off within its body, and close."""
        self._is_refused = True
        self._cancel_timers()
        # While an earlier request is being answered, our words would land in that answer.
        can_speak = self._running is None or (
            self._running is self.cycle and self._in_body and not self._running.response_started
        )
        self._disconnect_cycles()
        if can_speak:
            self._write(error)
        access_log.info("%s refused %d: %s", _peer(self), error.status, error)
        self._gentle.close()

    def _write(self, error: ApiError) -> None:
        headers, content = error.on_the_wire()
        phrase = http.HTTPStatus(error.status).phrase.encode()
        lines = [b"HTTP/1.1 %d %s\r\n" % (error.status, phrase)]
        for header in (*self.server_state.default_headers, *headers, CLOSE):
            lines.append(b"%s: %s\r\n" % header)
        self._gentle.write(b"".join([*lines, b"\r\n", content]))


async def _say(cycle: RequestResponseCycle, send: Callable[[Message], Any], error: ApiError) -> None:
    """Why there is no answer, if none has begun."""
    if cycle.response_started or cycle.disconnected:
        return
    headers, content = error.on_the_wire()
    await send({"type": "http.response.start", "status": error.status, "headers": [*headers, CLOSE]})
    await send({"type": "http.response.body", "body": content})


def _nothing() -> None:
    pass


def _peer(connection: Connection) -> str:
    return _host_and_port(connection.client)


def _host_and_port(client: tuple[str, int] | None) -> str:
    return f"{client[0]}:{client[1]}" if client else "-"


def _log_access(cycle: RequestResponseCycle, status: int, seconds: float, is_whole: bool) -> None:
    """Without the query: some clients put keys there."""
    scope = cycle.scope
    access_log.info(
        '%s "%s %s" %s %.0f ms %s%s',
        _host_and_port(scope.get("client")),
        scope["method"],
        one_line(scope["raw_path"].decode("latin-1"), 200),
        status or "-",
        seconds * 1000,
        scope.get("state", {}).get("request_id", "-"),
        "" if is_whole else " broken off" if not cycle.disconnected else " client left",
    )
