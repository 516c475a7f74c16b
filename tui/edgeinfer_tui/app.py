"""The chat application: it loads the model, shows the chat, and leaves in order."""

from __future__ import annotations

import asyncio
import logging

from textual import work
from textual.app import App
from textual.message import Message

from edgeinfer.client import Client, ModelInfo
from edgeinfer.errors import EdgeInferError, one_line
from edgeinfer.sampling import SamplingParams
from edgeinfer_tui.chat import Chat, ChatSettings, Overflow
from edgeinfer_tui.chat_screen import ChatScreen

_log = logging.getLogger(__name__)


class ChatApp(App[None]):
    """A chat with one model. Loads `client`, and closes it when it ends.

    model_label: what to call the model until it is loaded and tells its own name.
    """

    TITLE = "edgeinfer"
    CSS_PATH = "style.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (60, "-wide")]  # noqa: RUF012 — as App declares it
    VERTICAL_BREAKPOINTS = [(0, "-low"), (16, "-high")]  # noqa: RUF012

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
        settings = ChatSettings(system, sampling or SamplingParams(), max_tokens, stop, overflow)
        self._chat_screen = ChatScreen(Chat(client, settings), model_label)
        self._is_loading = False
        self._is_leaving = False
        self.load_error = ""  # why there is no model, while there is none
        self.crash: Exception | None = None  # the error of our own that ended the app

    def get_default_screen(self) -> ChatScreen:
        return self._chat_screen

    def on_mount(self) -> None:
        # Not before everything is on the screen: a load may fail at once, and its error needs a place.
        self.call_after_refresh(self.action_load)

    def action_load(self) -> None:
        """Load the model, in a thread; again after a failure."""
        if not self._is_loading and not self._is_leaving:
            self._is_loading, self.load_error = True, ""
            self._chat_screen.show_loading()
            self._load_model()

    @work(thread=True, group="load")
    def _load_model(self) -> None:
        # Messages, not call_from_thread: that one would wait for a loop that may be waiting for us.
        try:
            self.post_message(self.Loaded(self._client.load(self._chat_screen.note_load_progress)))
        except EdgeInferError as error:
            self.post_message(self.LoadFailed(str(error)))
        except Exception as error:
            _log.exception("loading failed in a way no error class describes")
            self.post_message(self.LoadFailed(f"loading failed: {type(error).__name__}: {error}"))

    async def on_chat_app_loaded(self, message: Loaded) -> None:
        self._is_loading = False
        await self._chat_screen.show_loaded(message.info)

    def on_chat_app_load_failed(self, message: LoadFailed) -> None:
        self._is_loading = False
        self._is_leaving = False
        self.load_error = one_line(message.error)
        self._chat_screen.show_load_error(self.load_error)

    async def action_quit(self) -> None:
        self.leave()

    def leave(self, return_code: int | None = None) -> None:
        """End the app; a running answer or load is stopped. Without a code: 1 if there is no model."""
        self._is_leaving = True
        self._chat_screen.abandon()
        if self._is_loading:
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
