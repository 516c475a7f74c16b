"""Asking and being answered."""

from __future__ import annotations

import threading

from chat_driver import Drive
from fake_client import FakeClient, Script

from edgeinfer.client import Message
from edgeinfer.errors import PromptTooLong, WorkerDied
from edgeinfer.sampling import SamplingParams


async def test_an_answer_is_shown_as_markdown(drive: Drive) -> None:
    async with drive(FakeClient(Script(["## Head", "ing\n\nSome **bold", "** text"]))) as driver:
        await driver.ready()
        await driver.ask("hello")
        await driver.answered()
        assert driver.app.screen.query("MarkdownH2")
        assert "Some bold text" in driver.screen_text
        assert driver.questions == ["hello"]


async def test_text_appears_while_the_answer_still_runs(drive: Drive) -> None:
    hold = threading.Event()
    async with drive(FakeClient(Script(["Some ", "words"], hold=hold))) as driver:
        await driver.ready()
        await driver.ask("hello")
        await driver.until(lambda: "Some words" in driver.screen_text)
        await driver.until(lambda: driver.state == "answering")
        hold.set()
        await driver.answered()


async def test_two_thousand_rapid_tokens_arrive_completely_and_in_order(drive: Drive) -> None:
    pieces = [f"w{n}." + (" " if n % 40 else "\n\n") for n in range(2000)]
    async with drive(FakeClient(Script(pieces))) as driver:
        await driver.ready()
        await driver.ask("go")
        await driver.answered()
        assert driver.answers == ["".join(pieces)]
        assert "w1999." in driver.screen_text


async def test_a_code_fence_is_visible_after_the_last_token(drive: Drive) -> None:
    pieces = ["Look:\n\n", "```py", "thon\n", "x = ", "1\n", "y = 2\n", "``", "`\n", "\nDone."]
    async with drive(FakeClient(Script(pieces, delay_s=0.04))) as driver:
        await driver.ready()
        await driver.ask("code")
        await driver.answered()
        assert driver.answers == ["".join(pieces)]
        assert "x = 1" in driver.screen_text and "y = 2" in driver.screen_text


async def test_html_in_an_answer_is_shown_and_single_newlines_break_lines(drive: Drive) -> None:
    async with drive(FakeClient(Script(["<div>\nkept\n</div>\n\none\n", "two"]))) as driver:
        await driver.ready()
        await driver.ask("html")
        await driver.answered()
        lines = [line.strip() for line in driver.screen_text.splitlines()]
        assert {"<div>", "kept", "</div>", "one", "two"} <= set(lines)


async def test_the_next_request_carries_the_conversation_so_far(drive: Drive) -> None:
    client = FakeClient(Script(["first ", "answer"]), Script(["second"]))
    async with drive(client, system="Be brief.") as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        await driver.ask("two")
        await driver.answered(2)
    assert client.requests[1].messages == (
        Message("system", "Be brief."),
        Message("user", "one"),
        Message("assistant", "first answer"),
        Message("user", "two"),
    )


async def test_the_request_carries_the_chats_settings(drive: Drive) -> None:
    client = FakeClient()
    sampling = SamplingParams(temperature=0.1, seed=7)
    async with drive(client, sampling=sampling, max_tokens=9, stop=("END",), overflow="stop") as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
    request = client.requests[0]
    assert (request.sampling, request.max_tokens, request.stop, request.overflow) == (
        sampling,
        9,
        ("END",),
        "stop",
    )


async def test_escape_stops_the_answer_and_keeps_what_came(drive: Drive) -> None:
    client = FakeClient(Script(["par", "tial"], hold=threading.Event()), Script(["more"]))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.until(lambda: driver.answers == ["partial"])
        await driver.pilot.press("escape")
        await driver.answered()
        assert client.cancelled == 1
        assert driver.state == "stopped"
        assert driver.notices == ["stopped"]
        await driver.ask("two")
        await driver.answered(2)
    assert client.requests[1].messages == (
        Message("user", "one"),
        Message("assistant", "partial"),
        Message("user", "two"),
    )


async def test_stopping_before_the_first_word_gives_the_question_back(drive: Drive) -> None:
    client = FakeClient(Script([], hold=threading.Event()), Script(["fine"]))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.until(lambda: driver.state == "reading")
        await driver.pilot.press("escape")
        await driver.until(lambda: driver.state == "stopped")
        assert driver.prompt.text == "one"
        await driver.pilot.press("enter")
        await driver.answered(2)
    assert client.requests[1].messages == (Message("user", "one"),)


async def test_ctrl_c_stops_the_answer_first_and_quits_second(drive: Drive) -> None:
    client = FakeClient(Script(["some"], hold=threading.Event()))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.until(lambda: driver.answers == ["some"])
        await driver.pilot.press("ctrl+c")
        await driver.answered()
        assert driver.state == "stopped"
        assert any("Ctrl+C again quits" in toast for toast in driver.toasts)
        await driver.pilot.press("ctrl+c")
        await driver.pilot.pause()
    assert client.closed
    assert driver.app.return_code == 0


