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

    def compose(self) -> ComposeResult:
        yield Static("Loading the model", id="load-what", markup=False)
        yield ProgressBar(total=100, show_eta=False, id="load-bar")
        with Horizontal(id="load-choices"):
            yield Button("Try again", id="load-retry", compact=True, variant="primary")
            yield Button("Quit", id="load-quit", compact=True)

    def show_progress(self, what: str, fraction: float) -> None:
        self.display = True
        self.remove_class("-failed")
        self.query_one("#load-what", Static).update(one_line(what, 200) or "Loading the model")
        self.query_one(ProgressBar).update(progress=100 * min(1.0, max(0.0, fraction)))

    def show_error(self, error: str) -> None:
        self.display = True
        self.add_class("-failed")
        self.query_one("#load-what", Static).update(one_line(error))

    def focus_retry(self) -> None:
        # Only after the refresh that shows the button: what is hidden takes no focus.
        self.call_after_refresh(self.query_one("#load-retry", Button).focus)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(self.Retry() if event.button.id == "load-retry" else self.Quit())
