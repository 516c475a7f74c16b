"""Loading the model, as seen from the chat: a bar, or one message and what to do about it."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Button, ProgressBar, Static

from edgeinfer.errors import one_line


class LoadView(Vertical):
    """Visible until the model is ready."""

    class Retry(Message):
        """Load again."""

    class Quit(Message):
        """Leave."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._what = Static("Loading the model", id="load-what", markup=False)
        self._bar = ProgressBar(total=100, show_eta=False, id="load-bar")
        self._retry = Button("Try again", id="load-retry", compact=True, variant="primary")

    def compose(self) -> ComposeResult:
        yield self._what
        yield self._bar
        with Horizontal(id="load-choices"):
            yield self._retry
            yield Button("Quit", id="load-quit", compact=True)

    def show_progress(self, what: str, fraction: float) -> None:
        self.display = True
        self.remove_class("-failed")
        self._what.update(one_line(what, 200) or "Loading the model")
        self._bar.update(progress=100 * min(1.0, max(0.0, fraction)))

    def show_error(self, error: str) -> None:
        self.display = True
        self.add_class("-failed")
        self._what.update(one_line(error))

    def focus_retry(self) -> None:
        # Only after the refresh that shows the button: what is hidden takes no focus.
        self.call_after_refresh(self._retry.focus)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(self.Retry() if event.button.id == "load-retry" else self.Quit())
