"""The chat application: keys and events in, turns and figures out."""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.message import Message
from textual.widgets import Footer

from edgeinfer.client import Client, Ended, ModelInfo, Text
from edgeinfer.errors import EdgeInferError, one_line
from edgeinfer.sampling import SamplingParams
from edgeinfer_tui.chat import Answer, Chat, ChatSettings, Overflow, Turn
from edgeinfer_tui.conversation import AnswerView, Conversation
from edgeinfer_tui.figures import Figures
from edgeinfer_tui.keys import CHAT_KEYS
from edgeinfer_tui.load_view import LoadView
from edgeinfer_tui.prompt_input import PromptInput
from edgeinfer_tui.sanitize import neutralise
from edgeinfer_tui.status_line import StatusLine

_log = logging.getLogger(__name__)

_TICKS_PER_S = 30
_TICKS_PER_FIGURES = 6  # figures that change 30 times a second cannot be read


class ChatApp(App[None]):
    """A chat with one model. It loads `client`, and closes it when it ends.

    model_label: what to call the model until it is loaded and tells its own name.
    """

    TITLE = "edgeinfer"
    CSS_PATH = "style.tcss"
    ESCAPE_TO_MINIMIZE = False
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (60, "-wide")]  # noqa: RUF012 — as App declares it
    VERTICAL_BREAKPOINTS = [(0, "-low"), (16, "-high")]  # noqa: RUF012

    BINDINGS: ClassVar[list[BindingType]] = CHAT_KEYS

    class Loaded(Message):
        """The model is ready."""

        def __init__(self, info: ModelInfo) -> None:
            super().__init__()
            self.info = info

    class LoadFailed(Message):
        """The model could not be loaded."""

        def __init__(self, error: str) -> None:
            super().__init__()
            self.error = error

    def __init__(
        self,
        client: Client,
        *,
        system: str | None = None,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        overflow: Overflow = "stream",
        model_label: str = "",
    ) -> None:
        super().__init__()
        self._client = client
        self._sampling = sampling or SamplingParams()
        self._chat = Chat(client, ChatSettings(system, self._sampling, max_tokens, stop, overflow))
        self._max_tokens = max_tokens
        self._figures = Figures(model=model_label)
        self._load_progress: tuple[str, float] = ("", 0.0)
        self._waiting: Turn | None = None  # asked while the model loads
        self._answer_view: AnswerView | None = None
        self._told_warnings: set[str] = set()
        self._ticks = 0
        self.load_error = ""  # why there is no model, while there is none
        self.crash: Exception | None = None  # the error of our own that ended the app

    def compose(self) -> ComposeResult:
        yield Conversation(id="conversation")
        yield LoadView(id="load")
        yield PromptInput(id="prompt")
        yield StatusLine(id="status")
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self.query_one(PromptInput).focus()
        self._load()
        self.set_interval(1 / _TICKS_PER_S, self._tick)

    # Loading

    def _load(self) -> None:
        self._figures.state, self.load_error = "loading", ""
        self._load_progress = ("", 0.0)
        self.refresh_bindings()
        self._load_model()

    @work(thread=True, exclusive=True, group="load")
    def _load_model(self) -> None:
        # Messages, not call_from_thread: that one would wait for a loop that may be waiting for us.
        try:
            self.post_message(self.Loaded(self._client.load(self._note_load_progress)))
        except EdgeInferError as error:
            self.post_message(self.LoadFailed(str(error)))
        except Exception as error:
            _log.exception("loading failed in a way no error class describes")
            self.post_message(self.LoadFailed(f"loading failed: {type(error).__name__}: {error}"))

    def _note_load_progress(self, what: str, fraction: float) -> None:
        self._load_progress = (what, fraction)  # from the client's thread; the next tick shows it

    async def on_chat_app_loaded(self, message: Loaded) -> None:
        self._figures.loaded(message.info)
        self.query_one(LoadView).display = False
        self._tell_warnings(message.info.warnings)
        self.refresh_bindings()
        if self._waiting is not None:
            turn, self._waiting = self._waiting, None
            await self._answer(turn)

    def on_chat_app_load_failed(self, message: LoadFailed) -> None:
        self.load_error = one_line(message.error)
        self._figures.state = "no model"
        view = self.query_one(LoadView)
        view.show_error(self.load_error)
        if not self.query_one(PromptInput).text:  # never take the keys from someone who is writing
            view.focus_retry()
        self.refresh_bindings()

    def on_load_view_retry(self) -> None:
        self.query_one(PromptInput).focus()
        self._load()

    async def on_load_view_quit(self) -> None:
        await self.action_quit()

    # Asking and answering

    async def on_prompt_input_submitted(self, message: PromptInput.Submitted) -> None:
        prompt = self.query_one(PromptInput)
        if self._chat.running is not None:
            self.notify("Esc stops the answer; then Enter sends this.", title="Still answering")
        elif self._waiting is not None:
            self.notify("One message waits for the model already.", title="Still loading")
        elif self.load_error:
            self.notify("Ctrl+R loads it again; then Enter sends this.", title="There is no model")
        else:
            turn = Turn(prompt.take())
            await self.query_one(Conversation).add_question(turn.question)
            if self._figures.state == "loading":
                self._waiting = turn
            else:
                await self._answer(turn)

    async def _answer(self, turn: Turn) -> None:
        """Ask, below the question that is on the screen already."""
        self._answer_view = await self.query_one(Conversation).add_answer()
        self._answer_view.show_activity("…")
        answer = self._chat.ask(turn)
        self._figures.asked(answer.started_at)
        self.refresh_bindings()

    async def _tick(self) -> None:
        """Bring what came from other threads onto the screen, all at once."""
        self._ticks += 1
        if self._figures.state == "loading":
            what, fraction = self._load_progress
            self._figures.load_percent = int(100 * min(1.0, max(0.0, fraction)))
            self.query_one(LoadView).show_progress(what, fraction)
        if self._chat.running is not None:
            await self._show_arrived(self._chat.running)
        if self._ticks % _TICKS_PER_FIGURES == 0 or self._chat.running is None:
            self.query_one(StatusLine).show(self._figures)

    async def _show_arrived(self, answer: Answer) -> None:
        view = self._answer_view
        assert view is not None  # noqa: S101 — made before the answer
        arrived = answer.drain()
        pieces = []
        ended: Ended | None = None
        for at, event in arrived:
            self._figures.observe(event, at)
            if isinstance(event, Text):
                pieces.append(event.text)
            elif isinstance(event, Ended):
                ended = event
        text = "".join(pieces)
        if text:
            answer.turn.answer += text
            await view.append(text)
        elif not answer.turn.answer and arrived and ended is None:
            view.show_activity(_activity(self._figures))
        if ended is not None:
            self._chat.settle(ended)
            self._conclude(answer.turn, view, ended)

    def _conclude(self, turn: Turn, view: AnswerView, ended: Ended) -> None:
        """The answer is complete: say how it ended, and keep a question that came to nothing."""
        # Not awaited here: keys wait while a handler of the app does.
        self.run_worker(view.finish(turn.answer), group="finish")
        conversation = self.query_one(Conversation)
        if ended.outcome == "cancelled":
            conversation.add_notice("stopped", "stopped")
        elif ended.outcome == "failed":
            conversation.add_notice(ended.error or ended.error_type or "the request failed", "error")
        elif ended.stats.finish_reason == "length":
            conversation.add_notice(self._why_it_is_short(ended))
        elif not turn.answer:
            conversation.add_notice("the model gave an empty answer")
        self._tell_warnings(ended.stats.warnings)
        if not turn.answer and ended.outcome != "finished":
            self.query_one(PromptInput).give_back(turn.question)
        self.refresh_bindings()

    def _why_it_is_short(self, ended: Ended) -> str:
        tokens = ended.stats.usage.completion_tokens
        if self._max_tokens is not None and tokens >= self._max_tokens:
            return f"ended at {tokens:,} tokens, as --max-tokens says"
        return f"ended after {tokens:,} tokens: the context is full; Ctrl+N starts a new chat"

    def _tell_warnings(self, warnings: tuple[str, ...] | list[str]) -> None:
        for warning in warnings:
            if warning not in self._told_warnings:  # once a chat, not once an answer
                self._told_warnings.add(warning)
                self.query_one(Conversation).add_notice(warning, "warning")

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "stop":
            return self._chat.running is not None or self._figures.state == "loading"
        if action == "again":
            return self._chat.can_repeat or bool(self.load_error)
        if action == "copy_answer":
            return bool(self._chat.last_answer)
        return True

    async def action_stop(self) -> None:
        """Stop the answer; during loading, stop that and leave."""
        if self._chat.running is not None:
            self._figures.state = "stopping"
            self._chat.running.cancel()
        elif self._figures.state == "loading":
            await self.action_quit()

    async def action_interrupt(self) -> None:
        """Ctrl+C, as a terminal's user means it."""
        prompt = self.query_one(PromptInput)
        selected = prompt.selected_text or self.screen.get_selected_text()
        if selected:
            self._copy(selected)
        elif self._chat.running is not None and not self._chat.running.is_stopping:
            await self.action_stop()
            self.notify("Ctrl+C again quits", title="Stopping")
        else:
            await self.action_quit()

    async def action_new_chat(self) -> None:
        if self._waiting is not None:
            self.query_one(PromptInput).give_back(self._waiting.question)
            self._waiting = None
        self._chat.clear()
        self._answer_view = None
        self._told_warnings.clear()
        await self.query_one(Conversation).clear()
        if self._figures.state not in ("loading", "no model"):
            self._figures.forget()
        self.refresh_bindings()

    async def action_again(self) -> None:
        """Ask the last question again in place; without a model, load it again."""
        if self.load_error:
            self.on_load_view_retry()
        elif self._chat.can_repeat:
            if self._sampling.is_greedy or self._sampling.seed is not None:
                self.notify("A temperature of 0 or a fixed seed gives the same answer again.")
            await self.query_one(Conversation).remove_last_answer()
            await self._answer(self._chat.take_last())

    def action_copy_answer(self) -> None:
        if self._chat.last_answer:
            self._copy(neutralise(self._chat.last_answer))

    def _copy(self, text: str) -> None:
        self.copy_to_clipboard(text)
        self.notify("Copied to the clipboard", timeout=2)

    def action_scroll_conversation(self, pages: int) -> None:
        conversation = self.query_one(Conversation)
        conversation.scroll_relative(y=pages * max(1, conversation.size.height - 2), animate=False)

    def action_toggle_keys(self) -> None:
        if self.screen.query("HelpPanel"):
            self.action_hide_help_panel()
        else:
            self.action_show_help_panel()

    # Leaving

    async def action_quit(self) -> None:
        self.leave()

    def leave(self, return_code: int | None = None) -> None:
        """End the app; a running answer or load is stopped. Without a code: 1 if there is no model."""
        if self._chat.running is not None:
            self._chat.running.cancel()
        if self._figures.state == "loading":
            self._client.cancel_load()
        self.exit(return_code=return_code if return_code is not None else int(bool(self.load_error)))

    async def on_unmount(self) -> None:
        # The terminal is the shell's again by now; a slow worker process delays only the prompt.
        await asyncio.to_thread(self._client.close)

    def _handle_exception(self, error: Exception) -> None:
        if self.crash is None:
            self.crash = error
        _log.error("the chat ended by an error of its own", exc_info=error)
        super()._handle_exception(error)

    def _print_error_renderables(self) -> None:
        # Textual prints a traceback with all locals. `run_chat` says it in one line.
        if "debug" in self.features:
            super()._print_error_renderables()
        self._exit_renderables.clear()


def _activity(figures: Figures) -> str:
    """What is awaited while there is no text yet."""
    if figures.state == "reading" and figures.prompt_percent < 100:
        return f"reading the prompt, {figures.prompt_percent} %"
    return "…"