async def test_a_new_chat_carries_only_the_new_turn(drive: Drive) -> None:
    client = FakeClient()
    async with drive(client, system="Be brief.") as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        await driver.pilot.press("ctrl+n")
        await driver.until(lambda: driver.answers == [])
        assert driver.questions == []
        await driver.ask("two")
        await driver.answered()
    assert client.requests[1].messages == (Message("system", "Be brief."), Message("user", "two"))


async def test_a_new_chat_during_an_answer_cancels_it_and_shows_nothing_of_it(drive: Drive) -> None:
    client = FakeClient(Script(["old"], hold=threading.Event()), Script(["new"]))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.until(lambda: driver.answers == ["old"])
        await driver.pilot.press("ctrl+n")
        await driver.ask("two")
        await driver.answered()
        assert client.cancelled == 1
        assert driver.answers == ["new"]
        assert driver.notices == []


async def test_again_replaces_the_last_answer(drive: Drive) -> None:
    client = FakeClient(Script(["first"]), Script(["second"]))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        await driver.pilot.press("ctrl+r")
        await driver.until(lambda: driver.answers == ["second"])
        await driver.answered()
        assert driver.questions == ["one"]
    assert client.requests[1].messages == client.requests[0].messages


async def test_the_last_answer_is_copied_without_control_characters(drive: Drive) -> None:
    async with drive(FakeClient(Script(["rm \x1b[2J", "-i"]))) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        await driver.pilot.press("ctrl+y")
        assert driver.app.clipboard == "rm [2J-i"


async def test_a_failed_answer_is_shown_and_the_next_one_works(drive: Drive) -> None:
    died = WorkerDied("the model's process died; it is being started again")
    client = FakeClient(Script(["half"], error=died), Script(["whole"]))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        assert driver.answers == ["half"]
        assert driver.notices == [str(died)]
        assert driver.state == "failed"
        await driver.ask("two")
        await driver.answered(2)
        assert driver.answers == ["half", "whole"]
        assert driver.state == "ready"
    assert [m.content for m in client.requests[1].messages or ()] == ["one", "half", "two"]


async def test_a_prompt_that_is_too_long_goes_back_into_the_input(drive: Drive) -> None:
    client = FakeClient(Script([], error=PromptTooLong(5000, 2048)), Script(["ok"]))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("a long story")
        await driver.answered()
        assert "5000 tokens" in driver.notices[0]
        assert driver.prompt.text == "a long story"
        await driver.pilot.press("backspace", "enter")
        await driver.answered(2)
    assert client.requests[1].messages == (Message("user", "a long stor"),)


async def test_what_was_typed_during_a_failing_answer_is_kept_too(drive: Drive) -> None:
    hold = threading.Event()
    client = FakeClient(Script([], error=PromptTooLong(5000, 2048), hold=hold))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("first")
        await driver.write("then")
        hold.set()
        await driver.answered()
        assert driver.prompt.text == "first\n\nthen"


async def test_a_second_question_waits_in_the_input_until_the_answer_is_over(drive: Drive) -> None:
    hold = threading.Event()
    client = FakeClient(Script(["some"], hold=hold))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.ask("two")
        assert driver.prompt.text == "two"
        assert any("Still answering" in toast for toast in driver.toasts)
        hold.set()
        await driver.answered()
        await driver.pilot.press("enter")
        await driver.answered(2)
    assert len(client.requests) == 2


async def test_a_warning_is_told_once_in_a_chat(drive: Drive) -> None:
    warned = Script(["some"], warnings=["[oldest] turns were evicted"])
    async with drive(FakeClient(warned)) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        await driver.ask("two")
        await driver.answered(2)
        assert driver.notices == ["[oldest] turns were evicted"]


async def test_an_answer_cut_at_the_token_limit_says_so(drive: Drive) -> None:
    async with drive(FakeClient(Script(["a", "b"], finish_reason="length")), max_tokens=2) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        assert "--max-tokens" in driver.notices[0]


async def test_an_answer_cut_by_the_full_context_says_so(drive: Drive) -> None:
    async with drive(FakeClient(Script(["a", "b"], finish_reason="length"))) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.answered()
        assert "the context is full" in driver.notices[0]


async def test_quitting_in_mid_answer_cancels_it_and_closes_the_client(drive: Drive) -> None:
    client = FakeClient(Script(["some"], hold=threading.Event()))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("one")
        await driver.until(lambda: driver.answers == ["some"])
        await driver.pilot.press("ctrl+q")
        await driver.pilot.pause()
    assert client.cancelled == 1
    assert client.closed


async def test_answers_go_on_while_the_command_palette_is_open(drive: Drive) -> None:
    hold = threading.Event()
    async with drive(FakeClient(Script(["one ", "two"], hold=hold))) as driver:
        await driver.ready()
        await driver.ask("go")
        await driver.pilot.press("ctrl+p")
        hold.set()
        await driver.answered()
        assert driver.answers == ["one two"]
