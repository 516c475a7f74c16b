"""The conversation pane: turns one under the other, the last one growing while it is answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Markdown, Static
from textual.worker import Worker, WorkerError

from edgeinfer.errors import one_line
from edgeinfer_tui.markdown import chat_parser
from edgeinfer_tui.sanitize import neutralise

_log = logging.getLogger(__name__)

_PAGES_KEPT = 2


class Question(Static):
    """What the user said, to the letter."""

    def __init__(self, text: str) -> None:
        super().__init__(neutralise(text), markup=False)


class Welcome(Static):
    """What an empty chat shows."""

    def __init__(self) -> None:
        super().__init__(
            "[b $text]edgeinfer[/]\n"
            "Everything stays on this machine.\n\n"
            "[$text]Enter[/] sends   [$text]Ctrl+J[/] breaks the line   [$text]Esc[/] stops   "
            "[$text]F1[/] shows all keys"
        )


class Notice(Static):
    """One line from edgeinfer itself. Kinds: note, stopped, error."""

    def __init__(self, text: str, kind: str = "note") -> None:
        super().__init__(one_line(text), markup=False, classes=f"-{kind}")


class AnswerView(Vertical):
    """One answer: Markdown that grows, and the line that says what is awaited before it."""

    def __init__(self) -> None:
        super().__init__()
        self._markdown = Markdown(parser_factory=chat_parser, open_links=False)
        self._activity = Static("", markup=False, classes="activity")
        self._unshown: list[str] = []
        self._showing: Worker[None] | None = None
        self._is_folded = False
        self._is_complete = False

    def compose(self) -> ComposeResult:
        yield self._activity
        yield self._markdown

    @property
    def source(self) -> str:
        """The Markdown on show."""
        return self._markdown.source

    def show_activity(self, text: str) -> None:
        self._activity.display = bool(text)
        self._activity.update(text)

    def append(self, text: str) -> None:
        """Show more of the answer, as soon as the last addition is on the screen.

        As Textual's MarkdownStream does, but bound to this widget (its task ends when the widget is
        removed) and at most half of the time at work, so that keys are never behind."""
        self.show_activity("")
        self._unshown.append(neutralise(text))
        if self._showing is None or self._showing.is_finished:
            self._showing = self.run_worker(self._show(), group="show", exit_on_error=False)

    async def _show(self) -> None:
        while self._unshown:
            more = "".join(self._unshown)
            self._unshown.clear()
            started = time.monotonic()
            await self._markdown.append(more)
            painted = asyncio.Event()
            if self.call_after_refresh(painted.set):
                await painted.wait()
            await asyncio.sleep(time.monotonic() - started)

    async def finish(self, text: str) -> None:
        """Show the whole answer anew: after appends alone, a code fence may stay blank (oterm#308)."""
        self.show_activity("")
        try:
            self._unshown.clear()
            if self._showing is not None:
                with contextlib.suppress(WorkerError):
                    await self._showing.wait()
            if self.is_attached:
                await self._markdown.update(neutralise(text))
                self._is_complete = True
        except Exception:
            # A parser or widget of another library failed on what the model wrote: show it plainly.
            _log.exception("an answer could not be shown as Markdown")
            if self.is_attached:
                self._markdown.display = False
                await self.mount(Static(neutralise(text), markup=False, classes="plain"))

    def fold(self, folded: bool) -> None:
        """Keep only the height: far from what is visible, a complete answer costs no layout."""
        if folded == self._is_folded or not self._is_complete:
            return
        self._is_folded = folded
        self.styles.height = self.size.height if folded else "auto"
        self._markdown.display = not folded

    def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        # A model can write any address, and a text browser would take over this terminal.
        event.stop()
        address = one_line(event.href)
        self.app.copy_to_clipboard(address)
        self.notify(address, title="Link copied", markup=False)


class Conversation(VerticalScroll, can_focus=False):
    """All turns. Follows the end of the text unless the user has scrolled away from it.

    Textual lays out every widget of a scrolled container at each change, visible or not, and an answer
    is dozens of them: answers more than `_PAGES_KEPT` pages away are folded."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._width_of_folds = 0

    def compose(self) -> ComposeResult:
        yield Welcome()

    def on_mount(self) -> None:
        self.anchor()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if round(old_value) != round(new_value):
            self.fold_far()

    def on_resize(self, event: events.Resize) -> None:
        """At another width all heights are others."""
        if event.size.width != self._width_of_folds:
            self._width_of_folds = event.size.width
            for answer in self.query_children(AnswerView):
                answer.fold(False)
            self.call_after_refresh(self.fold_far)

    def fold_far(self) -> None:
        """Fold the answers that are far from the visible part, unfold those near."""
        margin = _PAGES_KEPT * self.size.height
        top, bottom = self.scroll_y - margin, self.scroll_y + self.size.height + margin
        for answer in self.query_children(AnswerView):
            place = answer.virtual_region
            if place.height:  # else not laid out yet
                answer.fold(place.bottom < top or place.y > bottom)

    async def add_question(self, text: str) -> Question:
        await self.query_children(Welcome).remove()
        question = Question(text)
        await self.mount(question)
        self.anchor()
        return question

    async def add_answer(self) -> AnswerView:
        answer = AnswerView()
        await self.mount(answer)
        self.call_after_refresh(self.fold_far)  # an anchored scroll calls no watcher
        return answer

    def add_notice(self, text: str, kind: str = "note") -> None:
        self.mount(Notice(text, kind))

    async def remove_last_answer(self) -> None:
        """All that stands below the last question."""
        below = list(self.children)
        last = max((i for i, child in enumerate(below) if isinstance(child, Question)), default=-1)
        await self.remove_children(below[last + 1 :])
        self.anchor()

    async def clear(self) -> None:
        await self.remove_children()
        await self.mount(Welcome())
