"""Beginning and ending: the address, signals, the app's lifespan."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.raw_http import PATIENCE_S, RawConnection
from edgeinfer.errors import ModelNotFound, UsageError
from edgeinfer.server import binding
from edgeinfer.server.binding import Address, CannotListen, listen
from edgeinfer.server.serving import ServerThread, ServeSettings, serve
from tests.server.sample_endpoint import SampleApp, served

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent as on POSIX")


class Program:
    """`serve` in a process of its own, as a user starts it."""

    def __init__(self, **settings: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.sample_endpoint", json.dumps(settings)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._err: list[str] = []
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._collect, args=(self.process.stderr,))
        self._reader.start()
        self.wait_for("up")
        self.port = int(self.line())

    def _collect(self, stream: Any) -> None:
        self._err += stream

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def wait_for(self, wanted: str) -> None:
        while (line := self.line()) != wanted:
            assert line, f"it ended without {wanted!r}: {''.join(self._err)}"

    def connect(self) -> RawConnection:
        return RawConnection("127.0.0.1", self.port)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, the rest of stdout, stderr."""
        assert self.process.stdout is not None
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code, self.process.stdout.read(), "".join(self._err)


@contextmanager
def program(**settings: Any) -> Iterator[Program]:
    it = Program(**settings)
    try:
        yield it
    finally:
        it.process.kill()
        it.end()
        assert it.process.stdout is not None and it.process.stderr is not None
        it.process.stdout.close()
        it.process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_server_well(number: int) -> None:
    with program() as it, it.connect() as client:
        assert client.ask("/health").status == 200
        it.signal(number)
        assert client.is_closed()
        code, out, err = it.end()
    assert (code, out.split()) == (0, ["/health", "down"])
    assert "Traceback" not in err and "Uvicorn" not in err


def test_a_running_answer_gets_its_time_and_no_new_one_begins() -> None:
    with program(shutdown_s=30) as it, it.connect() as client, it.connect() as idle:
        client.send_request("/three")
        assert client.answer_head()[0] == 200
        it.signal(signal.SIGTERM)
        assert idle.is_closed()
        with pytest.raises(ConnectionError):
            it.connect()
        assert b"".join(client.chunks()) == b"0\n1\n2\ndone\n"
        assert client.is_closed()
        code, out, _ = it.end()
    assert (code, out.split()) == (0, ["/three", "finished", "down"])


def test_a_stream_without_end_is_ended_after_its_time_and_the_app_told() -> None:
    with program(shutdown_s=0.3) as it, it.connect() as client:
        client.send_request("/stream")
        client.answer_head()
        it.signal(signal.SIGINT)
        with pytest.raises(EOFError):
            b"".join(client.chunks())
        code, out, err = it.end()
    assert (code, out.split()) == (0, ["/stream", "ended", "down"])
    assert "1 answers were not finished" in err
    assert "Traceback" not in err


def test_who_waits_for_an_answers_beginning_is_told_of_the_shutdown() -> None:
    with program(shutdown_s=0.3) as it, it.connect() as client:
        client.send_request("/think", b"{}")
        it.wait_for("/think")
        it.signal(signal.SIGTERM)
        answer = client.answer()
        assert (answer.status, answer.code) == (503, "unavailable")
        assert it.end()[0] == 0


def test_a_second_interrupt_ends_it_at_once() -> None:
    with program(shutdown_s=1000) as it, it.connect() as client, it.connect() as idle:
        client.send_request("/stream")
        client.answer_head()
        it.signal(signal.SIGINT)
        assert idle.is_closed()  # the first one has been taken in
        it.signal(signal.SIGINT)
        code, out, err = it.end()
    assert code == 130
    assert out.split() == ["/stream", "ended"]
    assert "Traceback" not in err


