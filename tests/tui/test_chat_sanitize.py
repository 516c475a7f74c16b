"""Nothing a model says reaches the terminal as a command."""

from __future__ import annotations

import pytest
from chat_driver import Drive
from fake_client import FakeClient, Script

from edgeinfer_tui.sanitize import neutralise


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b]0;title\x07\x1b[2J", "]0;title[2J"),
        ("\x9b31mred\x90q\x9c", "31mredq"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("bell\x07 back\x08 del\x7f nul\x00", "bell back del nul"),
        ("user\u202egnp.exe\u2066x\u2069", "usergnp.exex"),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        ("line\u2028separators\u2029here\x85there", "line\nseparators\nherethere"),
        ("日本語 👩‍👩‍👧 naïve עברית", "日本語 👩‍👩‍👧 naïve עברית"),
    ],
)
def test_control_characters_are_taken_out_and_text_is_kept(text: str, shown: str) -> None:
    assert neutralise(text) == shown


async def test_escape_sequences_in_an_answer_never_reach_the_terminal(drive: Drive) -> None:
    evil = ["text \x1b", "[31mred \x1b]52;c;aGk=\x07", "`\x1b[2J`\n\n```\n\x1b[5;5Hcode\x9b\n```\n"]
    async with drive(FakeClient(Script(evil, delay_s=0.04))) as driver:
        await driver.ready()
        await driver.ask("go")
        await driver.answered()
        assert "[5;5Hcode" in driver.screen_text
        controls = {c for c in driver.screen_text if not c.isprintable() and c != "\n"}
        assert controls == set()


async def test_a_tab_in_code_takes_cells_and_is_not_sent_to_the_terminal(drive: Drive) -> None:
    async with drive(FakeClient(Script(["```\na\tb\n```\n\nx\ty"]))) as driver:
        await driver.ready()
        await driver.ask("go")
        await driver.answered()
        assert "\t" not in driver.screen_text
