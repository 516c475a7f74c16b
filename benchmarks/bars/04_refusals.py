"""What a stranger must not get: each refusal as documented, with the defaults, on a real socket."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks.alternate import table
from benchmarks.endpoint import EndpointProcess
from benchmarks.model_files import starter_q4_0
from benchmarks.raw_http import Answer, RawConnection
from benchmarks.verdict import Bar, run_bar

KEY = "the-key-of-this-bar"
CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "Hello"}
BODY = json.dumps({"messages": [HELLO], "max_tokens": 1}).encode()
PIECE = bytes(1 << 20)
LARGE = 100  # pieces
MOST_GROWTH = 40 << 20  # the largest body that is taken, twice, and some room
MESSAGES = 10_000
DEPTH = 100_000
APP_ORIGIN = "app://obsidian.md"


@dataclass(frozen=True)
class Refusal:
    """ask: speaks on a connection of its own and returns what was answered."""

    name: str
    status: int
    code: str | None
    ask: Callable[[RawConnection], Answer]


def _ask(**headers: str | None) -> Callable[[RawConnection], Answer]:
    return lambda client: client.ask(CHAT, BODY, **{"x_api_key": KEY, **headers})


def _body(value: object) -> Callable[[RawConnection], Answer]:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda client: client.ask(CHAT, content, x_api_key=KEY)


def _nested_schema(depth: int) -> object:
    schema: dict[str, object] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}


def _image() -> object:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    return {"messages": [{"role": "user", "content": [part]}]}


def _preflight(client: RawConnection) -> Answer:
    asked = {"origin": "https://evil.example", "access_control_request_method": "POST"}
    return client.ask(CHAT, method="OPTIONS", **asked)


def _large(chunked: bool) -> Callable[[RawConnection], Answer]:
    def ask(client: RawConnection) -> Answer:
        length = (
            {"transfer_encoding": "chunked"} if chunked else {"content_length": str(LARGE * len(PIECE))}
        )
        client.send(client.head(CHAT, method="POST", x_api_key=KEY, **length))
        piece = b"%x\r\n%s\r\n" % (len(PIECE), PIECE) if chunked else PIECE
        client.send_until_refused(piece, LARGE)
        return client.answer()

    return ask


def _slow_head(client: RawConnection) -> Answer:
    client.drip(b"POST /v1/chat/completions HTTP/1.1\r\nX-Slow: " + b"a" * 100_000, pause_s=0.1)
    return client.answer()


def _slow_head_of_a_second_request(client: RawConnection) -> Answer:
    client.ask(CHAT, BODY, x_api_key=KEY)
    return _slow_head(client)


def _slow_body(client: RawConnection) -> Answer:
    client.send(client.head(CHAT, method="POST", x_api_key=KEY, content_length="100000"))
    client.drip(b" " * 100_000, pause_s=0.1)
    return client.answer()


def _endless_header(client: RawConnection) -> Answer:
    client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Endless: ")
    client.send_until_refused(b"a" * len(PIECE), LARGE)
    return client.answer()


def _garbage(client: RawConnection) -> Answer:
    client.send(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
    return client.answer()


REFUSALS = (
    Refusal("foreign Host", 403, "host_not_allowed", _ask(host="evil.example")),
    Refusal("foreign Host, our port", 403, "host_not_allowed", _ask(host="evil.example:11435")),
    Refusal("no Host", 403, "host_not_allowed", _ask(host=None)),
    Refusal("foreign Origin", 403, "origin_not_allowed", _ask(origin="https://evil.example")),
    Refusal("Origin null", 403, "origin_not_allowed", _ask(origin="null")),
    Refusal("preflight of a foreign Origin", 403, "origin_not_allowed", _preflight),
    Refusal("no key", 401, "invalid_api_key", _ask(x_api_key=None)),
    Refusal("wrong key", 401, "invalid_api_key", _ask(x_api_key="wrong")),
    Refusal("wrong bearer", 401, "invalid_api_key", _ask(x_api_key=None, authorization="Bearer wrong")),
    Refusal("100 MB by Content-Length", 413, "request_too_large", _large(chunked=False)),
    Refusal("100 MB in chunks", 413, "request_too_large", _large(chunked=True)),
    Refusal(f"{MESSAGES:,} messages", 400, None, _body({"messages": [HELLO] * MESSAGES})),
    Refusal("a depth bomb", 400, None, _body(b"[" * DEPTH + b"]" * DEPTH)),
    Refusal(
        "a depth bomb in a field", 400, None, _body(b'{"messages":' + b"[" * DEPTH + b"]" * DEPTH + b"}")
    ),
    Refusal(
        "a deep schema",
        400,
        "unsupported_schema",
        _body({"messages": [HELLO], "response_format": _nested_schema(200)}),
    ),
    Refusal("an image", 400, None, _body(_image())),
    Refusal("an unknown model", 404, "model_not_found", _body({"model": "other", "messages": [HELLO]})),
    Refusal("endless header", 431, "headers_too_large", _endless_header),
    Refusal("garbage", 400, "malformed_request", _garbage),
    Refusal("a head byte by byte", 408, "request_timeout", _slow_head),
    Refusal("a second head byte by byte", 408, "request_timeout", _slow_head_of_a_second_request),
    Refusal("a body byte by byte", 408, "request_timeout", _slow_body),
)


def measure(bar: Bar) -> None:
    rows = [("refusal", "status", "code", "after s", "memory grew")]
    model = bar.options.model or starter_q4_0()
    with EndpointProcess([str(model), "--api-key", KEY]) as server:
        process = psutil.Process(server.pid)
        address = urlsplit(server.url)

        def connect() -> RawConnection:
            return RawConnection(address.hostname or "", address.port or 0)

        def is_served(**headers: str) -> bool:
            with connect() as client:
                return client.ask(CHAT, BODY, x_api_key=KEY, **headers).status == 200

        bar.require("a right request is answered", is_served())
        bar.require(f"so is one of {APP_ORIGIN}", is_served(origin=APP_ORIGIN))
        failed = []
        growth = 0
        for refusal in REFUSALS:
            begin = time.monotonic()
            with _peak_growth(process) as peak, connect() as client:
                got = _outcome(refusal, client)
            grew = peak[0]
            growth = max(growth, grew)
            seconds = time.monotonic() - begin
            rows.append((refusal.name, got[0], got[1], f"{seconds:.1f}", f"{grew / 1e6:.1f} MB"))
            bar.details[refusal.name] = {
                "status": got[0],
                "code": got[1],
                "seconds": seconds,
                "rss": grew,
            }
            if got != (str(refusal.status), str(refusal.code)):
                failed.append(refusal.name)
        bar.say(table(rows))
        refused = len(REFUSALS) - len(failed)
        bar.require(
            f"{refused} of {len(REFUSALS)} are refused as documented"
            + "".join(f"; not: {n}" for n in failed),
            not failed,
        )
        bar.require(
            f"memory grew by {growth / 1e6:.0f} MB at most (< {MOST_GROWTH / 1e6:.0f})",
            growth < MOST_GROWTH,
        )
        bar.require("a right request is still answered", is_served())


@contextmanager
def _peak_growth(process: psutil.Process) -> Iterator[list[int]]:
    """Its only element becomes the most bytes the process grew by, looked at every 5 ms."""
    before = process.memory_info().rss
    most = [0]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        is_over.set()
        watcher.join()


def _outcome(refusal: Refusal, client: RawConnection) -> tuple[str, str]:
    try:
        answer = refusal.ask(client)
        return str(answer.status), str(answer.code)
    except (OSError, EOFError) as error:
        return "none", f"connection lost: {error}"
    except (ValueError, KeyError, TypeError) as error:
        return "none", f"not in OpenAI's shape: {error!r}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the starter's Q4_0")


if __name__ == "__main__":
    about = "what is refused at the door of the HTTP endpoint"
    sys.exit(run_bar(__file__, about, measure, add_options))
