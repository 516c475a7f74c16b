"""What the guard lets through and what it refuses, on a real socket."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import psutil
import pytest

from edgeinfer.server.api_keys import ApiKeys
from edgeinfer.server.guard import GuardSettings
from tests.server.sample_endpoint import GUARD, Served, served

APP = "http://localhost:5173"
CORS = "access-control-allow-origin"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Served]:
    with served() as it:
        yield it


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with served(replace(GUARD, keys=ApiKeys(["right", "other"]))) as it:
        yield it


# Host


@pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "127.0.0.1", "[::1]:80", "10.0.0.1:11435"])
def test_a_host_that_is_ours_is_answered(endpoint: Served, host: str) -> None:
    with endpoint.connect() as client:
        assert client.ask("/health", host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:11435", "localhost.evil.example", "a b", "", "localhost:x", None],
)
def test_a_host_that_is_not_ours_is_refused(endpoint: Served, host: str | None) -> None:
    endpoint.app.seen.queue.clear()
    with endpoint.connect() as client:
        answer = client.ask("/health", host=host)
    assert (answer.status, answer.code) == (403, "host_not_allowed")
    assert answer.error["type"] == "permission_error"
    assert endpoint.app.seen.empty()


def test_two_hosts_are_refused(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n")
        assert client.answer().code == "host_not_allowed"


def test_a_foreign_host_says_what_to_do(endpoint: Served) -> None:
    with endpoint.connect() as client:
        message = client.ask("/health", host="evil.example").error["message"]
    assert "evil.example" in message and "--allow-host" in message


def test_a_given_host_is_answered() -> None:
    with served(replace(GUARD, allow_hosts=("llm.example.com",))) as it, it.connect() as client:
        assert client.ask("/health", host="llm.example.com:443").status == 200


def test_the_authority_of_an_absolute_uri_counts_instead_of_host(endpoint: Served) -> None:
    with endpoint.connect() as client:
        assert client.ask("http://evil.example/health", host="localhost").code == "host_not_allowed"
    with endpoint.connect() as client:
        answer = client.ask("http://localhost:5/echo?x=1", host="evil.example")
        assert answer.status == 200
        assert json.loads(answer.body)["path"] == "/echo"
        assert client.ask("http://localhost", host="x").status == 404  # the path is /


# Origin


@pytest.mark.parametrize("origin", [APP, "app://obsidian.md", "vscode-webview://1a2b", "http://[::1]:1"])
def test_an_allowed_origin_is_echoed(endpoint: Served, origin: str) -> None:
    with endpoint.connect() as client:
        answer = client.ask("/health", origin=origin)
    assert answer.status == 200
    assert answer.headers[CORS] == origin
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert "Origin" in answer.headers["vary"]


def test_the_endpoints_own_pages_may_call_it(endpoint: Served) -> None:
    with endpoint.connect() as client:
        same = {"host": "192.168.7.7:11435", "origin": "http://192.168.7.7:11435"}
        assert client.ask("/health", **same).status == 200
        other = {"host": "192.168.7.7:11435", "origin": "http://192.168.7.8:11435"}
        assert client.ask("/health", **other).status == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "file://", "http://localhost.evil.example"]
)
@pytest.mark.parametrize("path", ["/health", "/echo"])
def test_a_foreign_origin_is_refused_and_not_only_hidden(
    endpoint: Served, origin: str, path: str
) -> None:
    with endpoint.connect() as client:
        answer = client.ask(path, b"{}" if path == "/echo" else None, origin=origin)
    assert (answer.status, answer.code) == (403, "origin_not_allowed")
    assert CORS not in answer.headers
    assert "--allow-origin" in answer.error["message"]


def test_two_origins_are_refused(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(
            f"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: {APP}\r\nOrigin: {APP}\r\n\r\n".encode()
        )
        assert client.answer().code == "origin_not_allowed"


def test_no_origin_gets_no_cors_headers(endpoint: Served) -> None:
    with endpoint.connect() as client:
        answer = client.ask("/health")
    assert CORS not in answer.headers
    assert answer.headers["vary"] == "Origin"


def test_errors_can_be_read_by_an_allowed_page(locked: Served) -> None:
    with locked.connect() as client:
        answer = client.ask("/echo", origin=APP)
    assert answer.status == 401
    assert answer.headers[CORS] == APP


def test_a_preflight_is_granted_without_a_key(locked: Served) -> None:
    with locked.connect() as client:
        answer = client.ask(
            "/v1/chat/completions",
            method="OPTIONS",
            origin="app://obsidian.md",
            access_control_request_method="POST",
            access_control_request_headers="Authorization, content-type,x-stainless-os, b@d, "
            + "x" * 99,
            access_control_request_private_network="true",
        )
    assert answer.status == 204
    assert answer.headers[CORS] == "app://obsidian.md"
    assert (
        answer.headers["access-control-allow-headers"] == "authorization, content-type, x-stainless-os"
    )
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert int(answer.headers["access-control-max-age"]) > 0
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert "content-length" not in answer.headers and "transfer-encoding" not in answer.headers


def test_a_preflight_is_not_told_of_private_networks_unasked(endpoint: Served) -> None:
    with endpoint.connect() as client:
        answer = client.ask("/echo", method="OPTIONS", origin=APP, access_control_request_method="POST")
        assert answer.status == 204
        assert "access-control-allow-private-network" not in answer.headers
        assert "access-control-allow-headers" not in answer.headers
        assert client.ask("/health").status == 200  # on the same connection


def test_a_foreign_preflight_is_refused(endpoint: Served) -> None:
    with endpoint.connect() as client:
        answer = client.ask(
            "/echo",
            method="OPTIONS",
            origin="https://evil.example",
            access_control_request_method="POST",
        )
    assert answer.status == 403
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_options_without_an_origin_is_no_way_around_the_key(locked: Served) -> None:
    with locked.connect() as client:
        assert client.ask("/echo", method="OPTIONS", access_control_request_method="POST").status == 401
        assert client.ask("/echo", method="OPTIONS", origin=APP).status == 401


def test_with_a_star_every_page_is_answered_and_none_with_credentials() -> None:
    with served(replace(GUARD, allow_origins=("*",))) as it, it.connect() as client:
        for origin in ("https://any.example", "null", APP):
            answer = client.ask("/cors", origin=origin)
            assert answer.status == 200
            assert answer.headers[CORS] == "*"
            assert "access-control-allow-credentials" not in answer.headers


def test_the_apps_own_cors_headers_do_not_count(endpoint: Served) -> None:
    with endpoint.connect() as client:
        assert CORS not in client.ask("/cors").headers
        assert client.ask("/cors", origin=APP).headers[CORS] == APP


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer right"},
        {"authorization": "bearer  other "},
        {"x_api_key": "right"},
        {"authorization": "Bearer placeholder", "x_api_key": "right"},
        {"authorization": "Bearer right", "x_api_key": "placeholder"},
    ],
)
def test_a_right_key_opens(locked: Served, headers: dict[str, str]) -> None:
    with locked.connect() as client:
        assert client.ask("/echo", **headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer righ"},
        {"authorization": "Bearer right other"},
        {"x_api_key": "Bearer right"},
        {"authorization": "Bearer wrong", "x_api_key": "wrong"},
        {"authorization": "Bearer r\xefght"},
    ],
)
def test_a_wrong_key_is_refused(
    locked: Served, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with locked.connect() as client:
        answer = client.ask("/echo", **headers)
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert answer.error["type"] == "authentication_error"
    assert "wrong" in answer.error["message"]
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert not any(value in caplog.text for value in headers.values())


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer "}, {"authorization": "Basic right"}, {"x_api_key": ""}]
)
def test_a_missing_key_is_told_apart(locked: Served, headers: dict[str, str]) -> None:
    with locked.connect() as client:
        answer = client.ask("/echo", **headers)
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert "has none" in answer.error["message"]
    assert answer.headers["www-authenticate"] == 'Bearer realm="edgeinfer"'


def test_health_alone_is_open(locked: Served) -> None:
    with locked.connect() as client:
        assert client.ask("/health").status == 200
        assert client.ask("/health?x=1").status == 200
        for path in ("/health/", "/healthy", "/x/../health", "//health", "/HEALTH", "/"):
            assert client.ask(path).status == 401, path


def test_a_foreign_host_is_refused_before_the_key_is_looked_at(locked: Served) -> None:
    with locked.connect() as client:
        assert client.ask("/echo", host="evil.example", x_api_key="right").status == 403


# Bodies


def test_a_body_at_the_limit_is_taken(endpoint: Served) -> None:
    with endpoint.connect() as client:
        answer = client.ask("/echo", bytes(GUARD.max_body_bytes))
        assert json.loads(answer.body)["size"] == GUARD.max_body_bytes
        assert client.ask("/health").status == 200  # on the same connection


def test_a_body_over_the_limit_is_refused_by_its_length_alone(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/echo", method="POST", content_length=str(GUARD.max_body_bytes + 1)))
        answer = client.answer()
        assert (answer.status, answer.code) == (413, "request_too_large")
        assert answer.headers["connection"] == "close"
        client.half_close()
        assert client.is_closed()


def test_who_asks_before_sending_is_told_before_sending(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/echo", method="POST", content_length="999999", expect="100-continue"))
        assert client.answer_head()[0] == 413
    with endpoint.connect() as client:
        client.send(client.head("/echo", method="POST", content_length="2", expect="100-continue"))
        assert client.answer_head()[0] == 100
        client.send(b"{}")
        assert client.answer().status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes_are_refused_and_leave_no_trace_in_memory(chunked: bool) -> None:
    piece = bytes(1 << 20)
    framed = b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece
    length = {"transfer_encoding": "chunked"} if chunked else {"content_length": str(100 << 20)}
    with served(GuardSettings()) as it, it.connect() as client:
        assert client.ask("/health").status == 200
        process = psutil.Process()
        before = most = process.memory_info().rss
        client.send(client.head("/echo", method="POST", **length))
        for _ in range(100):
            if client.send_until_refused(framed, 1) == 0:
                break
            most = max(most, process.memory_info().rss)
        answer = client.answer()
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert most - before < 24 << 20  # less than twice the limit, of which the app may hold one


def test_a_chunked_body_is_counted_while_it_comes(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/echo", method="POST", transfer_encoding="chunked"))
        client.send(b"%x\r\n" % (GUARD.max_body_bytes + 1) + bytes(GUARD.max_body_bytes + 1))
        assert client.answer().status == 413
    endpoint.app.wait_for("left while sending")


def test_bodies_that_are_too_much_together_are_refused_until_others_are_answered() -> None:
    body = bytes(GUARD.max_body_bytes)
    with (
        served(replace(GUARD, max_bodies_bytes=2 * len(body))) as it,
        ExitStack() as clients,
    ):
        waiting = [clients.enter_context(it.connect()) for _ in range(2)]
        for client in waiting:
            client.send_request("/think", body)
            it.app.wait_for("thinking")
        with it.connect() as client:
            answer = client.ask("/echo", body)
        assert (answer.status, answer.code) == (503, "unavailable")
        assert answer.headers["retry-after"] == "1"
        waiting[0].close()
        it.app.wait_for("left")
        for _ in range(5):  # whose own bytes are given back each time
            with it.connect() as client:
                assert client.ask("/echo", body).status == 200


@pytest.mark.parametrize("framing", [{"content_length": "10"}, {"transfer_encoding": "chunked"}])
def test_a_body_that_does_not_come_is_given_up(endpoint: Served, framing: dict[str, str]) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/echo", method="POST", **framing))
        answer = client.answer()
        assert (answer.status, answer.code) == (408, "request_timeout")
        client.half_close()
        assert client.is_closed()
    endpoint.app.wait_for("left while sending")


def test_a_body_that_drips_is_given_up_all_the_same(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/echo", method="POST", content_length="100000"))
        client.drip(b"x" * 100_000)
        assert client.answer().code == "request_timeout"


def test_an_answer_before_the_bodys_end_closes_the_connection(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/unread", method="POST", content_length="5"))
        answer = client.answer()
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        client.send(b"hello")
        assert client.is_closed()


# Failures and ids


def test_what_fails_inside_is_a_500_whose_reason_is_in_the_log(
    endpoint: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with endpoint.connect() as client:
        answer = client.ask("/fail")
        assert (answer.status, answer.code) == (500, "internal_error")
        assert "is for the log" not in answer.body.decode()
        assert "Traceback" not in answer.body.decode()
        assert client.ask("/health").status == 200  # on the same connection
    request_id = answer.headers["x-request-id"]
    assert answer.error["message"].endswith(request_id)
    (record,) = [record for record in caplog.records if f"{request_id} failed" in record.getMessage()]
    assert record.exc_info is not None
    assert "the reason is for the log" in caplog.text


def test_what_fails_in_the_midst_of_an_answer_closes_the_connection(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send_request("/fail-midway")
        assert client.answer_head()[0] == 200
        chunks = client.chunks()
        assert next(chunks) == b"some\n"
        with pytest.raises(EOFError):
            next(chunks)


def test_an_api_error_is_answered_as_it_says(endpoint: Served) -> None:
    with endpoint.connect() as client:
        error = {
            "message": "n is too large",
            "type": "invalid_request_error",
            "param": "n",
            "code": "bad_n",
        }
        assert client.ask("/refuse").error == error
        too_long = client.ask("/too-long")
    assert (too_long.status, too_long.code) == (400, "context_length_exceeded")


def test_a_sane_request_id_is_kept_and_another_replaced(endpoint: Served) -> None:
    with endpoint.connect() as client:
        answer = client.ask("/echo", x_request_id="My-id.1:2")
        assert answer.headers["x-request-id"] == "My-id.1:2"
        assert json.loads(answer.body)["request_id"] == "My-id.1:2"
        made = set()
        for bad in (None, "", "a b", "x" * 129, "a\u00e9"):
            made.add(client.ask("/health", x_request_id=bad).headers["x-request-id"])
        assert len(made) == 5
        assert all(name.startswith("req_") for name in made)
        assert client.ask("/health", host="evil.example").headers["x-request-id"].startswith("req_")


def test_the_access_log_has_no_query_and_no_keys(
    locked: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="edgeinfer.access")
    with locked.connect() as client:
        client.ask("/echo?key=right", x_api_key="right", x_request_id="look-for-this")
    with locked.connect() as client:
        client.ask("/health")  # what was answered before is logged by now
    (line,) = [
        record.getMessage() for record in caplog.records if "look-for-this" in record.getMessage()
    ]
    assert '"GET /echo" 200' in line
    assert "right" not in caplog.text