def test_a_taken_port_is_one_line_that_names_it_and_its_owner() -> None:
    with served() as it:
        port = it.server.address.port
        with pytest.raises(CannotListen) as caught:
            serve(SampleApp(), ServeSettings(port=port))
    said = str(caught.value)
    assert f"port {port} on 127.0.0.1 is taken" in said
    assert f"process {os.getpid()}" in said
    assert "--port" in said


def test_a_taken_port_is_said_where_the_owner_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    def hidden(kind: str) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", hidden)
    with served() as it, pytest.raises(CannotListen, match=r"is taken; stop that"):
        listen("127.0.0.1", it.server.address.port)


@pytest.mark.parametrize(
    ("host", "port", "kind", "said"),
    [
        ("no-such-name.invalid", 0, UsageError, "--host"),
        ("192.0.2.1", 0, CannotListen, "not an address of this machine"),
        ("127.0.0.1", 65536, UsageError, "--port"),
        ("a" * 300, 0, UsageError, "--host"),
    ],
)
def test_an_address_that_cannot_be_is_one_line(
    host: str, port: int, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if host.endswith(".invalid"):  # no question to a real resolver
        monkeypatch.setattr(socket, "getaddrinfo", not_found)
    with pytest.raises(kind, match=said):
        listen(host, port)


def test_a_port_of_the_system_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(binding, "_listen_on", forbidden)
    with pytest.raises(CannotListen, match="above 1023"):
        listen("127.0.0.1", 80)


def test_localhost_is_one_port_on_all_its_addresses() -> None:
    address, sockets = listen("localhost", 0)
    try:
        assert {each.getsockname()[1] for each in sockets} == {address.port}
        assert address.url == f"http://localhost:{address.port}"
    finally:
        for each in sockets:
            each.close()


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """Nagle's algorithm and delayed acknowledgements make 40 ms of every second answer."""

    class Noting(asyncio.Protocol):
        no_delay = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted = transport.get_extra_info("socket")
            Noting.no_delay = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            transport.close()

    async def connect() -> None:
        address, (listening,) = listen("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(Noting, sock=listening)
        async with server:
            reader, writer = await asyncio.open_connection(address.host, address.port)
            await reader.read()
            writer.close()

    asyncio.run(connect())
    assert Noting.no_delay != 0


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_literal_is_an_address(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with ServerThread(SampleApp(), ServeSettings(host=host)) as server:
        assert server.url.startswith("http://[::1]:")
        with RawConnection("::1", server.address.port) as client:
            assert client.ask("/health", host=server.url.removeprefix("http://")).status == 200


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8"), ("::", "http://[::1]:8"), ("::1", "http://[::1]:8")],
)
def test_the_address_for_a_client_is_one_it_can_call(host: str, url: str) -> None:
    assert Address(host, 8).url == url


def failing(kind: Callable[[], Exception]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise kind()

    return app


def test_what_the_lifespan_raises_is_what_serve_raises() -> None:
    with pytest.raises(ModelNotFound, match="no such model"):
        serve(failing(lambda: ModelNotFound("no such model")), ServeSettings(port=0))
    with (
        pytest.raises(ModelNotFound, match="no such model"),
        ServerThread(failing(lambda: ModelNotFound("no such model"))),
    ):
        pass


def test_a_lifespan_that_says_it_failed_is_an_error_in_one_line() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "Traceback\n  x\nthe disk is full\n"})

    with pytest.raises(Exception, match="did not start: the disk is full"):
        serve(app, ServeSettings(port=0))


def test_leaving_the_thread_ends_the_lifespan_and_frees_the_port() -> None:
    with served() as it:
        address = it.server.address
    it.app.wait_for("down")
    listen(address.host, address.port)[1][0].close()


def test_an_interrupt_while_it_loads_ends_the_loading() -> None:
    code = """
import asyncio, sys
from edgeinfer.server.serving import ServeSettings, serve

async def app(scope, receive, send):
    await receive()
    print("loading", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("let go", flush=True)

try:
    serve(app, ServeSettings(port=0), lambda address: print("started"))
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (130, "let go\n", "")
