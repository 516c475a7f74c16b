"""Where keys come from, and when there must be one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeinfer.errors import UsageError
from edgeinfer.server.api_keys import ApiKeys, check_binding, read_api_keys

KEYS = ApiKeys(["secret"])
NONE = ApiKeys()


def test_any_of_several_keys_opens_and_nothing_else_does() -> None:
    keys = ApiKeys(["one", "two"])
    assert len(keys) == 2
    assert keys.match(b"one") and keys.match(b"two")
    for other in (b"", b"on", b"onee", b"ONE", b"one two", "zwei-ä".encode()):
        assert not keys.match(other)
    assert not NONE.match(b"")


def test_a_key_is_nowhere_in_what_can_be_printed() -> None:
    assert "secret" not in repr(KEYS)
    assert "secret" not in repr(vars(KEYS))


def test_a_flag_beats_the_variable_and_the_file_counts_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbf# ours\r\nfrom-file\r\n\r\n  padded  \n")
    file.chmod(0o600)
    variable = {"EDGEINFER_API_KEY": "from-variable"}
    keys, warnings = read_api_keys(["from-flag"], file, variable)
    assert warnings == []
    assert [keys.match(key) for key in (b"from-flag", b"from-file", b"padded")] == [True] * 3
    assert not keys.match(b"from-variable") and not keys.match(b"# ours")
    assert read_api_keys((), None, variable)[0].match(b"from-variable")
    assert len(read_api_keys((), None, {})[0]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no key"), (b"# only\n\n", "no key"), (b"\xff\xfe", "not text"), (b"a b\n", "line 1")],
)
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        read_api_keys((), file, {})
    assert "a b" not in str(caught.value)


def test_a_file_that_is_not_there_or_has_no_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_api_keys((), tmp_path / "missing", {})
    with pytest.raises(UsageError):
        read_api_keys((), tmp_path, {})
    endless = tmp_path / "endless"
    endless.write_bytes(b"k" * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="larger than"):
        read_api_keys((), endless, {})


@pytest.mark.skipif(os.name == "nt", reason="no such modes on Windows")
def test_a_file_that_everybody_can_read_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key\n")
    file.chmod(0o644)
    keys, warnings = read_api_keys((), file, {})
    assert len(keys) == 1
    assert len(warnings) == 1 and "chmod 600" in warnings[0]


@pytest.mark.parametrize("key", ["", " ", "a b", "schlüssel", "a\nb", "k" * 2000])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(UsageError) as caught:
        ApiKeys([key])
    assert not key.strip() or key not in str(caught.value)


def test_an_empty_variable_is_a_forgotten_secret() -> None:
    with pytest.raises(UsageError, match="EDGEINFER_API_KEY"):
        read_api_keys((), None, {"EDGEINFER_API_KEY": " "})


def test_beyond_loopback_there_must_be_a_key_or_a_waiver() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "", "example.com"):
        with pytest.raises(UsageError, match="--no-api-key"):
            check_binding(host, NONE, waived=False)
        check_binding(host, NONE, waived=True)
        check_binding(host, KEYS, waived=False)
    check_binding("127.0.0.1", NONE, waived=False)
    check_binding("localhost", NONE, waived=False)


def test_every_web_page_and_the_whole_network_without_a_key_is_too_much() -> None:
    with pytest.raises(UsageError, match="--allow-origin"):
        check_binding("0.0.0.0", NONE, waived=True, allow_origins=("https://a.example", "*"))
    check_binding("0.0.0.0", KEYS, waived=False, allow_origins=("*",))
    check_binding("127.0.0.1", NONE, waived=False, allow_origins=("*",))
    check_binding("0.0.0.0", NONE, waived=True, allow_origins=("https://a.example",))
