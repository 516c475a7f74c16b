"""By which names the endpoint may be called, and whose pages may call it."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest

from edgeinfer.errors import UsageError
from edgeinfer.server.hosts import Authority, HostRules, OriginRules, is_loopback, parse_authority

OWN = socket.gethostname().lower().partition(".")[0]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.0.0.1:11435", "192.168.1.5:80", "[::1]:11435", "[fe80::1]", "0.0.0.0:1",
        "localhost", "LOCALHOST:11435", "localhost.", "localhost:", "chat.localhost:3000",
        "host.docker.internal:11435", OWN, f"{OWN}.local:11435", "llm.example.com",
        "LLM.example.com.:8080",
    ],
)  # fmt: skip
def test_the_machines_own_names_and_those_given_are_right(host: str) -> None:
    authority = parse_authority(host)
    assert authority is not None
    assert HostRules(["LLM.Example.com"]).allows(authority)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1.nip.io",
        "xlocalhost", "example.com", "a.llm.example.com", "127.1", "2130706433", "0x7f000001",
        "localhost..", "..localhost",
    ],
)  # fmt: skip
def test_any_other_name_is_wrong(host: str) -> None:
    authority = parse_authority(host)
    assert authority is None or not HostRules(["llm.example.com"]).allows(authority)


@pytest.mark.parametrize(
    "host",
    [
        "", " ", ":80", "a b", "localhost:x", "localhost:70000", "localhost:0", "user@localhost", "[::1",
        "::1", "[localhost]", "[127.0.0.1]", "localhost/", "http://localhost", "localhost,evil", "-a",
        "ä", "[::1%eth0]", "a" * 300, "localhost:８０",
    ],
)  # fmt: skip
def test_what_is_no_host_is_malformed(host: str) -> None:
    assert parse_authority(host) is None


@pytest.mark.parametrize("name", ["http://a.example", "a.example:80", "a b", "", "*"])
def test_an_allowed_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--allow-host"):
        HostRules([name])


HOST = Authority("192.168.1.5", 11435, ip_address("192.168.1.5"))


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost", "https://localhost:8443", "http://chat.localhost:3000", "http://tauri.localhost",
        "http://127.0.0.1:5173", "http://127.8.9.10", "http://[::1]:3000", "http://[::ffff:127.0.0.1]",
        "app://obsidian.md", "vscode-webview://0abc1def", "tauri://localhost", "capacitor://localhost",
        "http://192.168.1.5:11435", "https://chat.example.com", "chrome-extension://abcdef",
    ],
)  # fmt: skip
def test_pages_of_this_machine_and_known_programs_and_those_given_may_call(origin: str) -> None:
    rules = OriginRules(["https://Chat.example.com/", "chrome-extension://abcdef"])
    assert rules.allows(origin, HOST)


@pytest.mark.parametrize(
    "origin",
    [
        "null", "", "http://evil.example", "http://localhost.evil.example", "http://192.168.1.5",
        "http://192.168.1.5:8080", "http://192.168.1.6:11435", "https://chat.example.com:444",
        "http://chat.example.com", "app://evil", "file://", "http://localhost@evil.example", "*",
        "http://localhost/ http://evil.example", "http://localhost:80:80", "javascript://localhost",
        "http://127.0.0.1.nip.io", "moz-extension://abc", "http://localhost evil",
    ],
)  # fmt: skip
def test_no_other_page_may(origin: str) -> None:
    assert not OriginRules(["https://chat.example.com"]).allows(origin, HOST)


def test_an_origin_without_port_is_that_of_a_host_on_the_schemes_port() -> None:
    host = parse_authority("llm.example.com")
    assert host is not None
    assert OriginRules().allows("https://llm.example.com", host)
    assert OriginRules().allows("http://llm.example.com:80", host)
    assert not OriginRules().allows("http://llm.example.com:81", host)


def test_a_star_lets_every_page_in() -> None:
    rules = OriginRules(["*"])
    assert rules.allows_any
    assert rules.allows("https://anything.example", HOST)


@pytest.mark.parametrize(
    "origin", ["example.com", "null", "https://a.example/path", "https://*.example", ""]
)
def test_an_allowed_origin_that_is_none_is_refused(origin: str) -> None:
    with pytest.raises(UsageError, match="--allow-origin"):
        OriginRules([origin])


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False), ("", False),
        ("192.168.1.5", False), ("example.com", False), ("localhost.example.com", False),
        ("127.0.0.1.nip.io", False),
    ],
)  # fmt: skip
def test_only_loopback_is_this_machine_alone(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone
