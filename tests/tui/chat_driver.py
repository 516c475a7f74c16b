"""A person at the chat, without a terminal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from textual.pilot import Pilot
from textual.widgets import Static

from edgeinfer_tui import ChatApp
from edgeinfer_tui.conversation import AnswerView, Notice, Question
from edgeinfer_tui.prompt_input import PromptInput
from edgeinfer_tui.status_line import StatusLine

_PATIENCE = 2000  # pauses of 5 ms; a test that waits this long hangs


class Driver:
    """What a person does and sees."""

    def __init__(self, app: ChatApp, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    async def until(self, holds: Callable[[], bool]) -> None:
        for _ in range(_PATIENCE):
            if holds():
                await self.pilot.pause()
                return
            await self.pilot.pause(0.005)
        raise AssertionError(f"never came true; on the screen: {self.state!r} {self.notices!r}")

    async def write(self, text: str) -> None:
        await self.pilot.press(*("space" if c == " " else c for c in text))

    async def ask(self, text: str) -> None:
        """Type and send."""
        await self.write(text)
        await self.pilot.press("enter")

    async def ready(self) -> None:
        await self.until(lambda: self.state not in ("loading", "no model"))

    async def answered(self, count: int = 1) -> None:
        """`count` answers are on the screen and nothing runs."""
        await self.until(
            lambda: len(self.answers) == count and self.state in ("ready", "stopped", "failed")
        )
        await self.app.workers.wait_for_complete()
        await self.pilot.pause()

    @property
    def state(self) -> str:
        return self.app.screen_stack[0].query_one(StatusLine).figures.state

    @property
    def status(self) -> str:
        return str(self.app.screen_stack[0].query_one(StatusLine).render())

    @property
    def prompt(self) -> PromptInput:
        return self.app.screen_stack[0].query_one(PromptInput)

    @property
    def answers(self) -> list[str]:
        return [view.source for view in self.app.screen_stack[0].query(AnswerView)]

    @property
    def questions(self) -> list[str]:
        return [_text(widget) for widget in self.app.screen_stack[0].query(Question)]

    @property
    def notices(self) -> list[str]:
        return [_text(widget) for widget in self.app.screen_stack[0].query(Notice)]

    @property
    def toasts(self) -> list[str]:
        return [f"{toast.title} {toast.message}" for toast in self.app._notifications]

    @property
    def screen_text(self) -> str:
        """The characters in the terminal's cells."""
        width, height = self.app.size
        lines = self.app.screen_stack[0]._compositor.render_strips()
        assert len(lines) <= height and all(strip.cell_length <= width for strip in lines)
        return "\n".join(strip.text for strip in lines)


def _text(widget: Static) -> str:
    return str(widget.content)


Drive = Callable[..., AbstractAsyncContextManager[Driver]]
