"""Where the user writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from edgeinfer_tui.sanitize import neutralise

# Ctrl+J is a plain line feed and arrives from every terminal; the others need a newer one.
_NEWLINE_KEYS = frozenset({"ctrl+j", "shift+enter", "alt+enter", "ctrl+enter"})


class PromptInput(TextArea):
    """A text area that grows with its text: Enter sends, Ctrl+J breaks the line, Up recalls."""

    BINDINGS: ClassVar[list[BindingType]] = [
        # Ctrl+Y copies the answer here, as the footer says.
        Binding("ctrl+shift+z", "redo", "Redo", show=False, id="input.redo"),
        # The input is never longer than a page, the conversation is.
        Binding("pageup", "screen.scroll_conversation(-1)", "Scroll up", show=False, id="scroll.up"),
        Binding(
            "pagedown", "screen.scroll_conversation(1)", "Scroll down", show=False, id="scroll.down"
        ),
        Binding(
            "ctrl+home",
            "screen.scroll_conversation(-1000)",
            "To the start",
            show=False,
            id="scroll.home",
        ),
        Binding(
            "ctrl+end", "screen.scroll_conversation(1000)", "To the end", show=False, id="scroll.end"
        ),
    ]

    @dataclass
    class Submitted(Message):
        """Enter was pressed on something worth sending. The input still holds it."""

        text: str

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, compact=True, highlight_cursor_line=False, placeholder="Ask anything")
        self._sent: list[str] = []
        self._recalled = 0  # how far back Up has gone; 0: not recalling

    def take(self) -> str:
        """The text, which leaves the input and can be recalled."""
        text = self.text
        if not self._sent or self._sent[-1] != text:
            self._sent.append(text)
        self._recalled = 0
        self.load_text("")
        return text

    def give_back(self, text: str) -> None:
        """Put a message that was not answered back, before what has been typed since."""
        typed = self.text
        self.load_text(f"{text}\n\n{typed}" if typed.strip() and typed != text else text)
        self.move_cursor(self.document.end)

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            if self.text.strip():
                self.post_message(self.Submitted(self.text))
        elif event.key in _NEWLINE_KEYS:
            event.stop()
            event.prevent_default()
            self.insert("\n")
            self.scroll_cursor_visible()
        elif event.key in ("up", "down") and self._recall(1 if event.key == "up" else -1):
            event.stop()
            event.prevent_default()

    async def _on_paste(self, event: events.Paste) -> None:
        # TextArea's own handler runs after this one and inserts what it finds here.
        event.text = neutralise(event.text)

    def _recall(self, step: int) -> bool:
        """Show an older (1) or newer (-1) message; False where the key should move the cursor."""
        showing = self._sent[-self._recalled] if self._recalled else ""
        target = self._recalled + step
        if self.text != showing or not 0 <= target <= len(self._sent):
            return False
        self._recalled = target
        self.load_text(self._sent[-target] if target else "")
        self.move_cursor(self.document.end)
        return True
