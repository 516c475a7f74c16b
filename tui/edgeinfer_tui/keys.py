"""The keys of the chat. Those of the input itself are in prompt_input.py."""

from __future__ import annotations

from textual.binding import Binding

CHAT_KEYS = [
    Binding("escape", "stop", "Stop", id="chat.stop", tooltip="Stop the answer; what has come stays"),
    Binding("ctrl+n", "new_chat", "New", id="chat.new", priority=True, tooltip="Start a new chat"),
    Binding(
        "ctrl+r",
        "again",
        "Again",
        id="chat.again",
        priority=True,
        tooltip="Answer the last question again; after a failed load, load again",
    ),
    Binding(
        "ctrl+y",
        "copy_answer",
        "Copy",
        id="chat.copy",
        priority=True,
        tooltip="Copy the last answer to the clipboard",
    ),
    Binding(
        "ctrl+c",
        "interrupt",
        "Stop/quit",
        id="chat.interrupt",
        priority=True,
        tooltip="Copy what is selected; else stop the answer; else quit",
    ),
    Binding(
        "ctrl+q", "quit", "Quit", id="chat.quit", priority=True, show=False, tooltip="Leave the chat"
    ),
    Binding("f1", "toggle_keys", "Keys", id="chat.keys", show=False, tooltip="Show or hide all keys"),
]
