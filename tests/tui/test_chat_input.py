"""Writing."""

from __future__ import annotations

import pytest
from chat_driver import Drive
from fake_client import FakeClient, Script
from textual import events

from edgeinfer.client import Message


@pytest.mark.parametrize("key", ["ctrl+j", "shift+enter", "alt+enter"])
async def test_a_newline_key_breaks_the_line_and_sends_nothing(drive: Drive, key: str) -> None:
    client = FakeClient()
    async with drive(client) as driver:
        await driver.ready()
        await driver.pilot.press("a", key, "b")
        assert driver.prompt.text == "a\nb"
        assert client.requests == []
        await driver.pilot.press("enter")
        await driver.answered()
    assert client.requests[0].messages == (Message("user", "a\nb"),)


async def test_blank_input_is_not_sent(drive: Drive) -> None:
    client = FakeClient()
    async with drive(client) as driver:
        await driver.ready()
        await driver.pilot.press("enter", "space", "enter", "ctrl+j", "enter")
        await driver.pilot.pause()
        assert driver.questions == []
    assert client.requests == []


async def test_a_pasted_text_is_inserted_not_sent(drive: Drive) -> None:
    client = FakeClient()
    async with drive(client) as driver:
        await driver.ready()
        driver.app.post_message(events.Paste("one\r\ntwo\rthree \x1b[31mred\x07\n"))
        await driver.pilot.pause()
        assert driver.prompt.text == "one\ntwo\nthree [31mred\n"
    assert client.requests == []


async def test_the_input_grows_to_eight_lines_and_no_further(drive: Drive) -> None:
    async with drive(FakeClient()) as driver:
        await driver.ready()
        assert driver.prompt.size.height == 1
        await driver.pilot.press("a", "ctrl+j", "b", "ctrl+j", "c")
        await driver.pilot.pause()
        assert driver.prompt.size.height == 3
        await driver.pilot.press(*["ctrl+j"] * 12)
        await driver.pilot.pause()
        assert driver.prompt.size.height == 8


async def test_up_in_an_empty_input_recalls_messages_and_down_comes_back(drive: Drive) -> None:
    async with drive(FakeClient()) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered(1)
        await driver.ask("two")
        await driver.answered(2)
        await driver.pilot.press("up")
        assert driver.prompt.text == "two"
        await driver.pilot.press("up")
        assert driver.prompt.text == "one"
        await driver.pilot.press("up")
        assert driver.prompt.text == "one"
        await driver.pilot.press("down", "down")
        assert driver.prompt.text == ""


async def test_up_in_a_text_being_written_moves_the_cursor_only(drive: Drive) -> None:
    async with drive(FakeClient()) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        await driver.pilot.press("a", "ctrl+j", "b", "up", "x")
        assert driver.prompt.text in ("ax\nb", "xa\nb")


async def test_markup_in_a_question_is_shown_as_written(drive: Drive) -> None:
    async with drive(FakeClient(Script(["[b]ok[/b] [link=x]"]))) as driver:
        await driver.ready()
        driver.prompt.load_text("[red]a[/] [b")
        await driver.pilot.press("enter")
        await driver.answered()
        assert "[red]a[/] [b" in driver.screen_text
        assert "[b]ok[/b] [link=x]" in driver.screen_text


async def test_ctrl_c_copies_a_selection_instead_of_quitting(drive: Drive) -> None:
    async with drive(FakeClient()) as driver:
        await driver.ready()
        await driver.write("word")
        await driver.pilot.press("shift+home", "ctrl+c")
        assert driver.app.clipboard == "word"
        assert driver.prompt.text == "word"
        assert driver.app.is_running
