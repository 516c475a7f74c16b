"""Every size of terminal."""

from __future__ import annotations

import threading

import pytest
from chat_driver import Drive
from fake_client import FakeClient, Script
from textual.widgets import Markdown

from edgeinfer_tui.conversation import AnswerView, Conversation

MIXED = (
    "# 見出し\n\n- 一つ目の項目\n\n| a | b |\n|---|---|\n| 日本語 | 2 |\n\n```\ncode\n```\n\nThe end."
)


@pytest.mark.parametrize(
    ("size", "theme"),
    [
        ((80, 24), "textual-dark"),
        ((80, 24), "textual-light"),
        ((80, 24), "ansi-dark"),
        ((40, 10), "textual-dark"),
        ((40, 10), "textual-light"),
        ((200, 60), "textual-dark"),
        ((20, 6), "textual-dark"),
    ],
)
async def test_a_chat_fits_any_terminal_and_theme(
    drive: Drive, size: tuple[int, int], theme: str
) -> None:
    async with drive(FakeClient(Script([MIXED])), size=size) as driver:
        driver.app.theme = theme
        await driver.ready()
        await driver.ask("hello")
        await driver.answered()
        assert "The end." in driver.screen_text
        assert driver.prompt.region.bottom <= size[1]


async def test_resizing_in_mid_answer_loses_nothing(drive: Drive) -> None:
    pieces = [f"word{n} " for n in range(200)]
    async with drive(FakeClient(Script(pieces, delay_s=0.001))) as driver:
        await driver.ready()
        await driver.ask("go")
        for size in [(40, 10), (200, 60), (20, 6), (80, 24)]:
            await driver.pilot.resize_terminal(*size)
            await driver.pilot.pause(0.02)
        await driver.answered()
        assert driver.answers == ["".join(pieces)]
        assert "word199" in driver.screen_text


async def test_the_view_follows_the_end_of_the_answer(drive: Drive) -> None:
    async with drive(FakeClient(Script([f"line {n}\n\n" for n in range(60)], delay_s=0.002))) as driver:
        await driver.ready()
        await driver.ask("go")
        await driver.answered()
        assert "line 59" in driver.screen_text


async def test_the_view_stays_where_the_user_scrolled_to(drive: Drive) -> None:
    hold = threading.Event()
    client = FakeClient(Script([f"line {n}\n\n" for n in range(60)], hold=hold))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("go")
        await driver.until(lambda: "line 59" in driver.screen_text)
        await driver.pilot.press("pageup", "pageup")
        await driver.pilot.pause()
        conversation = driver.app.screen.query_one(Conversation)
        place = conversation.scroll_y
        assert place < conversation.max_scroll_y
        hold.set()
        await driver.answered()
        assert conversation.scroll_y == place
        assert "line 59" not in driver.screen_text


async def test_a_new_question_brings_the_end_back_into_view(drive: Drive) -> None:
    client = FakeClient(Script([f"line {n}\n\n" for n in range(60)]), Script(["The second."]))
    async with drive(client) as driver:
        await driver.ready()
        await driver.ask("go")
        await driver.answered()
        await driver.pilot.press("ctrl+home")
        await driver.pilot.pause()
        assert "line 59" not in driver.screen_text
        await driver.ask("and")
        await driver.answered(2)
        assert "The second." in driver.screen_text


async def test_a_long_chat_keeps_only_what_is_near_laid_out_and_shows_all_of_it(drive: Drive) -> None:
    scripts = [Script([f"answer {n}\n\n" + "- item\n" * 20]) for n in range(12)]
    async with drive(FakeClient(*scripts)) as driver:
        await driver.ready()
        for n in range(12):
            await driver.ask("q")
            await driver.answered(n + 1)
        views = list(driver.app.screen.query(AnswerView))
        height = driver.app.screen.query_one(Conversation).virtual_size.height
        assert not views[0].query_one(Markdown).display
        assert views[-1].query_one(Markdown).display
        await driver.pilot.press("ctrl+home")
        await driver.until(lambda: "answer 0" in driver.screen_text)
        assert not views[-1].query_one(Markdown).display
        assert driver.app.screen.query_one(Conversation).virtual_size.height == height
        await driver.pilot.resize_terminal(50, 20)
        await driver.until(lambda: "answer 0" in driver.screen_text)
        await driver.pilot.press("ctrl+end")
        await driver.until(lambda: driver.screen_text.count("• item") > 5)


async def test_without_colour_the_parts_still_tell_themselves_apart(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with drive(FakeClient()) as driver:
        assert driver.app.no_color
        await driver.ready()
        await driver.ask("hello")
        await driver.answered()
        question = next(line for line in driver.screen_text.splitlines() if "hello" in line)
        assert question.strip().startswith("▌")
