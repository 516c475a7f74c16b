"""What is refused before there is a request, and what a connection outlives, on a real socket."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from benchmarks.raw_http import RawConnection
from edgeinfer.server.serving import allow_files
from tests.server.sample_endpoint import GUARD, LIMITS, Served, served

HEAD = b"Host: localhost\r\n"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Served]:
    with served() as it:
        yield it
        with it.connect() as client:  # whatever the tests did to it
            assert client.ask("/health").status == 200


def refused(client: RawConnection, status: int, code: str) -> None:
    answer = client.answer()
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["connection"] == "close"
    client.half_close()
    assert client.is_closed()


# Slow


def test_a_head_that_does_not_come_to_its_end_is_refused(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(b"GET /health HTTP/1.1\r\nHost: loc")
        refused(client, 408, "request_timeout")


def test_a_head_that_drips_is_refused_all_the_same(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.drip(b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 100_000)
        refused(client, 408, "request_timeout")


def test_on_a_kept_connection_a_dripping_head_is_refused_too(endpoint: Served) -> None:
    with endpoint.connect() as client:
        for _ in range(2):
            assert client.ask("/health").status == 200
        client.drip(b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 100_000)
        refused(client, 408, "request_timeout")


def test_a_connection_that_says_nothing_is_closed_without_a_word(endpoint: Served) -> None:
    with endpoint.connect() as client:
        assert client.is_closed()


def test_empty_lines_are_no_way_to_stay(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.drip(b"\r\n" * 100_000)
        assert client.is_closed()


def test_a_kept_connection_is_closed_after_its_time() -> None:
    with served(limits=replace(LIMITS, keep_alive_s=0.2)) as it, it.connect() as client:
        assert client.ask("/health").status == 200
        assert client.is_closed()


def test_a_request_may_take_longer_to_answer_than_to_send(endpoint: Served) -> None:
    with (
        served(limits=replace(LIMITS, head_timeout_s=0.3, keep_alive_s=0.3)) as it,
        it.connect() as client,
    ):
        client.send_request("/three")
        client.send(b"GET /health HT")  # the next one's head, which has to wait
        assert client.answer().body.endswith(b"done\n")


def test_who_takes_nothing_of_the_answer_is_let_go() -> None:
    with served(limits=replace(LIMITS, write_stall_s=0.3)) as it, it.connect() as client:
        client.send_request("/flood")
        it.app.wait_for("left")


# Large


def test_an_endless_header_line_is_refused(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(b"GET /health HTTP/1.1\r\n" + HEAD + b"X-A: ")
        client.send_until_refused(b"a" * 65536, 64)
        refused(client, 431, "headers_too_large")


def test_endless_headers_are_refused(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(b"GET /health HTTP/1.1\r\n" + HEAD)
        client.send_until_refused(b"X-A: b\r\n" * 1000, 500)
        refused(client, 431, "headers_too_large")


@pytest.mark.parametrize(
    ("lines", "status", "code"),
    [
        (b"GET /health HTTP/1.1\r\n" + HEAD + b"X: y\r\n" * 200, 431, "headers_too_large"),
        (
            b"GET /health HTTP/1.1\r\n" + HEAD + b"X: " + b"y" * 70_000 + b"\r\n",
            431,
            "headers_too_large",
        ),
        (b"GET /health?" + b"y" * 9_000 + b" HTTP/1.1\r\n" + HEAD, 414, "url_too_long"),
    ],
)
def test_a_head_that_comes_whole_is_bounded_too(
    endpoint: Served, lines: bytes, status: int, code: str
) -> None:
    with endpoint.connect() as client:
        client.send(lines + b"\r\n")
        refused(client, status, code)


def test_a_head_within_the_bounds_is_answered(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(b"GET /echo HTTP/1.1\r\n" + HEAD + b"X-Long: " + b"y" * 60_000 + b"\r\n\r\n")
        sent = dict(json.loads(client.answer().body)["headers"])
        assert len(sent["x-long"]) == 60_000
        client.send(b"GET /health?" + b"y" * 8_000 + b" HTTP/1.1\r\n" + HEAD + b"\r\n")
        assert client.answer().status == 200


def test_an_endless_trailer_is_refused(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/think", method="POST", transfer_encoding="chunked"))
        client.send(b"2\r\n{}\r\n0\r\nX-A: ")
        client.send_until_refused(b"a" * 65536, 64)
        refused(client, 431, "headers_too_large")


def test_trailers_are_dropped_and_do_not_reach_the_next_request(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/echo", method="POST", transfer_encoding="chunked"))
        client.send(b"2\r\n{}\r\n0\r\nX-Smuggled: 1\r\nX-Api-Key: k\r\n\r\n")
        first = json.loads(client.answer().body)
        second = json.loads(client.ask("/echo").body)
    assert first["size"] == 2
    assert "smuggled" not in str(first) + str(second)
    assert "x-api-key" not in str(first) + str(second)


# Malformed


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\x03\xff\xfe",
        b"hello there\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/9.9\r\n" + HEAD + b"\r\n",
        b"get /health HTTP/1.1\r\n" + HEAD + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX Y: z\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n folded: z\r\n\r\n",
        b"GET /he\x01alth HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_garbage_is_a_400_in_the_usual_shape(endpoint: Served, garbage: bytes) -> None:
    with endpoint.connect() as client:
        client.send(garbage)
        refused(client, 400, "malformed_request")


def test_a_tls_handshake_is_told_to_use_http(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100))
        assert "not https" in client.answer().error["message"]


@pytest.mark.parametrize("line", [b"GET /health", b"GET /health HTTP/0.9", b"GET /health HTTP/2.0"])
def test_other_versions_of_http_are_refused(endpoint: Served, line: bytes) -> None:
    with endpoint.connect() as client:
        client.send(line + b"\r\nHost: localhost\r\n\r\n")
        refused(client, 505, "http_version_not_supported")


def test_a_question_about_the_whole_server_goes_to_the_app(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert json.loads(client.answer().body) == {"missing": "*"}


def test_it_is_no_proxy(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        refused(client, 405, "method_not_allowed")


def test_garbage_behind_a_request_does_not_get_into_its_answer(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send_request("/stream")
        assert client.answer_head()[0] == 200
        client.send(b"\x00\x00garbage\r\n\r\n")
        with pytest.raises(EOFError):
            for chunk in client.chunks():
                assert chunk == b"tick\n"
    endpoint.app.wait_for("left")


# Other ways to speak HTTP


def test_http_1_0_is_answered_and_closed(endpoint: Served) -> None:
    for path, body in (("/three", b"0\n1\n2\ndone\n"), ("/health", b'{"status": "ok"}')):
        with endpoint.connect() as client:
            client.send(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            answer = client.answer()
            assert (answer.status, answer.body) == (200, body)
            assert "transfer-encoding" not in answer.headers
            assert client.is_closed()
    with endpoint.connect() as client:
        client.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.answer().code == "host_not_allowed"


def test_pipelined_requests_are_answered_in_order(endpoint: Served) -> None:
    with endpoint.connect() as client:
        paths = [f"/echo?{number}" for number in range(8)]
        client.send(b"".join(client.head(path, b"{}" * n) + b"{}" * n for n, path in enumerate(paths)))
        sizes = [json.loads(client.answer().body)["size"] for _ in paths]
    assert sizes == [2 * n for n in range(8)]


def test_pipelining_without_end_is_cut_off(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/stream") + client.head("/health") * 1000)
        with pytest.raises((EOFError, ConnectionError)):
            client.answer()
    endpoint.app.wait_for("left")


def test_an_offer_of_http_2_does_not_lose_the_body(endpoint: Served) -> None:
    offer = {
        "connection": "Upgrade, HTTP2-Settings",
        "upgrade": "h2c",
        "http2_settings": "AAMAAABkAAQAAP__",
    }
    with endpoint.connect() as client:
        answer = client.ask("/echo", b"x" * 1000, **offer)
        assert json.loads(answer.body)["size"] == 1000
        client.send(client.head("/echo", b"x" * 10, **offer))
        client.send(b"x" * 10)
        assert json.loads(client.answer().body)["size"] == 10
        websocket = {"connection": "Upgrade", "upgrade": "websocket", "sec_websocket_version": "13"}
        assert client.ask("/health", **websocket).status == 200


def test_a_head_request_has_no_body(endpoint: Served) -> None:
    with endpoint.connect() as client:
        assert client.ask("/health", method="HEAD").status == 200
        assert client.ask("/health").body == b'{"status": "ok"}'


# Many


def test_beyond_the_limit_of_connections_there_is_a_503_and_room_again_afterwards() -> None:
    allow_files(2000)
    with served(limits=replace(LIMITS, max_connections=512, head_timeout_s=60.0)) as it:
        with ExitStack() as open_ones:
            clients = [open_ones.enter_context(it.connect()) for _ in range(600)]
            for client in clients[:512]:
                client.send_request("/health")
            assert [client.answer().status for client in clients[:512]] == [200] * 512
            for client in clients[512:]:
                answer = client.answer()
                assert (answer.status, answer.code) == (503, "unavailable")
                assert answer.headers["retry-after"] == "1"
            assert [client.ask("/health").status for client in clients[:512]] == [200] * 512
        with it.connect() as client:
            while client.ask("/health").status == 503:  # until it has noticed that all have gone
                client = it.connect()
            client.close()


# Leaving


@pytest.mark.parametrize("path", ["/think", "/stream"])
@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
def test_the_app_learns_that_its_client_left(endpoint: Served, path: str, how: str) -> None:
    with endpoint.connect() as client:
        client.send_request(path, b"{}")
        endpoint.app.wait_for(path)
        if path == "/stream":
            client.answer_head()
        if how == "half-close":
            client.half_close()
        elif how == "reset":
            client.reset()
        else:
            client.close()
        endpoint.app.wait_for("left")


def test_with_a_second_request_sent_ahead_the_first_one_learns_it_too(endpoint: Served) -> None:
    endpoint.app.seen.queue.clear()
    with endpoint.connect() as client:
        client.send(client.head("/stream") + client.head("/never"))
        client.answer_head()
        client.reset()
        endpoint.app.wait_for("left")
    with endpoint.connect() as client:
        client.ask("/health")
    assert "/never" not in list(endpoint.app.seen.queue)


def test_who_leaves_in_the_midst_of_sending_is_noticed(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/echo", method="POST", content_length="1000") + b"{")
        endpoint.app.wait_for("/echo")
    endpoint.app.wait_for("left while sending")


def test_refusals_are_in_the_access_log(endpoint: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="edgeinfer.access")
    with endpoint.connect() as client:
        client.send(b"garbage\r\n\r\n")
        client.answer()
    end = time.monotonic() + 20  # the answer may be here before the line is written
    while "refused 400" not in caplog.text and time.monotonic() < end:
        time.sleep(0.01)
    assert "refused 400" in caplog.text


def test_many_clients_that_reset_leave_it_unharmed(endpoint: Served) -> None:
    for number in range(50):
        with endpoint.connect() as client:
            client.send(client.head("/echo", method="POST", content_length="9")[: 20 + number])
            client.reset()
    with endpoint.connect() as client:
        assert client.ask("/echo", b"{}").status == 200


def test_the_limits_of_the_body_hold_for_any_number_of_tiny_chunks(endpoint: Served) -> None:
    with endpoint.connect() as client:
        client.send(client.head("/echo", method="POST", transfer_encoding="chunked"))
        client.send_until_refused(b"1\r\nx\r\n" * 1000, GUARD.max_body_bytes // 1000 + 50)
        assert client.answer().status == 413
