"""Running the endpoint in this process: from the address being taken to the last answer given."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from edgeinfer.errors import EdgeInferError, one_line
from edgeinfer.server.binding import BACKLOG, Address, listen
from edgeinfer.server.connection import Connection, ConnectionLimits

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("edgeinfer.server")

_TICK_S = 0.05
_LAST_BYTES_S = 2.0  # for answers that were ended, and for what is written to leave the socket
_OTHER_FILES = 256  # descriptors that are no connections: models, libraries, the worker's pipes


@dataclass(frozen=True)
class ServeSettings:
    """port: 0 takes any free one. shutdown_s: what running answers get to finish when asked to stop."""

    host: str = "127.0.0.1"
    port: int = 11435
    shutdown_s: float = 10.0
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)


def serve(
    app: ASGIApp,
    settings: ServeSettings | None = None,
    started: Callable[[Address], None] | None = None,
    *,
    listening: tuple[Address, list[socket.socket]] | None = None,
) -> None:
    """Blocks until SIGINT or SIGTERM, then lets running answers finish for `shutdown_s`.

    started: called once the app's lifespan has begun and connections are accepted. listening: of
    `listen`, called before something slow; closed here.
    Raises CannotListen or UsageError before anything has begun, what the lifespan raised at its
    beginning, and KeyboardInterrupt (exit code 130; otherwise it is 0) where a signal came before it was
    ready, or a second one ended it at once.
    """
    settings = settings or ServeSettings()
    address, sockets = listening or listen(settings.host, settings.port)
    server = Server(app, settings, address, started)
    try:
        allow_files(settings.limits.max_connections)
        server.run(sockets=sockets)
    finally:
        for each in sockets:
            each.close()
    if server.force_exit or not server.started:
        raise KeyboardInterrupt


class Server(uvicorn.Server):
    """uvicorn's, with its own way to begin and to end."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        address: Address,
        on_started: Callable[[Address], None] | None,
    ) -> None:
        self._lifespan = _Lifespan(app)
        super().__init__(
            uvicorn.Config(
                self._lifespan,
                interface="asgi3",
                http="httptools",
                ws="none",
                loop="asyncio",
                lifespan="on",
                workers=1,
                log_config=None,
                log_level=logging.CRITICAL,  # what it would say is said here
                access_log=False,
                proxy_headers=False,  # anybody can send X-Forwarded-For
                server_header=False,
                backlog=BACKLOG,
            )
        )
        self._settings = settings
        self._address = address
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if not await self._begin_lifespan():
            return
        loop = asyncio.get_running_loop()
        connection = functools.partial(
            Connection, self._settings.limits, self.config, self.server_state, self.lifespan.state
        )
        self.servers = [
            await loop.create_server(connection, sock=each, backlog=BACKLOG) for each in sockets or ()
        ]
        self.started = True
        await self.on_tick(0)  # the Date header
        if self._on_started is not None:
            self._on_started(self._address)

    async def _begin_lifespan(self) -> bool:
        """False: a signal came first, and the lifespan has been cancelled. Raises what it raised."""
        begun = asyncio.ensure_future(self.lifespan.startup())
        while not begun.done() and not self.should_exit:
            await asyncio.wait({begun}, timeout=_TICK_S)
        if not begun.done():
            begun.cancel()
            if self._lifespan.task is not None:
                self._lifespan.task.cancel()
            await self._until(lambda: self._lifespan.is_over, self._settings.shutdown_s)
            return False
        await begun
        if self._lifespan.failure is not None:
            raise self._lifespan.failure
        return True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        if not await self._until(lambda: not state.tasks, self._settings.shutdown_s):
            log.warning("%d answers were not finished and are ended", len(state.tasks))
            for task in list(state.tasks):
                task.cancel()
            await self._until(lambda: not state.tasks, _LAST_BYTES_S)
        for connection in list(state.connections):
            connection.shutdown()
        await self._until(lambda: not state.connections, _LAST_BYTES_S)
        for connection in list(state.connections):
            if isinstance(connection, Connection):
                connection.abort()
        if not self.force_exit:
            ended = asyncio.ensure_future(self.lifespan.shutdown())
            await self._until(ended.done)
            if not ended.done():
                ended.cancel()

    async def _until(self, done: Callable[[], bool], most_s: float = float("inf")) -> bool:
        """Whether it came true before the time was over; a second signal ends the wait."""
        deadline = time.monotonic() + most_s
        while not done():
            if self.force_exit or time.monotonic() >= deadline:
                return done()
            await asyncio.sleep(_TICK_S)
        return True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise them again at the end: a server that was told to stop has not failed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a third one ends whatever hangs
        self.should_exit = True


class _Lifespan:
    """The app, with its lifespan watched: uvicorn would log what it raises and exit by itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._has_begun = False
        self.failure: BaseException | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.task is None or self.task.done()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def watched_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._has_begun = True
            if message["type"] == "lifespan.startup.failed":
                said = str(message.get("message", "")).strip().splitlines() or ["no reason given"]
                self.failure = EdgeInferError(f"the endpoint did not start: {said[-1]}")
            await send(message)

        self.task = asyncio.current_task()
        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            if self._has_begun:
                log.error("closing the endpoint failed: %s", one_line(repr(error)), exc_info=error)
            else:
                self.failure = error
            raise


def allow_files(num_connections: int) -> None:
    """Where few open files are usual (256 on macOS), allow as many as there may be connections."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    wanted = num_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning(
            "this process may open %d files, too few for %d connections; raise `ulimit -n`",
            allowed,
            num_connections,
        )


class ServerThread:
    """The same in a thread, on a free port, for tests and benchmarks.

    with ServerThread(app) as server:
        httpx.get(server.url)

    Leaving it shuts the server down as a signal would. Raises what `serve` raises.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings | None = None) -> None:
        self._app = app
        self._settings = replace(settings or ServeSettings(), port=0)
        self._is_ready = threading.Event()
        self._failure: BaseException | None = None
        self._server: Server
        self._thread = threading.Thread(target=self._run, name="edgeinfer-server", daemon=True)
        self.address: Address

    @property
    def url(self) -> str:
        return self.address.url

    def __enter__(self) -> Self:
        self.address, self._sockets = listen(self._settings.host, 0)
        self._server = Server(self._app, self._settings, self.address, self._started)
        self._thread.start()
        self._is_ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def _started(self, address: Address) -> None:
        self._is_ready.set()

    def _run(self) -> None:
        try:
            self._server.run(sockets=self._sockets)
        except BaseException as error:
            self._failure = error
        finally:
            for each in self._sockets:
                each.close()
            self._is_ready.set()

    def stop(self) -> None:
        """What one signal does. Returns at once."""
        self._server.should_exit = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._thread.join(self._settings.shutdown_s + 10 * _LAST_BYTES_S)
        if self._thread.is_alive():
            self._server.force_exit = True
            raise RuntimeError("the server's thread does not end")
        if self._failure is not None:
            raise self._failure
