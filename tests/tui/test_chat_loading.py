"""From the start of the app to a model that answers."""

from __future__ import annotations

import threading
from dataclasses import replace

from chat_driver import Drive
from fake_client import INFO, FakeClient, Script

from edgeinfer.errors import ModelNotFound
from edgeinfer_tui.load_view import LoadView

MISSING = ModelNotFound("no model named [smol]; `edgeinfer models list` shows what is here")


async def test_loading_shows_what_goes_on_and_how_far_it_is(drive: Drive) -> None:
    hold = threading.Event()
    async with drive(FakeClient(load_hold=hold)) as driver:
        await driver.until(lambda: "reading tensors, part 3" in driver.screen_text)
        assert "67%" in driver.screen_text
        assert "loading 67 %" in driver.status
        hold.set()
        await driver.ready()
        assert not driver.app.screen.query_one(LoadView).display
        assert "SmolLM2-135M · llamacpp" in driver.status


async def test_a_message_sent_during_loading_is_answered_when_the_model_is_ready(drive: Drive) -> None:
    hold = threading.Event()
    client = FakeClient(Script(["here"]), load_hold=hold)
    async with drive(client) as driver:
        await driver.ask("early")
        await driver.until(lambda: driver.questions == ["early"])
        assert client.requests == []
        hold.set()
        await driver.answered()
        assert driver.answers == ["here"]


async def test_a_second_message_during_loading_stays_in_the_input(drive: Drive) -> None:
    hold = threading.Event()
    async with drive(FakeClient(load_hold=hold)) as driver:
        await driver.ask("one")
        await driver.ask("two")
        assert driver.prompt.text == "two"
        hold.set()
        await driver.answered()


async def test_a_new_chat_during_loading_gives_the_waiting_message_back(drive: Drive) -> None:
    hold = threading.Event()
    client = FakeClient(load_hold=hold)
    async with drive(client) as driver:
        await driver.ask("one")
        await driver.pilot.press("ctrl+n")
        assert driver.questions == []
        assert driver.prompt.text == "one"
        hold.set()
        await driver.ready()
    assert client.requests == []


async def test_a_load_error_is_shown_with_a_way_to_try_again(drive: Drive) -> None:
    client = FakeClient(load_errors=[MISSING])
    async with drive(client) as driver:
        await driver.until(lambda: driver.state == "no model")
        await driver.until(lambda: "no model named [smol]" in driver.screen_text)
        assert "Try again" in driver.screen_text
        await driver.pilot.press("enter")  # the button has the focus
        await driver.ready()
        await driver.ask("hello")
        await driver.answered()


async def test_a_load_error_leaves_the_focus_to_someone_who_writes(drive: Drive) -> None:
    hold = threading.Event()
    async with drive(FakeClient(load_errors=[MISSING], load_hold=hold)) as driver:
        await driver.write("half a sent")
        hold.set()
        await driver.until(lambda: driver.state == "no model")
        await driver.write("ence")
        assert driver.prompt.text == "half a sentence"
        await driver.pilot.press("ctrl+r")
        await driver.ready()
        assert driver.prompt.text == "half a sentence"


async def test_a_message_that_waited_through_a_failed_load_is_answered_after_the_next(
    drive: Drive,
) -> None:
    hold = threading.Event()
    async with drive(FakeClient(load_errors=[MISSING], load_hold=hold)) as driver:
        await driver.ask("patience")
        hold.set()
        await driver.until(lambda: driver.state == "no model")
        await driver.pilot.press("ctrl+r")
        await driver.answered()
        assert driver.questions == ["patience"]


async def test_leaving_after_a_load_error_is_an_error(drive: Drive) -> None:
    client = FakeClient(load_errors=[MISSING])
    async with drive(client) as driver:
        await driver.until(lambda: driver.state == "no model")
        await driver.pilot.press("ctrl+q")
        await driver.pilot.pause()
    assert driver.app.return_code == 1
    assert driver.app.load_error == str(MISSING)
    assert client.closed


async def _leave_while_loading(drive: Drive, key: str) -> None:
    client = FakeClient(load_hold=threading.Event())
    async with drive(client) as driver:
        await driver.until(lambda: "reading tensors" in driver.screen_text)
        await driver.pilot.press(key)
        await driver.pilot.pause()
    assert client.load_cancelled
    assert client.closed
    assert driver.app.return_code == 0


async def test_ctrl_c_during_loading_cancels_it_and_leaves(drive: Drive) -> None:
    await _leave_while_loading(drive, "ctrl+c")


async def test_ctrl_q_during_loading_cancels_it_and_leaves(drive: Drive) -> None:
    await _leave_while_loading(drive, "ctrl+q")


async def test_escape_during_loading_cancels_it_and_leaves(drive: Drive) -> None:
    await _leave_while_loading(drive, "escape")


async def test_the_models_own_warnings_are_told(drive: Drive) -> None:
    info = replace(INFO, warnings=("this build cannot use the GPU; make setup ACCEL=cuda builds one",))
    async with drive(FakeClient(info=info)) as driver:
        await driver.ready()
        assert driver.notices == list(info.warnings)
