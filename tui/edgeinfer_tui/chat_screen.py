"""The one screen: keys and events in, turns and figures out."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import ActiveBinding, BindingType
from textual.containers import Vertical
from textual.screen import Screen
from textual.widgets import Footer, HelpPanel

from edgeinfer.client import Ended, ModelInfo, Text
from edgeinfer_tui.chat import Answer, Chat, Turn
from edgeinfer_tui.conversation import AnswerView, Conversation
from edgeinfer_tui.figures import Figures
from edgeinfer_tui.keys import CHAT_KEYS
from edgeinfer_tui.load_view import LoadView
from edgeinfer_tui.prompt_input import PromptInput
from edgeinfer_tui.sanitize import neutralise
from edgeinfer_tui.status_line import StatusLine

_TICKS_PER_S = 30
_TICKS_PER_FIGURES = 6  # figures that change 30 times a second cannot be read


class ChatScreen(Screen[None]):
    """Conversation, input and figures. What other threads deliver is shown by one timer, all at once."""

    ESCAPE_TO_MINIMIZE = False
    BINDINGS: ClassVar[list[BindingType]] = [*CHAT_KEYS]

    def __init__(self, chat: Chat, model_label: str) -> None:
        super().__init__()
        self._chat = chat
        self._figures = Figures(model=model_label)
        self._conversation = Conversation(id="conversation")
        self._load_view = LoadView(id="load")
        self._prompt = PromptInput(id="prompt")
        self._status = StatusLine(id="status")
        self._load_progress: tuple[str, float] = ("", 0.0)
        self._waiting: Turn | None = None  # asked while the model loads
        self._answer_view: AnswerView | None = None
        self._told_warnings: set[str] = set()
        self._ticks = 0

    def compose(self) -> ComposeResult:
        yield self._conversation
        yield self._load_view
        with Vertical(id="prompt-row"):
            yield self._prompt
        yield self._status
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self._prompt.focus()
        self.set_interval(1 / _TICKS_PER_S, self._tick)

    # Loading, which the app does

    def note_load_progress(self, what: str, fraction: float) -> None:
        """From any thread; the next tick shows it."""
        self._load_progress = (what, min(1.0, max(0.0, fraction)))

    def show_loading(self) -> None:
        self._figures.state = "loading"
        self._load_progress = ("", 0.0)
        self._prompt.focus()
        self.refresh_bindings()

    async def show_loaded(self, info: ModelInfo) -> None:
        self._figures.loaded(info)
        self._load_view.display = False
        self._tell_warnings(info.warnings)
        self.refresh_bindings()
        if self._waiting is not None:
            turn, self._waiting = self._waiting, None
            await self._answer(turn)

    def show_load_error(self, error: str) -> None:
        self._figures.state = "no model"
        self._load_view.show_error(error)
        if not self._prompt.text:  # never take the keys from someone who is writing
            self._load_view.focus_retry()
        self.refresh_bindings()

    async def on_load_view_retry(self) -> None:
        await self.run_action("app.load")

    async def on_load_view_quit(self) -> None:
        await self.run_action("app.quit")

    # Asking and answering

    async def on_prompt_input_submitted(self) -> None:
        if self._chat.running is not None:
            self.notify("Esc stops the answer; then Enter sends this.", title="Still answering")
        elif self._waiting is not None:
            self.notify("One message waits for the model already.", title="Still loading")
        elif self._figures.state == "no model":
            self.notify("Ctrl+R loads it again; then Enter sends this.", title="There is no model")
        else:
            turn = Turn(self._prompt.take())
            await self._conversation.add_question(turn.question)
            if self._figures.state == "loading":
                self._waiting = turn
            else:
                await self._answer(turn)

    async def _answer(self, turn: Turn) -> None:
        """Ask, below the question that is on the screen already."""
        self._answer_view = await self._conversation.add_answer()
        self._answer_view.show_activity("…")
        answer = self._chat.ask(turn)
        self._figures.asked(answer.started_at)
        self.refresh_bindings()

    def _tick(self) -> None:
        if not self.is_attached or not self._conversation.is_attached:
            return  # on the way out
        self._ticks += 1
        if self._figures.state == "loading":
            what, fraction = self._load_progress
            self._figures.load_percent = round(100 * fraction)
            self._load_view.show_progress(what, fraction)
        if self._chat.running is not None and self._answer_view is not None:
            self._show_arrived(self._chat.running, self._answer_view)
        if self._ticks % _TICKS_PER_FIGURES == 0 or self._chat.running is None:
            self._status.show(self._figures)

    def _show_arrived(self, answer: Answer, view: AnswerView) -> None:
        arrived = answer.drain()
        pieces = []
        ended: Ended | None = None
        for at, event in arrived:
            self._figures.observe(event, at)
            if isinstance(event, Text):
                pieces.append(event.text)
            elif isinstance(event, Ended):
                ended = event
        if text := "".join(pieces):
            answer.turn.answer += text
            view.append(text)
        elif arrived and not answer.turn.answer:
            view.show_activity(_activity(self._figures))
        if ended is not None:
            self._conclude(self._chat.settle(ended), view, ended)

    def _conclude(self, turn: Turn, view: AnswerView, ended: Ended) -> None:
        """The answer is complete: say how it ended, and give back a question that came to nothing."""
        # In a worker: keys wait while a handler does.
        self.run_worker(view.finish(turn.answer), group="finish")
        if ended.outcome == "cancelled":
            self._conversation.add_notice("stopped", "stopped")
        elif ended.outcome == "failed":
            self._conversation.add_notice(
                ended.error or ended.error_type or "the answer failed", "error"
            )
        elif ended.stats.finish_reason == "length":
            self._conversation.add_notice(self._chat.why_cut(ended.stats))
        elif not turn.answer:
            self._conversation.add_notice("the model gave an empty answer")
        self._tell_warnings(ended.stats.warnings)
        if not turn.answer and ended.outcome != "finished":
            self._prompt.give_back(turn.question)
        self.refresh_bindings()

    def _tell_warnings(self, warnings: tuple[str, ...] | list[str]) -> None:
        for warning in warnings:
            if warning not in self._told_warnings:  # once a chat, not once an answer
                self._told_warnings.add(warning)
                self._conversation.add_notice(warning, "warning")

    def abandon(self) -> None:
        """The app is leaving."""
        if self._chat.running is not None:
            self._chat.running.cancel()

    # Keys

    @property
    def active_bindings(self) -> dict[str, ActiveBinding]:
        """Ours first and in their own order, which is what the footer shows."""
        order = {key.id: place for place, key in enumerate(CHAT_KEYS)}
        active = super().active_bindings.items()
        return dict(sorted(active, key=lambda item: order.get(item[1].binding.id, len(order))))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "stop":
            return self._chat.running is not None or self._figures.state == "loading"
        if action == "again":
            return self._chat.can_repeat or self._figures.state == "no model"
        if action == "copy_answer":
            return bool(self._chat.last_answer)
        return True

    async def action_stop(self) -> None:
        """Stop the answer; during loading, stop that and leave."""
        if self._chat.running is not None:
            self._figures.state = "stopping"
            self._chat.running.cancel()
        elif self._figures.state == "loading":
            await self.run_action("app.quit")

    async def action_interrupt(self) -> None:
        """Ctrl+C, as a terminal's user means it."""
        running = self._chat.running
        if selected := self._prompt.selected_text or self.get_selected_text():
            self._copy(selected)
        elif running is not None and not running.is_stopping:
            await self.action_stop()
            self.notify("Ctrl+C again quits", title="Stopping")
        else:
            await self.run_action("app.quit")

    async def action_new_chat(self) -> None:
        if self._waiting is not None:
            self._prompt.give_back(self._waiting.question)
            self._waiting = None
        self._chat.clear()
        self._answer_view = None
        self._told_warnings.clear()
        await self._conversation.clear()
        if self._figures.state not in ("loading", "no model"):
            self._figures.forget()
        self.refresh_bindings()

    async def action_again(self) -> None:
        """Ask the last question again in place; without a model, load it again."""
        if self._figures.state == "no model":
            await self.run_action("app.load")
        elif self._chat.can_repeat:
            if self._chat.repeats_itself:
                self.notify("A temperature of 0 or a fixed seed gives the same answer again.")
            await self._conversation.remove_last_answer()
            await self._answer(self._chat.take_last())

    def action_copy_answer(self) -> None:
        self._copy(neutralise(self._chat.last_answer))

    def _copy(self, text: str) -> None:
        self.app.copy_to_clipboard(text)
        self.notify("Copied to the clipboard", timeout=2)

    def action_scroll_conversation(self, pages: int) -> None:
        step = max(1, self._conversation.size.height - 2)
        self._conversation.scroll_relative(y=pages * step, animate=False)

    def action_toggle_keys(self) -> None:
        if self.query(HelpPanel):
            self.app.action_hide_help_panel()
        else:
            self.app.action_show_help_panel()


def _activity(figures: Figures) -> str:
    """What is awaited while there is no text yet."""
    if figures.state == "reading" and figures.prompt_percent < 100:
        return f"reading the prompt, {figures.prompt_percent} %"
    return "…"
